"""The memory report as a stacked bar chart."""

import importlib.util
from collections.abc import Mapping
from pathlib import Path

from galore_jax.errors import UserError
from galore_jax.memory.count import STATE_ROWS
from galore_jax.memory.report import ACTIVATIONS, AT_A_REFRESH, Report, unit_for, versions

# The parts of a bar, told apart without red and green: name, rows, colour, colour of text on it.
_INK, _CARD = "#2b2b2b", "#b03a2e"
_PARTS = (
    ("weights", ("weights",), "#44546a", "white"),
    ("gradients", ("gradients",), "#eba23b", _INK),
    ("optimizer state", STATE_ROWS, "#2f87ab", "white"),
    (ACTIVATIONS, (ACTIVATIONS,), "#a79f92", _INK),
    (AT_A_REFRESH, (AT_A_REFRESH,), "#dcd7cd", _INK),
)


def check_path(path: Path, *, flag: str = "--plot") -> None:
    """Refuses, by a UserError, all but a .png or .svg in a folder, and a missing matplotlib."""
    if path.suffix not in (".png", ".svg"):
        raise UserError(f"{flag}={path} must end in .png or .svg")
    if not path.parent.is_dir():
        raise UserError(f"{flag}={path}: there is no folder {path.parent}")
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError(f"{flag} needs matplotlib: pip install 'galore-jax[plot]'")


def plot(
    reports: list[Report], path: Path, title: str, published: Mapping[str, float] | None = None
) -> None:
    """Draws a bar for each report of a target, in GiB or MiB, with its memory as a line.

    Args:
      reports: one for each bar.
      path: where to write.
      title: above the chart.
      published: what others publish, bytes by name: marks in rows of their own.

    Raises:
      UserError: see ``check_path``.
    """
    check_path(path)
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    count = len(reports) + len(published or {})
    figure = Figure(figsize=(9.6, 1.5 + 0.44 * count), layout="constrained")
    axes = figure.subplots()
    target, peak = reports[0].target, max(report.peak for report in reports)
    unit, unit_bytes = unit_for(peak)
    widest = max(peak, target.memory or 0) / unit_bytes
    unnamed = {name: colour for name, _, colour, _ in _PARTS}
    for y, report in enumerate(reports):
        left, weight = 0.0, "bold" if report.fits else "normal"
        method = f"{report.method or 'this config'}  "
        axes.text(0, y, method, ha="right", va="center", color=_INK, weight=weight, fontsize=10.5)
        for name, rows, colour, text_colour in _PARTS:
            width = report.bytes_of(*rows) / unit_bytes
            axes.barh(y, width, left=left, color=colour, height=0.7)
            if name in unnamed and width > 0.011 * len(name) * widest:
                axes.text(left + width / 2, y, name, ha="center", va="center", color=text_colour)
                del unnamed[name]
            left += width
        # Without a plan the bar is the least that the compiler would have needed.
        sign = "" if report.plans else "≥ "
        size = f"{sign}{report.peak / unit_bytes:,.1f}"
        axes.text(left + 0.008 * widest, y, size, va="center", color=_INK, weight=weight)
    for y, (name, size) in enumerate((published or {}).items(), start=len(reports)):
        axes.text(0, y, f"{name}, as published  ", ha="right", va="center", color="#666666")
        axes.plot(size / unit_bytes, y, "D", color="#666666", markersize=5)
        label = f"{size / unit_bytes:,.1f}"
        axes.text(size / unit_bytes + 0.012 * widest, y, label, va="center", color="#666666")
    if target.memory is not None:
        capacity = target.memory / unit_bytes
        axes.axvline(capacity, color=_CARD, linewidth=1.5, linestyle=(0, (4, 2)))
        axes.axvspan(capacity, 2 * widest, color=_CARD, alpha=0.05, linewidth=0, zorder=0)
        label = f" {target.label}: {capacity:,.1f} {unit} "
        side = "right" if capacity > 0.7 * widest else "left"
        axes.text(capacity, count - 0.42, label, color=_CARD, ha=side, va="bottom")
    axes.set_yticks([])
    axes.set_xlim(0, 1.07 * widest)
    axes.set_ylim(count - 0.35, -0.5)
    axes.set_title(title, loc="left", fontsize=12, color=_INK, pad=10)
    made_with = f"{unit}, compiled for {target.label} with {versions()}"
    axes.set_xlabel(made_with, loc="left", color="#666666")
    axes.tick_params(length=0, labelcolor=_INK)
    axes.spines[:].set_visible(False)
    axes.xaxis.grid(True, color="#e4e4e4")
    axes.set_axisbelow(True)
    if unnamed:  # no bar has room for these names
        handles = [Patch(color=colour, label=name) for name, colour in unnamed.items()]
        figure.legend(handles=handles, loc="outside lower left", ncols=4, frameon=False)
    figure.savefig(path, dpi=160, facecolor="white")
