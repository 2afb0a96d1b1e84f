"""Says from the compiler's plans whether a run fits a device, and which settings would fit."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax

from galore_jax.errors import UserError
from galore_jax.memory.compile import CompiledPlan, DoesNotFit, compile_for, compile_lowered
from galore_jax.memory.targets import Target, find_target
from galore_jax.training.experiment import Experiment, make_experiment, step_name
from galore_jax.training.settings import Config


def plan_steps(
    experiment: Experiment, target: Target, *, all_steps: bool = True
) -> dict[str, CompiledPlan]:
    """The plans of a run's steps, by their names, compiled for a target.

    Unless ``all_steps``, those after one that exceeds the target's memory are left out.

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
    plans = {}
    for refresh, step in experiment.train_steps().items():
        plans[step_name(refresh)] = plan = compile_for(target, step, state, batch)
        if not all_steps and target.memory is not None and plan.peak > target.memory:
            break
    return plans


def compile_steps(
    config: Config, lowered: Mapping[bool, jax.stages.Lowered]
) -> dict[bool, jax.stages.Compiled]:
    """Compiles the steps of a run that is about to start.

    Raises:
      UserError: the compiler gives up for lack of memory; with settings that would fit.
    """
    try:
        return {refresh: compile_lowered(step) for refresh, step in lowered.items()}
    except DoesNotFit as error:
        raise UserError(f"the training step does not fit: {error}; {_advice(config)}") from error


def check_fit(config: Config, plans: Mapping[str, CompiledPlan | None]) -> int:
    """Checks the plans of a run's steps against this device's memory.

    Returns:
      The largest plan's peak in bytes; 0 without plans.

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
    """Finds settings with which a run fits, by compiling: as few as it takes, in a fixed order.

    The order: layerwise updates, 8-bit moments, recomputed blocks, smaller micro-batches, a lower
    rank.

    Args:
      config: one that does not fit; it is not changed.
      target: the device that it does not fit.
      say: is told of each attempt.

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
            plans = plan_steps(make_experiment(tried), target, all_steps=False)
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
    """The next settings to change, given what has been changed so far."""
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
