"""From a config to what it describes: checked values, model, data, schedule."""

import difflib
import importlib.util
import math
import re
from collections.abc import Iterator
from typing import Any

import jax
import optax

from galore_jax.bases import BASES
from galore_jax.data.batches import DataConfig, TextData
from galore_jax.errors import UserError
from galore_jax.models.llama import LlamaConfig, count_params
from galore_jax.projection import PROJ_TYPES
from galore_jax.rounding import ROUNDINGS

Config = Any  # an ml_collections.ConfigDict with the keys of configs/base.py

_AT_LEAST_ONE = (
    "train_steps",
    "batch_size",
    "micro_batch_size",
    "log_every_steps",
    "eval_tokens",
    "keep_checkpoints",
    "galore.rank",
    "galore.update_proj_gap",
    "galore.power_iterations",
)
_AT_LEAST_ZERO = (
    "eval_every_steps",
    "checkpoint_every_steps",
    "schedule.warmup_steps",
    "optimizer.eps",
    "optimizer.weight_decay",
    "seed",
)
_POSITIVE = (
    "schedule.peak_lr",
    "optimizer.clip_norm",
    "optimizer.matrix_lr_scale",
    "galore.scale",
)
_DTYPES = ("bfloat16", "float16", "float32")
_CHOICES = {
    "dtype": _DTYPES,
    "param_dtype": _DTYPES,
    "method": ("galore", "full"),
    "data.name": ("c4", "sample"),
    "galore.proj_type": PROJ_TYPES,
    "galore.basis": BASES,
    "galore.projector_bits": (None, 8, 4),
    "galore.projector_dtype": (None, *_DTYPES),
    "galore.refresh_from": ("batch", "micro_batch"),
    "param_rounding": ROUNDINGS,
    "updates": ("standard", "layerwise"),
}


def check_config(config: Config) -> None:
    """Checks the values that neither the model, the data nor the optimizer checks for itself.

    Raises:
      UserError: the key, its value, and what is allowed, in one line.
    """

    def refuse(key: str, allowed: str) -> None:
        raise UserError(f"config.{key}={_get(config, key)!r} must be {allowed}")

    for key, value in flat_items(config):
        if isinstance(value, float) and not math.isfinite(value):
            refuse(key, "a finite number")
    for key in (*_AT_LEAST_ONE, *_AT_LEAST_ZERO):
        least = 1 if key in _AT_LEAST_ONE else 0
        value = _get(config, key)
        if value is not None and not value >= least:
            refuse(key, f"at least {least}")
    for key in ("optimizer.b1", "optimizer.b2"):
        value = _get(config, key)
        if value is not None and not 0 <= value < 1:
            refuse(key, "at least 0 and less than 1")
    if config.data.seq_len < 2:
        refuse("data.seq_len", "at least 2: a token and the one it predicts")
    for key in _POSITIVE:
        if _get(config, key) is not None and not _get(config, key) > 0:
            refuse(key, "greater than 0")
    for key, choices in _CHOICES.items():
        if (value := _get(config, key)) not in choices:
            near = difflib.get_close_matches(str(value), map(str, choices), n=1)
            refuse(
                key, " or ".join(map(str, choices)) + (f"; did you mean {near[0]}?" if near else "")
            )
    for pattern in config.galore.target_modules:
        try:
            re.compile(pattern)
        except re.error as error:
            raise UserError(
                f"config.galore.target_modules has {pattern!r}, no regular expression: {error}"
            ) from error
    if config.batch_size % config.micro_batch_size:
        refuse("batch_size", f"a multiple of config.micro_batch_size={config.micro_batch_size}")
    if not 0 <= config.schedule.final_lr_ratio <= 1:
        refuse("schedule.final_lr_ratio", "from 0 to 1")
    if warmup_steps(config) >= config.train_steps:
        refuse("schedule.warmup_steps", f"less than config.train_steps={config.train_steps}")
    if config.model.attention_implementation == "cudnn" and jax.default_backend() != "gpu":
        refuse("model.attention_implementation", "xla or None on this device: cudnn is for GPUs")
    if config.projected_gradients and config.method != "galore":
        refuse("projected_gradients", "None or False with config.method='full'")
    if config.projected_gradients and config.optimizer.clip_norm is not None:
        refuse(
            "projected_gradients",
            "None or False with config.optimizer.clip_norm: the norm of the full gradient, which "
            "is then not known; or give --config.optimizer.clip_norm=None",
        )
    if config.tensorboard and importlib.util.find_spec("tensorboardX") is None:
        refuse("tensorboard", "False, or install the extra: pip install 'galore-jax[tensorboard]'")


def flat_items(config: Config, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The values of a config, or of nested dicts, by their dotted keys.

    >>> list(flat_items({"seed": 0, "galore": {"rank": 4}}))
    [('seed', 0), ('galore.rank', 4)]
    """
    for key, value in config.items():
        if hasattr(value, "items"):
            yield from flat_items(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _get(config: Config, key: str) -> Any:
    for part in key.split("."):
        config = config[part]
    return config


def model_config(config: Config) -> LlamaConfig:
    """The model that ``config.model`` and the dtypes describe.

    Raises:
      UserError: sizes that do not fit together, unknown dtypes.
    """
    return LlamaConfig(
        **config.model.to_dict(),
        dtype=config.dtype,
        param_dtype=config.param_dtype,
        remat=config.remat,
    )


def projected_gradients(config: Config) -> bool:
    """Whether gradients are born projected: as the config says, or where it can be."""
    if config.projected_gradients is not None:
        return config.projected_gradients
    return config.method == "galore" and config.optimizer.clip_norm is None


def open_data(config: Config) -> TextData:
    """The data that ``config.data`` describes, opened.

    Raises:
      UserError: data or tokenizer missing, unreadable, or not fit for the model.
    """
    data = DataConfig(**config.data.to_dict())
    return TextData(data, vocab_size=config.model.vocab_size)


def summary(config: Config, params: Any) -> str:
    """What will run, in a few lines."""
    model, data, schedule = config.model, config.data, config.schedule
    settings, low_rank = config.optimizer, config.galore
    method = f"{settings.name} on the full gradients"
    if config.method == "galore":
        method = (
            f"galore of {settings.name}: rank {low_rank.rank}, new basis every "
            f"{low_rank.update_proj_gap} updates, scale {low_rank.scale:g}"
        )
    device = jax.local_devices()[0].device_kind
    layout = "packed" if data.packing else "a document a row"
    return (
        f"model   {count_params(params) / 1e6:,.2f}M parameters: hidden {model.hidden_size}, "
        f"{model.num_layers} layers, vocabulary {model.vocab_size}, {config.param_dtype}\n"
        f"method  {method}\n"
        f"data    {data.name}: {config.batch_size} x {data.seq_len} tokens an update, {layout}\n"
        f"run     {config.train_steps} updates, peak learning rate {schedule.peak_lr:g}, "
        f"seed {config.seed}, on {device} with jax {jax.__version__}"
    )


def warmup_steps(config: Config) -> int:
    """``schedule.warmup_steps``, or a tenth of the steps where it is None."""
    steps = config.schedule.warmup_steps
    return config.train_steps // 10 if steps is None else steps


def learning_rate(config: Config) -> optax.Schedule:
    """Linear warm-up from 0 to the peak, then a cosine down to ``final_lr_ratio`` of it.

    As in the paper's appendix C.1. Called with the number of updates already made, so that the
    first update has learning rate 0 if there is any warm-up.
    """
    schedule, warmup = config.schedule, warmup_steps(config)
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0 if warmup else schedule.peak_lr,
        peak_value=schedule.peak_lr,
        warmup_steps=warmup,
        decay_steps=config.train_steps,
        end_value=schedule.peak_lr * schedule.final_lr_ratio,
    )
