"""Configs: which keys they have, and the checks of their values."""

import difflib
import importlib.util
import math
from collections.abc import Iterator
from typing import Any

import jax

from galore_jax.errors import UserError
from galore_jax.projection import PROJ_TYPES
from galore_jax.projectors import PROJECTOR_METHODS
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
    "galore.projector": PROJECTOR_METHODS,
    "galore.projector_bits": (None, 8, 4),
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


def warmup_steps(config: Config) -> int:
    """``schedule.warmup_steps``, or a tenth of the steps where it is None."""
    steps = config.schedule.warmup_steps
    return config.train_steps // 10 if steps is None else steps
