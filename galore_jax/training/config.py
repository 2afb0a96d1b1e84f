"""Configs: which keys they have, and the checks of their values."""

import difflib
import importlib.util
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax

from galore_jax.data.glue_tasks import TASKS
from galore_jax.errors import UserError, check_rank
from galore_jax.projection import PROJ_TYPES
from galore_jax.projectors import PROJECTOR_METHODS
from galore_jax.recovery import RECOVERIES
from galore_jax.rounding import ROUNDINGS
from galore_jax.weights import path_filter, rank_by_pattern

Config = Any  # an ml_collections.ConfigDict with the keys of configs/base.py

METHODS = ("galore", "galore_muon", "full", "lora", "relora", "low_rank")
LANGUAGE_MODELLING = "language_modelling"
# Keys of config.encoder and config.model that are not a model's own, but of how it computes, is
# trained or would be drawn.
OWN_ENCODER_KEYS = frozenset(
    {"hidden_dropout", "attention_dropout", "classifier_dropout", "init_std"}
)
OWN_MODEL_KEYS = frozenset({"attention_implementation", "loss_chunk_tokens", "init_std"})
_AT_LEAST_ONE = (
    "train_steps",
    "batch_size",
    "micro_batch_size",
    "log_every_steps",
    "eval_tokens",
    "keep_checkpoints",
    "galore.update_proj_gap",
    "galore.power_iterations",
    "muon.rounds",
    "lora.rank",
    "relora.merge_every_steps",
)
_AT_LEAST_ZERO = (
    "eval_every_steps",
    "checkpoint_every_steps",
    "schedule.warmup_steps",
    "optimizer.eps",
    "optimizer.weight_decay",
    "relora.restart_warmup_steps",
    "seed",
)
_POSITIVE = (
    "schedule.peak_lr",
    "optimizer.clip_norm",
    "optimizer.matrix_lr_scale",
    "galore.scale",
    "lora.alpha",
)
_DTYPES = ("bfloat16", "float16", "float32")
_CHOICES = {
    "dtype": _DTYPES,
    "param_dtype": (*_DTYPES, "int8"),
    "method": METHODS,
    "schedule.decay": ("cosine", "linear"),
    "galore.proj_type": PROJ_TYPES,
    "galore.projector": PROJECTOR_METHODS,
    "galore.projector_bits": (None, 8, 4),
    "galore.projector_dtype": (None, *_DTYPES),
    "galore.refresh_from": ("batch", "micro_batch"),
    "galore.recovery": (None, *RECOVERIES),
    "param_rounding": (None, *ROUNDINGS),
    "updates": ("standard", "layerwise"),
}


def check_config(config: Config) -> None:
    """Checks the values that neither the model, the data nor the optimizer checks for itself.

    Raises:
      UserError: the key, its value, and what is allowed, in one line.
    """
    values = dict(flat_items(config))

    def require(key: str, allowed: str, is_allowed: Callable[[Any], bool]) -> None:
        if not is_allowed(values[key]):
            raise UserError(f"config.{key}={values[key]!r} must be {allowed}")

    for key, value in values.items():
        if isinstance(value, float):
            require(key, "a finite number", math.isfinite)
    for key in _AT_LEAST_ONE:
        require(key, "at least 1", lambda x: x >= 1)
    for key in _AT_LEAST_ZERO:
        require(key, "at least 0", lambda x: x is None or x >= 0)
    for key in ("optimizer.b1", "optimizer.b2"):
        require(key, "at least 0 and less than 1", lambda x: x is None or 0 <= x < 1)
    require("muon.beta", "at least 0 and less than 1", lambda x: x is not None and 0 <= x < 1)
    tasks = (LANGUAGE_MODELLING, *TASKS)
    near = difflib.get_close_matches(str(config.task), tasks, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    require("task", " or ".join(tasks) + hint, tasks.__contains__)
    names = ("glue", "reviews") if is_sentence_task(config) else ("c4", "sample")
    require(
        "data.name",
        f"{' or '.join(names)} with config.task={config.task!r}",
        names.__contains__,
    )
    require(
        "data.packing",
        f"False with config.task={config.task!r}",
        lambda x: not (x and is_sentence_task(config)),
    )
    for key in ("train_epochs", "eval_every_epochs"):
        require(key, "greater than 0, or None", lambda x: x is None or x > 0)
    require("data.seq_len", "at least 2: a token and the one it predicts", lambda x: x >= 2)
    for key in _POSITIVE:
        require(key, "greater than 0", lambda x: x is None or x > 0)
    for key, choices in _CHOICES.items():
        near = difflib.get_close_matches(str(values[key]), map(str, choices), n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        require(key, " or ".join(map(str, choices)) + hint, choices.__contains__)
    multiple = f"a multiple of config.micro_batch_size={config.micro_batch_size}"
    require("batch_size", multiple, lambda x: x % config.micro_batch_size == 0)
    require("galore.lazy_refresh", "from 0 to 1, or None", lambda x: x is None or 0 <= x <= 1)
    require(
        "param_dtype",
        f"bfloat16, float16 or float32 with config.method={config.method!r}",
        lambda x: x != "int8" or config.method == "full" or uses_galore(config),
    )
    require("lora.dropout", "at least 0 and less than 1", lambda x: 0 <= x < 1)
    require("relora.prune_ratio", "from 0 to 1", lambda x: 0 <= x <= 1)
    require(
        "updates",
        f"'standard' with config.method={config.method!r}, of which little is trained at once",
        lambda x: x == "standard" or config.method == "full" or uses_galore(config),
    )
    require("schedule.final_lr_ratio", "from 0 to 1", lambda x: 0 <= x <= 1)
    require(
        "schedule.warmup_steps",
        f"less than config.train_steps={config.train_steps}",
        lambda _: warmup_steps(config) < config.train_steps,
    )
    require(
        "model.attention_implementation",
        "xla or None on this device: cudnn is for GPUs",
        lambda x: x != "cudnn" or jax.default_backend() == "gpu",
    )
    require(
        "projected_gradients",
        f"None or False with config.method={config.method!r}",
        lambda x: not x or uses_galore(config),
    )
    require(
        "projected_gradients",
        f"None or False with config.galore.recovery={config.galore.recovery!r}, which needs the "
        "full gradient",
        lambda x: not x or config.galore.recovery is None,
    )
    require("optimizer.clip_growth", "greater than 1, or None", lambda x: x is None or x > 1)
    require(
        "optimizer.name",
        "adamw or adamw8bit with config.method='galore_muon': Adam is for what is not projected",
        lambda x: x in ("adamw", "adamw8bit") or config.method != "galore_muon",
    )
    require(
        "projected_gradients",
        "None or False with config.optimizer.clip_norm: the norm of the full gradient, which "
        "is then not known; or give --config.optimizer.clip_norm=None",
        lambda x: not x or config.optimizer.clip_norm is None,
    )
    require(
        "tensorboard",
        "False, or install the extra: pip install 'galore-jax[tensorboard]'",
        lambda x: not x or importlib.util.find_spec("tensorboardX") is not None,
    )
    galore_rank(config)
    for section in ("galore", "lora"):
        try:
            path_filter(tuple(config[section].target_modules))
        except (TypeError, ValueError) as error:
            raise UserError(f"config.{section}.{error}") from error


def flat_items(config: Config, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Gives the values of a config, or of nested dicts, by their dotted keys.

    >>> list(flat_items({"seed": 0, "galore": {"rank": 4}}))
    [('seed', 0), ('galore.rank', 4)]
    """
    for key, value in config.items():
        if hasattr(value, "items"):
            yield from flat_items(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def target_modules(config: Config) -> tuple[str, ...]:
    """Returns the patterns of the matrices that the method treats apart."""
    has_adapters = config.method in ("lora", "relora", "low_rank")
    return tuple((config.lora if has_adapters else config.galore).target_modules)


def galore_rank(config: Config) -> int | dict[str, int | None]:
    """Returns ``galore.rank``: a number, or a table of ranks by patterns.

    Raises:
      UserError: it is neither.

    >>> from ml_collections import ConfigDict
    >>> galore_rank(ConfigDict({"galore": {"rank": (("q_proj", 32), ("", 64))}}))
    {'q_proj': 32, '': 64}
    """
    rank: Any = config.galore.rank
    if isinstance(rank, int) and rank < 1:
        raise UserError(f"config.galore.rank={rank!r} must be at least 1")
    try:
        if isinstance(rank, tuple | list):
            rank = dict(rank)
        elif not isinstance(rank, int) and hasattr(rank, "items"):
            rank = dict(rank.items())
        rank_by_pattern(rank) if isinstance(rank, dict) else check_rank(rank)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"config.galore.rank={rank!r} must be an int of at least 1, or pairs of a regular "
            f"expression and such an int: {error}"
        ) from error
    return rank


def is_sentence_task(config: Config) -> bool:
    """Tells whether the task is one of sentences; configs of older runs name no task."""
    return config.get("task", LANGUAGE_MODELLING) != LANGUAGE_MODELLING


def uses_galore(config: Config) -> bool:
    """Tells whether the method projects gradients."""
    return config.method in ("galore", "galore_muon")


def warmup_steps(config: Config) -> int:
    """Returns ``schedule.warmup_steps``, or a tenth of the steps where that is None."""
    steps = config.schedule.warmup_steps
    return config.train_steps // 10 if steps is None else steps
