"""The compiler's memory plan of a config's own steps, for any target, and what would fit."""

import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.sharding import SingleDeviceSharding

from galore_jax.errors import UserError
from galore_jax.memory import CompiledPlan, compiled_plan
from galore_jax.targets import Target
from galore_jax.training.config import Config
from galore_jax.training.experiment import make_experiment, step_name

_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30}


class DoesNotFit(UserError):
    """A compiler that gives up because the program takes more memory than there is.

    Attributes:
      needed: bytes, as far as the compiler says; else 0.
    """

    def __init__(self, message: str):
        super().__init__(message)
        said = re.search(r"(?:Used|temporaries \()\s*([\d.]+)([KMG])", message)
        self.needed = int(float(said[1]) * _UNITS[said[2]]) if said else 0


def plan_steps(
    config: Config, target: Target, *, all_steps: bool = True
) -> dict[str, CompiledPlan]:
    """The plans of a run's steps, by their names, compiled for a target.

    Unless ``all_steps``, those after one that exceeds the target's memory are left out.

    Raises:
      DoesNotFit: the compiler gives up for lack of memory.
      UserError: settings that do not fit together, or that the target's compiler refuses.
    """
    if config.dtype == "bfloat16" and not target.bfloat16_products:
        raise UserError(
            f"XLA refuses matrix products in bfloat16 for a {target.label}; give "
            "--config.dtype=float32, or float16 (weights may stay in bfloat16)"
        )
    experiment = make_experiment(config)
    state = experiment.abstract_state()
    place = SingleDeviceSharding(target.device)
    plans = {}
    for refresh, step in experiment.train_steps().items():
        jitted = jax.jit(step, donate_argnums=0, in_shardings=place, out_shardings=place)
        lowered = jitted.lower(state, experiment.abstract_batch(config.batch_size))
        plan = compiled_plan(compile_or_say(lowered), target.label)
        if plan is None:
            raise UserError(f"the compiler for {target.label} tells no memory plan")
        plans[step_name(refresh)] = plan
        if not all_steps and target.memory is not None and plan.peak > target.memory:
            break
    return plans


def compile_or_say(lowered: jax.stages.Lowered) -> jax.stages.Compiled:
    """``lowered.compile()``.

    Raises:
      DoesNotFit: the compiler gives up for lack of memory.
    """
    try:
        return lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        first = str(error).partition("\n")[0]
        if "RESOURCE_EXHAUSTED" in first:
            raise DoesNotFit(first) from error
        raise


def advice(config: Config, target: Target, say: Callable[[str], None]) -> list[str] | None:
    """Settings with which a run fits, found by compiling: as few as it takes, in a fixed order.

    The order: layerwise updates, 8-bit moments, recomputed blocks, smaller micro-batches, a lower
    rank.

    Args:
      config: one that does not fit; it is left as it is.
      target: what it does not fit.
      say: told what is tried.

    Returns:
      The flags to add to the command, or None if even all of them are not enough.
    """
    tried, flags = config.copy_and_resolve_references(), {}
    for change in _changes(tried):
        tried.update_from_flattened_dict(change)
        flags.update(change)
        given = [f"--config.{key}={value}" for key, value in flags.items()]
        say(f"trying {' '.join(given)}")
        try:
            plans = plan_steps(tried, target, all_steps=False)
            peak = max(plan.peak for plan in plans.values())
            if target.memory is None or peak <= target.memory:
                return given
            say(f"not yet: {peak / 2**30:,.2f} GiB")
        except DoesNotFit:
            continue
        except UserError as error:
            say(f"not with this config: {error}")
            break
    return None


def _changes(config: Config) -> Iterator[dict[str, Any]]:
    """What to change next, given what has been changed so far."""
    if config.updates != "layerwise":
        change: dict[str, Any] = {"updates": "layerwise"}
        if config.optimizer.clip_norm is not None:
            change["optimizer.clip_norm"] = None
        yield change
    if config.optimizer.name in ("adam", "adamw"):
        yield {"optimizer.name": "adamw8bit"}
    if not config.remat:
        yield {"remat": True}
    while config.micro_batch_size > 1:
        change = {"micro_batch_size": _smaller_divisor(config.batch_size, config.micro_batch_size)}
        if config.method == "galore" and config.galore.refresh_from != "micro_batch":
            change["galore.refresh_from"] = "micro_batch"
        yield change
    while config.method == "galore" and config.galore.rank > 64:
        yield {"galore.rank": config.galore.rank // 2}


def _smaller_divisor(batch: int, micro_batch: int) -> int:
    """The largest divisor of the batch that is at most an eighth of the micro-batch, at least 1."""
    return next(size for size in range(max(micro_batch // 8, 1), 0, -1) if batch % size == 0)
