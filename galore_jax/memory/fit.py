"""Says from the compiler's plans whether a run fits a device, and which settings would fit."""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax

from galore_jax.errors import UserError
from galore_jax.memory.compile import CompiledPlan, DoesNotFit, compile_for, compile_lowered
from galore_jax.memory.targets import Target, find_target
from galore_jax.training.config import Config, uses_galore
from galore_jax.training.experiment import Experiment, make_experiment, step_name


def plan_steps(experiment: Experiment, target: Target) -> Iterator[tuple[str, CompiledPlan]]:
    """Compiles a run's steps for a target, one by one: their names and plans.

    Raises:
      DoesNotFit: the compiler gives up for lack of memory.
      UserError: settings that do not fit together, or that the target's compiler refuses.
    """
    if experiment.config.dtype == "bfloat16" and not target.bfloat16_products:
        raise UserError(
            f"XLA refuses matrix products in bfloat16 for a {target.label}; give "
            "--config.dtype=float32, or float16 (weights may stay in bfloat16)"
        )
    state = experiment.abstract_state()
    batch = experiment.abstract_batch(experiment.config.batch_size)
    for refresh, step in experiment.train_steps().items():
        yield step_name(refresh), compile_for(target, step, state, batch)


def compile_steps(
    config: Config, lowered: Mapping[bool, jax.stages.Lowered]
) -> dict[bool, jax.stages.Compiled]:
    """Compiles a run's steps; for lack of memory, a UserError has settings that would fit."""
    try:
        return {refresh: compile_lowered(step) for refresh, step in lowered.items()}
    except DoesNotFit as error:
        raise UserError(f"the training step does not fit: {error}; {_advice(config)}") from error


def check_fit(config: Config, plans: Mapping[str, CompiledPlan | None]) -> int:
    """Checks a run's plans against this device's memory; returns the largest peak, or 0.

    Raises:
      UserError: it does not fit, by how much, and settings that would; not with
        ``config.ignore_memory_plan``.
    """
    peak = max((plan.peak for plan in plans.values() if plan is not None), default=0)
    target = find_target("auto")
    if target.memory is None or peak <= target.memory or config.ignore_memory_plan:
        return peak
    raise UserError(
        f"the training step takes {peak / 2**30:,.2f} GiB, {target.label} has "
        f"{target.memory / 2**30:,.2f} GiB, {(peak - target.memory) / 2**30:,.2f} GiB too few; "
        f"{_advice(config)}, or try all the same with --config.ignore_memory_plan=True"
    )


def _advice(config: Config) -> str:
    flags = find_fitting_flags(config, find_target("auto"), lambda text: print(text, flush=True))
    return "it would fit with " + " ".join(flags) if flags else "no settings were found that fit"


def find_fitting_flags(
    config: Config, target: Target, say: Callable[[str], None]
) -> list[str] | None:
    """Finds, by compiling, the flags with which a config that does not fit a target would fit it.

    They are as few as it takes, in this order: layerwise updates, 8-bit moments, recomputed blocks,
    smaller micro-batches, a lower rank. ``say`` is told of each attempt.

    Returns:
      The flags to add to the command, or None if even all of them are not enough.
    """
    memory = math.inf if target.memory is None else target.memory
    tried, flags = config.copy_and_resolve_references(), {}
    for change in _changes(tried):
        tried.update_from_flattened_dict(change)
        flags.update(change)
        given = [f"--config.{key}={value}" for key, value in flags.items()]
        say(f"trying {' '.join(given)}")
        try:
            plans = plan_steps(make_experiment(tried), target)
            excess = next((plan.peak for _, plan in plans if plan.peak > memory), None)
            if excess is None:
                return given
            say(f"not yet: {excess / 2**30:,.2f} GiB")
        except DoesNotFit:
            continue
        except UserError as error:
            say(f"not with this config: {error}")
            break
    return None


def _changes(config: Config) -> Iterator[dict[str, Any]]:
    """The next settings to change, given what has been changed so far."""
    if config.updates != "layerwise":
        clipped = config.optimizer.clip_norm is not None
        yield {"updates": "layerwise"} | ({"optimizer.clip_norm": None} if clipped else {})
    if config.optimizer.name in ("adam", "adamw"):
        yield {"optimizer.name": "adamw8bit"}
    if not config.remat:
        yield {"remat": True}
    while config.micro_batch_size > 1:
        most = max(config.micro_batch_size // 8, 1)
        size = next(size for size in range(most, 0, -1) if config.batch_size % size == 0)
        from_batch = uses_galore(config) and config.galore.refresh_from == "batch"
        refresh_from = {"galore.refresh_from": "micro_batch"} if from_batch else {}
        yield {"micro_batch_size": size} | refresh_from
    while uses_galore(config) and isinstance(config.galore.rank, int) and config.galore.rank > 64:
        yield {"galore.rank": config.galore.rank // 2}
