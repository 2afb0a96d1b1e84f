"""``config.json`` of a Hugging Face LLaMA, as a ``LlamaConfig`` and back."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from galore_jax.errors import UserError
from galore_jax.models.config import LlamaConfig, RopeScaling

_ARCHITECTURE = "LlamaForCausalLM"
_SIZES = {
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "vocab_size": "vocab_size",
    "max_positions": "max_position_embeddings",
    "rms_norm_eps": "rms_norm_eps",
    "init_std": "initializer_range",
    "tie_embeddings": "tie_word_embeddings",
}
_REQUIRED = ("hidden_size", "intermediate_size", "num_layers", "num_heads", "vocab_size")
# What transformers assumes where a key is missing, if that is not LlamaConfig's own default.
_DEFAULT_POSITIONS = 2048
# Values of other keys with which the model computes what ours does.
_ONLY = {
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "hidden_act": ("silu", "swish", None),
    "quantization_config": (None,),
    "sliding_window": (None,),
    "rope_interleaved": (False, None),
}
_ROPE_SCALING = {
    "factor": "factor",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "original_max_positions": "original_max_position_embeddings",
}


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
      UserError: no such file, or another content.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        what = f"has no {path.name}" if path.parent.is_dir() else "is no folder"
        raise UserError(f"{path.parent} {what}; give a folder of a Hugging Face model") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} is no JSON object")
    return values


def read_config(folder: Path) -> LlamaConfig:
    """Reads a folder's ``config.json``, and from ``generation_config.json`` what ends a text.

    Raises:
      UserError: a file missing or damaged, another architecture than ``LlamaForCausalLM``, or a
        setting with which it computes what ours does not; the message names it.
    """
    path = folder / "config.json"
    values = read_json(path)
    kind, architectures = values.get("model_type"), values.get("architectures") or [_ARCHITECTURE]
    if kind is None and "architectures" not in values:
        raise UserError(f"{path} names no model_type: it is not of a Hugging Face model")
    if kind != "llama" or architectures != [_ARCHITECTURE]:
        named = architectures if kind == "llama" or "architectures" in values else [kind]
        raise UserError(
            f"{folder} is a {', '.join(map(str, named))} of model_type {kind!r}; "
            f"only a {_ARCHITECTURE} of model_type 'llama' can be read"
        )
    given = read_sizes(path, values, _SIZES, _REQUIRED, _ONLY)
    generation = folder / "generation_config.json"
    tokens = {**values, **(read_json(generation) if generation.is_file() else {})}
    eos = tokens.get("eos_token_id")
    try:
        return LlamaConfig(
            **{"max_positions": _DEFAULT_POSITIONS, **given, **_rope(values)},
            bos_id=tokens.get("bos_token_id"),
            eos_ids=tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,),
        )
    except (UserError, TypeError) as error:
        raise UserError(f"{path}: {error}") from error


def read_sizes(
    path: Path,
    values: Mapping[str, Any],
    sizes: Mapping[str, str],
    required: Sequence[str],
    only: Mapping[str, Sequence[Any]],
) -> dict[str, Any]:
    """Reads a model's sizes from the values of a ``config.json``.

    Args:
      path: of the file, for messages.
      values: its values.
      sizes: its keys by our names.
      required: of our names, those that must be there.
      only: by key, the values with which the model computes what ours does.

    Returns:
      What is there, by our names.

    Raises:
      UserError: another value, or a key that is missing.
    """
    for key, allowed in only.items():
        if values.get(key) not in allowed:
            raise UserError(
                f"{path}: {key} is {json.dumps(values[key])}; only {json.dumps(allowed[0])} is "
                "supported"
            )
    missing = [sizes[name] for name in required if values.get(sizes[name]) is None]
    if missing:
        raise UserError(f"{path} lacks {', '.join(missing)}")
    return {ours: values[key] for ours, key in sizes.items() if values.get(key) is not None}


def config_to_json(config: LlamaConfig) -> dict[str, Any]:
    """Returns the values of a ``config.json`` that transformers 4 and 5 read alike."""
    values: dict[str, Any] = {"architectures": [_ARCHITECTURE], "model_type": "llama"}
    values |= {key: getattr(config, ours) for ours, key in _SIZES.items()}
    values |= {"num_key_value_heads": config.kv_heads, "head_dim": config.head_size}
    if config.max_positions is None:
        values["max_position_embeddings"] = _DEFAULT_POSITIONS
    values |= {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False}
    values["rope_theta"] = config.rope_theta
    if config.rope_scaling is not None:
        scaling = dataclasses.asdict(config.rope_scaling)
        values["rope_scaling"] = {"rope_type": "llama3"}
        values["rope_scaling"] |= {key: scaling[ours] for ours, key in _ROPE_SCALING.items()}
    values["bos_token_id"] = config.bos_id
    values["eos_token_id"] = config.eos_ids[0] if len(config.eos_ids) == 1 else config.eos_ids
    if not config.eos_ids:
        values["eos_token_id"] = None
    values["torch_dtype"] = str(config.param_dtype)
    return values


def _rope(values: dict[str, Any]) -> dict[str, Any]:
    """Reads the rotary frequencies, as transformers 4 or 5 writes them."""
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise UserError(f"rope_parameters are {rope!r}; they must be an object")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise UserError(f"rope_type {kind!r} is not supported; only 'default' and 'llama3' are")
    for where in (rope, values):
        if where.get("partial_rotary_factor", 1.0) != 1.0:
            raise UserError("partial_rotary_factor is not supported: it must be 1")
    found: dict[str, Any] = {}
    theta = rope.get("rope_theta", values.get("rope_theta"))
    if theta is not None:
        found["rope_theta"] = theta
    if kind == "llama3":
        missing = [key for key in _ROPE_SCALING.values() if key not in rope]
        if missing:
            raise UserError(f"rope scaling of type 'llama3' lacks {', '.join(missing)}")
        found["rope_scaling"] = RopeScaling(
            **{ours: rope[key] for ours, key in _ROPE_SCALING.items()}
        )
    return found
