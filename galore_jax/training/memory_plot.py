"""The memory report as a stacked bar chart."""

from pathlib import Path

from galore_jax.errors import UserError
from galore_jax.training.memory_compare import LORA
from galore_jax.training.memory_report import AT_A_NEW_BASIS, Report, unit_for, versions

# What belongs together has one colour family; colours are told apart without red and green.
_PARTS = (
    ("weights", ("weights",), "#4c5b6b"),
    ("gradients", ("gradients",), "#e6a04b"),
    ("projectors", ("projectors",), "#0b6e8f"),
    ("first moments", ("first moments",), "#3f9fbf"),
    ("second moments", ("second moments",), "#8cc9dd"),
    ("scales and other state", ("quantisation scales", "other state"), "#c8e4ee"),
    ("activations and workspace", ("activations and workspace",), "#b9b2a6"),
    (AT_A_NEW_BASIS, (AT_A_NEW_BASIS,), "#e9e6e0"),
)


def plot(reports: list[Report], path: Path, title: str) -> None:
    """Draws one bar a report, in GiB or MiB, with the target's memory as a line.

    Args:
      reports: of the same target.
      path: where to write it; its ending says the format, ``.png`` or ``.svg``.
      title: of the chart.

    Raises:
      UserError: another ending, a folder that is not there, or matplotlib is missing.
    """
    if path.suffix not in (".png", ".svg"):
        raise UserError(f"--plot={path} must end in .png or .svg")
    if not path.parent.is_dir():
        raise UserError(f"--plot={path}: there is no folder {path.parent}")
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("--plot needs matplotlib: pip install 'galore-jax[plot]'") from error

    figure = Figure(figsize=(9.5, 1.7 + 0.52 * len(reports)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    unit, size_of = unit_for(max(report.peak for report in reports))
    names = [_name(report) for report in reports]
    left = [0.0] * len(reports)
    for label, rows, colour in _PARTS:
        widths = [report.bytes_of(*rows) / size_of for report in reports]
        axes.barh(names, widths, left=left, label=label, color=colour, height=0.66)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    target = reports[0].target
    capacity = None if target.memory is None else target.memory / size_of
    widest = max(*left, capacity or 0)
    for y, (report, end) in enumerate(zip(reports, left, strict=True)):
        peak = report.peak / size_of
        text = f"{peak:,.1f}" if report.plans or report.method == LORA else f"≥ {peak:,.1f}"
        axes.text(end + 0.01 * widest, y, text, va="center", fontsize=9.5)
    if capacity is not None:
        axes.axvline(capacity, color="#b03a2e", linewidth=1.4, linestyle="--")
        axes.text(
            capacity,
            -0.56,
            f" {target.label}: {capacity:,.1f} {unit} ",
            color="#b03a2e",
            ha="right" if capacity > widest / 2 else "left",
            va="bottom",
            fontsize=9.5,
        )
    axes.set_xlim(0, widest * 1.09)
    axes.set_ylim(len(reports) - 0.45, -0.6)
    axes.set_xlabel(f"{unit}, compiled for {target.label} with {versions()}", fontsize=9.5)
    axes.set_title(title, loc="left", fontsize=11.5, pad=22)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.tick_params(axis="y", length=0)
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    figure.savefig(path, dpi=160)


def _name(report: Report) -> str:
    return report.method or "this config"
