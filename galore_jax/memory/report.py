"""The memory report of an experiment: every byte of a training step by what it holds."""

import dataclasses
from typing import Any

import jax
from jaxlib.version import __version__ as jaxlib_version

from galore_jax.memory.compile import CompiledPlan, DoesNotFit
from galore_jax.memory.count import STATE_ROWS, Row, count_rows
from galore_jax.memory.fit import plan_steps
from galore_jax.memory.targets import Target
from galore_jax.training.config import Config, flat_items
from galore_jax.training.experiment import Experiment

ACTIVATIONS, AT_A_REFRESH = "activations and workspace", "more at a refresh"


@dataclasses.dataclass(frozen=True)
class Report:
    """The memory of one training step.

    Attributes:
      method: a short name of it.
      target: what it was compiled for.
      rows: the parts, without totals.
      plans: the compiler's plan of each step, by its name; empty if it gave up.
      peak: bytes of the larger step's plan; without plans, the larger of what was counted and what
        the compiler asked for.
    """

    method: str
    target: Target
    rows: tuple[Row, ...]
    plans: dict[str, CompiledPlan]
    peak: int

    @property
    def fits(self) -> bool | None:
        """Whether the peak is within the target's memory; None if that is not known."""
        if self.target.memory is None:
            return None
        return bool(self.plans) and self.peak <= self.target.memory

    def bytes_of(self, *names: str) -> int:
        """Bytes of the rows of these names together."""
        return sum(row.bytes for row in self.rows if row.name in names)

    @property
    def optimizer_state(self) -> int:
        """Bytes of projectors, moments, scales and the rest of the optimizer's state."""
        return self.bytes_of(*STATE_ROWS)


def make_report(experiment: Experiment, target: Target, method: str = "") -> Report:
    """Counts an experiment's state, and compiles its training steps for a target.

    Raises:
      UserError: see ``galore_jax.memory.fit.plan_steps``; not for lack of memory.
    """
    state = experiment.abstract_state()
    rows = count_rows(state.params, state.opt_state, experiment.gradient_bytes())
    try:
        plans = dict(plan_steps(experiment, target))
    except DoesNotFit as error:
        counted = sum(row.bytes for row in rows)
        return Report(method, target, tuple(rows), {}, max(counted, error.needed))
    ordinary, peak = next(iter(plans.values())), max(plan.peak for plan in plans.values())
    # Gradients are temporaries of the plan. Where it never holds all of them at once, they count
    # for no more than it has.
    temporary = ordinary.peak - ordinary.arguments
    gradients = min(rows[1].bytes, temporary)
    rows[1] = Row("gradients", gradients)
    rows.append(Row(ACTIVATIONS, temporary - gradients, "compiled"))
    if peak > ordinary.peak:
        rows.append(Row(AT_A_REFRESH, peak - ordinary.peak, "compiled"))
    return Report(method, target, tuple(rows), plans, peak)


def unit_for(peak: int) -> tuple[str, int]:
    """The unit in which sizes up to this read well, and its bytes.

    >>> unit_for(5 * 2**30)
    ('GiB', 1073741824)
    """
    return ("GiB", 2**30) if peak >= 2**30 else ("MiB", 2**20)


def table(report: Report) -> str:
    """The report as lines of text, in GiB of 2^30 or MiB of 2^20."""
    unit, unit_bytes = unit_for(report.peak)
    lines = [f"{'memory of a training step':<36}{unit:>10}"]
    rows = list(report.rows)
    rows.insert(2 + len(STATE_ROWS), Row("= optimizer state", report.optimizer_state))
    rows += [Row(f"= peak, {step}", plan.peak, "compiled") for step, plan in report.plans.items()]
    lines += [f"{row.name:<36}{row.bytes / unit_bytes:>10,.3f}  {row.source}" for row in rows]
    lines.append(verdict(report))
    lines.append(f"compiled for {report.target.label}, not run on it; {versions()}")
    return "\n".join(lines)


def verdict(report: Report) -> str:
    """Whether it fits, in one line."""
    label, memory = report.target.label, report.target.memory
    if memory is None:
        return f"how much memory a {label} has is not known"
    size = lambda x: f"{x / 2**30:,.2f} GiB ({x / 1e9:,.2f} GB)"  # noqa: E731
    has = f"{label} has {size(memory)}"
    if report.fits:
        return f"fits: {size(report.peak)}; {has}, {size(memory - report.peak)} stay free"
    if not report.plans:
        return f"does not fit: the compiler gives up, with {size(report.peak)} or more; {has}"
    return f"does not fit: {size(report.peak)}; {has}, {size(report.peak - memory)} less"


def versions() -> str:
    """The jax and jaxlib versions used to compile."""
    return f"jax {jax.__version__}, jaxlib {jaxlib_version}"


def as_json(report: Report, config: Config) -> dict[str, Any]:
    """The report for programs: keys are added in time, never changed; sizes are in bytes."""
    target = report.target
    return {
        **vars(report),
        "target": {key: getattr(target, key) for key in ("name", "label", "platform", "memory")},
        "versions": {"jax": jax.__version__, "jaxlib": jaxlib_version},
        "rows": [vars(row) for row in report.rows],
        "optimizer_state": report.optimizer_state,
        "plans": {step: {**vars(plan), "peak": plan.peak} for step, plan in report.plans.items()},
        "fits": report.fits,
        "config": dict(flat_items(config)),
    }
