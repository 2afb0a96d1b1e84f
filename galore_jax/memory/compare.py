"""Training methods side by side, as in Figures 1 and 4 and Table 1 of the GaLore paper."""

import dataclasses
from collections.abc import Callable

import jax

from galore_jax.memory.count import STATE_ROWS, Row, bytes_of, tree_bytes
from galore_jax.memory.report import (
    ACTIVATIONS,
    Report,
    experiment_rows,
    make_report,
    unit_for,
    versions,
)
from galore_jax.memory.targets import Target
from galore_jax.projection import effective_rank
from galore_jax.selection import is_projected
from galore_jax.training.experiment import Experiment, make_experiment
from galore_jax.training.settings import Config

LORA = "LoRA (formula)"
LAYERWISE = "8-bit GaLore, layerwise"
_FULL = {"method": "full", "updates": "standard", "projected_gradients": None}
_GALORE = {"method": "galore", "updates": "standard", "optimizer.name": "adamw8bit"}
METHODS = {
    "AdamW": {**_FULL, "optimizer.name": "adamw"},
    "Adafactor": {**_FULL, "optimizer.name": "adafactor"},
    "8-bit Adam": {**_FULL, "optimizer.name": "adamw8bit"},
    "8-bit GaLore, full gradients": {**_GALORE, "projected_gradients": False},
    "8-bit GaLore, projected": {**_GALORE, "projected_gradients": True},
    LAYERWISE: {**_GALORE, "projected_gradients": None, "updates": "layerwise"},
}
# Savings against AdamW in bfloat16 in the abstract of Zhao et al. 2024 (arXiv:2403.03507).
_PAPER = {
    "state": ("optimizer state, GaLore", 0.655),
    "state_8bit": ("optimizer state, 8-bit GaLore", 0.825),
    "total": ("total, 8-bit GaLore, layerwise", 0.633),
}


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Training methods with the same model, batch and rank.

    Attributes:
      reports: one of each method, the first of AdamW.
      less_than_adamw: what GaLore saves, as parts of 1: ``"state"``, of the optimizer state in the
        weights' dtype; ``"state_8bit"``, with 8-bit moments; ``"total"``, of the whole step with
        8-bit moments and layerwise updates.
    """

    reports: list[Report]
    less_than_adamw: dict[str, float]


def compare(config: Config, target: Target, say: Callable[[str], None]) -> Comparison:
    """Reports each method with the config's model, batch and rank; clipping is left out.

    Raises:
      UserError: see :func:`galore_jax.memory.report.make_report`.
    """
    reports = {}
    for method, changes in METHODS.items():
        say(f"compiling {method} for {target.label}")
        experiment = _changed(config, changes)
        reports[method] = make_report(experiment, target, method)
        if method == "8-bit Adam":
            reports[LORA] = _lora_report(experiment, reports["AdamW"])
    adamw, layerwise = reports["AdamW"], reports[LAYERWISE]
    rows = experiment_rows(_changed(config, {**_GALORE, "optimizer.name": "adamw"}))
    savings = {
        "state": 1 - bytes_of(rows, *STATE_ROWS) / adamw.optimizer_state,
        "state_8bit": 1 - layerwise.optimizer_state / adamw.optimizer_state,
        "total": 1 - layerwise.peak / adamw.peak,
    }
    return Comparison(list(reports.values()), savings)


def _changed(config: Config, changes: dict[str, object]) -> Experiment:
    changed = config.copy_and_resolve_references()
    # Not every alias takes the settings of another.
    cleared = dict.fromkeys(f"optimizer.{key}" for key in ("clip_norm", "b1", "b2", "eps"))
    changed.update_from_flattened_dict({**changes, **cleared})
    return make_experiment(changed)


def _lora_report(experiment: Experiment, adamw: Report) -> Report:
    """LoRA as the paper's Table 1 counts it: factors of mr + nr beside frozen weights.

    The other weights are trained as with AdamW, whose activations it is given too.
    """
    params, settings = experiment.abstract_state().params, experiment.config.galore
    mask = is_projected(params, tuple(settings.target_modules))
    factors = frozen = 0
    for leaf, selected in zip(jax.tree.leaves(params), jax.tree.leaves(mask), strict=True):
        if selected:
            m, n = leaf.shape[-2:]
            rank = effective_rank(leaf.shape, settings.rank)
            factors += tree_bytes(leaf) * (m + n) * rank // (m * n)
            frozen += tree_bytes(leaf)
    weights = tree_bytes(params)
    trained = weights - frozen + factors
    rows = (
        Row("weights", weights + factors, "formula"),
        Row("gradients", trained, "formula"),
        Row("first moments", trained, "formula"),
        Row("second moments", trained, "formula"),
        Row(ACTIVATIONS, adamw.bytes_of(ACTIVATIONS), "formula"),
    )
    return Report(LORA, adamw.target, rows, {}, sum(row.bytes for row in rows))


def table(comparison: Comparison) -> str:
    """The methods as lines of text, and the savings beside the paper's.

    Sizes are in GiB of 2^30 or MiB of 2^20.
    """
    reports = comparison.reports
    unit, unit_bytes = unit_for(max(report.peak for report in reports))
    head = ("weights", "gradients", "state", "activations", "peak")
    lines = [f"{unit:<30}" + "".join(f"{name:>13}" for name in head)]
    for report in reports:
        sizes = (
            report.bytes_of("weights"),
            report.bytes_of("gradients"),
            report.optimizer_state,
            report.bytes_of(ACTIVATIONS),
            report.peak,
        )
        cells = "".join(f"{size / unit_bytes:>13,.2f}" for size in sizes)
        fits = {True: "fits", False: "does not fit", None: ""}[report.fits]
        lines.append(
            f"{report.method:<30}{cells}  {'formula' if report.method == LORA else fits}".rstrip()
        )
    lines += ["", f"{'less than AdamW':<30}{'here':>13}{'paper':>13}"]
    for key, (name, paper) in _PAPER.items():
        lines.append(f"{name:<30}{comparison.less_than_adamw[key]:>13.1%}{paper:>13.1%}")
    lines += [
        "",
        "weights, gradients and state are counted; activations (and workspace) and peak are the",
        f"compiler's, LoRA is a formula. Compiled for {reports[0].target.label}, not run on it; "
        + versions(),
    ]
    return "\n".join(lines)
