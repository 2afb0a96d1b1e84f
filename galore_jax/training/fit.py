"""Whether a run fits this device, before its first step."""

from collections.abc import Mapping

import jax

from galore_jax.errors import UserError
from galore_jax.memory import CompiledPlan
from galore_jax.targets import find_target
from galore_jax.training import plans
from galore_jax.training.config import Config


def compiled(
    config: Config, lowered: Mapping[bool, jax.stages.Lowered]
) -> dict[bool, jax.stages.Compiled]:
    """The compiled steps.

    Raises:
      UserError: the compiler gives up for lack of memory; with settings that would fit.
    """
    try:
        return {refresh: plans.compile_or_say(step) for refresh, step in lowered.items()}
    except plans.DoesNotFit as error:
        raise UserError(f"the training step does not fit: {error}; {_advice(config)}") from error


def check(config: Config, compiled: Mapping[str, CompiledPlan | None]) -> int:
    """The largest plan's peak in bytes, checked against the device's memory; 0 without plans.

    Raises:
      UserError: it does not fit, by how much, and settings that would; not with
        ``config.ignore_memory_plan``.
    """
    peak = max((plan.peak for plan in compiled.values() if plan is not None), default=0)
    target = find_target("auto")
    if target.memory is None or peak <= target.memory or config.ignore_memory_plan:
        return peak
    raise UserError(
        f"the training step takes {peak / 2**30:,.2f} GiB, {target.label} has "
        f"{target.memory / 2**30:,.2f} GiB, {(peak - target.memory) / 2**30:,.2f} GiB too few; "
        f"{_advice(config)}, or try all the same with --config.ignore_memory_plan=True"
    )


def _advice(config: Config) -> str:
    target = find_target("auto")
    flags = plans.advice(config, target, lambda text: print(text, flush=True))
    return "it would fit with " + " ".join(flags) if flags else "no settings were found that fit"
