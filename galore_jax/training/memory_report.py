"""The memory report of a config: every byte of a training step by what it holds."""

import dataclasses
from typing import Any

import jax
from jaxlib.version import __version__ as jaxlib_version

from galore_jax.memory import CompiledPlan, count_state, tree_bytes
from galore_jax.targets import Target
from galore_jax.training import plans
from galore_jax.training.config import Config, flat_items
from galore_jax.training.experiment import make_experiment


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of a report.

    Attributes:
      name: what the bytes hold.
      bytes: how many.
      source: ``"counted"`` from shapes, exact; ``"compiled"``, the compiler's plan; ``"formula"``.
    """

    name: str
    bytes: int
    source: str


@dataclasses.dataclass(frozen=True)
class Report:
    """The memory of one config's training step.

    Attributes:
      method: a short name of it.
      target: what it was compiled for.
      rows: the parts, without totals.
      plans: the compiler's plan of each step, by its name; empty if it gave up.
      peak: bytes of the larger step's plan; else of what was counted, or what the compiler asked
        for, whichever is more.
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
        return self.bytes_of(*STATE)


STATE = (
    "projectors",
    "first moments",
    "second moments",
    "quantisation scales",
    "other state",
)
AT_A_NEW_BASIS = "more at a new basis"


def make_report(config: Config, target: Target, method: str = "") -> Report:
    """Counts a config's state, and compiles its training steps for a target.

    Raises:
      UserError: see :func:`galore_jax.training.plans.plan_steps`; not for lack of memory.
    """
    rows = counted_rows(config)
    counted = sum(row.bytes for row in rows)
    try:
        compiled = plans.plan_steps(config, target)
    except plans.DoesNotFit as error:
        return Report(method, target, tuple(rows), {}, max(counted, error.needed))
    everyday, peak = next(iter(compiled.values())), max(p.peak for p in compiled.values())
    rows = with_temporaries(rows, everyday)
    if peak > everyday.peak:
        rows.append(Row(AT_A_NEW_BASIS, peak - everyday.peak, "compiled"))
    return Report(method, target, tuple(rows), compiled, peak)


def counted_rows(config: Config) -> list[Row]:
    """Weights, gradients and optimizer state, from shapes."""
    experiment = make_experiment(config)
    state = experiment.abstract_state()
    counted = count_state(state.opt_state)
    return [
        Row("weights", tree_bytes(state.params), "counted"),
        Row("gradients", experiment.gradient_bytes(), "counted"),
        Row("projectors", counted.projectors, "counted"),
        Row("first moments", counted.first_moments, "counted"),
        Row("second moments", counted.second_moments, "counted"),
        Row("quantisation scales", counted.scales, "counted"),
        Row("other state", counted.other, "counted"),
    ]


def with_temporaries(rows: list[Row], plan: CompiledPlan) -> list[Row]:
    """The rows, with what is left of the plan's temporaries beside the gradients.

    Gradients are temporaries of the plan. Where it never holds all of them at once they count for
    no more than it has.
    """
    temporary = plan.temporary + plan.outputs - plan.aliased
    rows = [
        dataclasses.replace(row, bytes=min(row.bytes, temporary))
        if row.name == "gradients"
        else row
        for row in rows
    ]
    gradients = sum(row.bytes for row in rows if row.name == "gradients")
    return [*rows, Row("activations and workspace", temporary - gradients, "compiled")]


def unit_for(peak: int) -> tuple[str, int]:
    """The unit in which sizes up to this read well, and its bytes.

    >>> unit_for(5 * 2**30)
    ('GiB', 1073741824)
    """
    return ("GiB", 2**30) if peak >= 2**30 else ("MiB", 2**20)


def table(report: Report) -> str:
    """The report as lines of text, in GiB of 2^30 or MiB of 2^20."""
    unit, size_of = unit_for(report.peak)
    cell = lambda size: f"{size / size_of:>10,.3f}"  # noqa: E731
    lines = [f"{'memory of a training step':<36}{unit:>10}"]
    for row in report.rows:
        lines.append(f"{row.name:<36}{cell(row.bytes)}  {row.source}")
        if row.name == "other state":
            lines.append(f"{'= optimizer state':<36}{cell(report.optimizer_state)}  counted")
    for name, plan in report.plans.items():
        lines.append(f"{f'= peak, {name}':<36}{cell(plan.peak)}  compiled")
    lines.append(verdict(report))
    lines.append(f"compiled for {report.target.label}, not run on it; {versions()}")
    return "\n".join(lines)


def verdict(report: Report) -> str:
    """Whether it fits, in one line."""
    if report.fits is None:
        return f"how much memory a {report.target.label} has is not known"
    assert report.target.memory is not None
    size = lambda x: f"{x / 2**30:,.2f} GiB ({x / 1e9:,.2f} GB)"  # noqa: E731
    has = f"{report.target.label} has {size(report.target.memory)}"
    if report.fits:
        free = report.target.memory - report.peak
        return f"fits: {size(report.peak)}; {has}, {size(free)} stay free"
    if not report.plans:
        return f"does not fit: the compiler gives up, with {size(report.peak)} or more; {has}"
    return (
        f"does not fit: {size(report.peak)}; {has}, {size(report.peak - report.target.memory)} less"
    )


def versions() -> str:
    """Of what compiled it."""
    return f"jax {jax.__version__}, jaxlib {jaxlib_version}"


def as_json(report: Report, config: Config) -> dict[str, Any]:
    """The report for programs: keys are added in time, never changed; sizes are in bytes."""
    return {
        "method": report.method,
        "target": {
            "name": report.target.name,
            "label": report.target.label,
            "platform": report.target.platform,
            "memory": report.target.memory,
        },
        "versions": {"jax": jax.__version__, "jaxlib": jaxlib_version},
        "rows": [dataclasses.asdict(row) for row in report.rows],
        "optimizer_state": report.optimizer_state,
        "plans": {
            name: {**dataclasses.asdict(plan), "peak": plan.peak}
            for name, plan in report.plans.items()
        },
        "peak": report.peak,
        "fits": report.fits,
        "config": dict(flat_items(config)),
    }
