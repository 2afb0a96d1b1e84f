"""LLaMA as the Hugging Face hub has it: a folder of ``config.json`` and safetensors files."""

import dataclasses
import functools
import json
import os
import re
from pathlib import Path
from typing import Any

import jax
from flax import traverse_util
from jax.typing import DTypeLike

from galore_jax.errors import UserError
from galore_jax.folders import complete_or_absent
from galore_jax.models.config import LlamaConfig
from galore_jax.models.huggingface_config import config_to_json, read_config
from galore_jax.models.leaf_tensors import LeafTensors, TokenizerFiles, read_leaf
from galore_jax.models.leaf_tensors import Path as LeafPath
from galore_jax.models.llama import Params, check_params, init_params
from galore_jax.models.tensor_files import TensorFiles

# Our paths, and Hugging Face's names with the layer in the place of {}. A kernel is (in, out) here
# and (out, in) there; a leaf of the blocks is there a tensor for each layer.
_NAMES = (
    (r"embed/embedding", "model.embed_tokens.weight"),
    (r"blocks/input_norm/scale", "model.layers.{}.input_layernorm.weight"),
    (r"blocks/attn/(\w+)/kernel", r"model.layers.{}.self_attn.\1.weight"),
    (r"blocks/post_attention_norm/scale", "model.layers.{}.post_attention_layernorm.weight"),
    (r"blocks/mlp/(\w+)/kernel", r"model.layers.{}.mlp.\1.weight"),
    (r"final_norm/scale", "model.norm.weight"),
    (r"lm_head/kernel", "lm_head.weight"),
)
_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
_BUFFERS = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")  # of old versions


def load(
    folder: str | os.PathLike[str], dtype: DTypeLike | None = None
) -> tuple[LlamaConfig, Params]:
    """Reads a LLaMA from a folder, straight into stacked arrays on the default device.

    Memory peaks at the model and a few megabytes; with an accelerator, that of the host at the
    largest stack.

    Args:
      folder: has ``config.json``, and either ``model.safetensors`` or several such files and
        ``model.safetensors.index.json``.
      dtype: of the params, and to compute in. None: each keeps the dtype that it is stored in, and
        the model computes in the embedding's.

    Returns:
      The model, and its params, arranged as by ``galore_jax.models.llama.init_params``.

    Raises:
      UserError: files that are missing or damaged, another architecture, tensors that are missing,
        left over or of the wrong shape, or a setting that ``LlamaConfig`` cannot represent.
    """
    folder = Path(folder).expanduser()
    config = read_config(folder)
    if dtype is not None:
        config = dataclasses.replace(config, dtype=dtype, param_dtype=dtype)
    files = TensorFiles(folder)
    leaves = _leaves(config)
    _check_tensors(folder, config, files, leaves)
    params = {}
    for path, shape in leaves.items():
        params[path] = read_leaf(files, path, shape, _tensor_names(path, config.num_layers), dtype)
    numerics = params["embed", "embedding"].dtype
    config = dataclasses.replace(config, dtype=numerics, param_dtype=numerics)
    return config, traverse_util.unflatten_dict(params)


def save(
    folder: str | os.PathLike[str],
    config: LlamaConfig,
    params: Params,
    tokenizer: TokenizerFiles | None = None,
) -> None:
    """Writes a folder that ``load`` reads, and ``transformers.AutoModelForCausalLM`` opens.

    It is written beside and renamed when it is complete. A tensor at a time is copied; files have
    at most 5 GB.

    Args:
      folder: a folder that does not exist yet, or is empty.
      config: the model.
      params: arranged as by ``galore_jax.models.llama.init_params``; each is stored in its dtype.
      tokenizer: None for a folder without one.

    Raises:
      UserError: the folder has something in it or cannot be written, the params are not those of
        the config or have another dtype than float32, float16 and bfloat16, or the tokenizer has
        more ids than the model.
    """
    folder = Path(folder).expanduser()
    check_params(config, params)
    flat: Any = traverse_util.flatten_dict(params)
    if tokenizer is not None and tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} ids and the model a vocabulary of "
            f"{config.vocab_size}; they do not belong together"
        )
    names = {path: _tensor_names(path, config.num_layers) for path in flat}
    tensors = LeafTensors(flat, names)
    values = config_to_json(dataclasses.replace(config, param_dtype=tensors.spec(_EMBEDDING).dtype))
    with complete_or_absent(folder) as partial:
        (partial / "config.json").write_text(json.dumps(values, indent=2) + "\n")
        tensors.write(partial)
        if tokenizer is not None:
            tokenizer.save(partial)


def _leaves(config: LlamaConfig) -> dict[LeafPath, tuple[int, ...]]:
    """Returns the shape of every param, in the order in which they are used."""
    _, shapes = jax.eval_shape(functools.partial(init_params, config), jax.random.key(0))
    flat: Any = traverse_util.flatten_dict(shapes)
    order = [pattern for pattern, _ in _NAMES]
    return {
        path: flat[path].shape
        for path in sorted(flat, key=lambda path: order.index(_pattern(path)))
    }


def _pattern(path: LeafPath) -> str:
    return next(pattern for pattern, _ in _NAMES if re.fullmatch(pattern, "/".join(path)))


def _tensor_names(path: LeafPath, num_layers: int) -> list[str]:
    """Returns Hugging Face's names of the tensors of a leaf, one for each layer of a block's."""
    pattern = _pattern(path)
    name = re.sub(pattern, dict(_NAMES)[pattern], "/".join(path))
    return [name.format(layer) for layer in range(num_layers)] if "{}" in name else [name]


def _check_tensors(
    folder: Path, config: LlamaConfig, files: TensorFiles, leaves: dict[LeafPath, tuple[int, ...]]
) -> None:
    """Compares the names and shapes of a folder's tensors with the model's."""
    wanted = {}
    for path, shape in leaves.items():
        shape = shape[path[0] == "blocks" :]
        shape = shape[::-1] if path[-1] == "kernel" else shape
        wanted |= dict.fromkeys(_tensor_names(path, config.num_layers), shape)
    found = {name for name in files.specs if not _BUFFERS.fullmatch(name)}
    if config.tie_embeddings and _HEAD in found:
        if not files.equal(_HEAD, _EMBEDDING):
            raise UserError(
                f"{folder} has a {_HEAD} that differs from its {_EMBEDDING}, but its config.json "
                "says that they are tied; set tie_word_embeddings to false there"
            )
        found.remove(_HEAD)
    for kind, names in (("lacks", wanted.keys() - found), ("has too much:", found - wanted.keys())):
        if names:
            first, more = min(names), f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise UserError(f"{folder} {kind} the tensor {first}{more}, as its config.json has it")
    for name, shape in wanted.items():
        if files.specs[name].shape != shape:
            raise UserError(
                f"{folder}: the tensor {name} has the shape {files.specs[name].shape}; by its "
                f"config.json it must be {shape}"
            )
