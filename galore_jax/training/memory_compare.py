"""Training methods side by side, as in Figures 1 and 4 and Table 1 of the GaLore paper."""

from collections.abc import Callable

import jax

from galore_jax.memory import tree_bytes
from galore_jax.projection import effective_rank
from galore_jax.selection import is_projected
from galore_jax.targets import Target
from galore_jax.training.config import Config
from galore_jax.training.experiment import make_experiment
from galore_jax.training.memory_report import (
    STATE,
    Report,
    Row,
    counted_rows,
    make_report,
    unit_for,
    versions,
)

LORA = "LoRA (formula)"
_FULL = {"method": "full", "updates": "standard", "projected_gradients": None}
_GALORE = {"method": "galore", "updates": "standard", "optimizer.name": "adamw8bit"}
METHODS = {
    "AdamW": {**_FULL, "optimizer.name": "adamw"},
    "Adafactor": {**_FULL, "optimizer.name": "adafactor"},
    "8-bit Adam": {**_FULL, "optimizer.name": "adamw8bit"},
    "8-bit GaLore, full gradients": {**_GALORE, "projected_gradients": False},
    "8-bit GaLore, projected": {**_GALORE, "projected_gradients": True},
    "8-bit GaLore, layerwise": {**_GALORE, "projected_gradients": None, "updates": "layerwise"},
}
# Of the abstract of Zhao et al. 2024 (arXiv:2403.03507), against AdamW in bfloat16.
PAPER = {"state": 0.655, "state_8bit": 0.825, "total": 0.633}


def compare(config: Config, target: Target, say: Callable[[str], None]) -> list[Report]:
    """A report of each method with the config's model, batch and rank; clipping left out.

    Raises:
      UserError: see :func:`galore_jax.training.memory_report.make_report`.
    """
    reports = []
    for method, changes in METHODS.items():
        say(f"compiling {method} for {target.label}")
        reports.append(make_report(_changed(config, changes), target, method))
    reports.insert(3, _lora(_changed(config, METHODS["AdamW"]), reports[0]))
    return reports


def _changed(config: Config, changes: dict[str, object]) -> Config:
    changed = config.copy_and_resolve_references()
    changed.update_from_flattened_dict({**changes, "optimizer.clip_norm": None})
    for key in ("b1", "b2", "eps"):  # not every alias takes them
        changed.optimizer[key] = None
    return changed


def _lora(config: Config, full: Report) -> Report:
    """LoRA as the paper's Table 1 counts it: factors of mr + nr beside frozen weights.

    The other weights are trained as with AdamW, whose activations it is given too.
    """
    params = make_experiment(config).abstract_state().params
    mask = is_projected(params, tuple(config.galore.target_modules))
    factors = frozen = 0
    for leaf, selected in zip(jax.tree.leaves(params), jax.tree.leaves(mask), strict=True):
        if selected:
            m, n = leaf.shape[-2:]
            rank = effective_rank(leaf.shape, config.galore.rank)
            factors += tree_bytes(leaf) * (m + n) * rank // (m * n)
            frozen += tree_bytes(leaf)
    weights = tree_bytes(params)
    trained = weights - frozen + factors
    rows = (
        Row("weights", weights + factors, "formula"),
        Row("gradients", trained, "formula"),
        Row("first moments", trained, "formula"),
        Row("second moments", trained, "formula"),
        Row("activations and workspace", full.bytes_of("activations and workspace"), "formula"),
    )
    return Report(LORA, full.target, rows, {}, sum(row.bytes for row in rows))


def reductions(config: Config, reports: list[Report]) -> dict[str, float]:
    """What is saved against AdamW, as parts of 1, under the names of :data:`PAPER`."""
    by_method = {report.method: report for report in reports}
    adamw, ours = by_method["AdamW"], by_method["8-bit GaLore, layerwise"]
    same_precision = {**METHODS["8-bit GaLore, projected"], "optimizer.name": "adamw"}
    rows = counted_rows(_changed(config, same_precision))
    state = sum(row.bytes for row in rows if row.name in STATE)
    return {
        "state": 1 - state / adamw.optimizer_state,
        "state_8bit": 1 - ours.optimizer_state / adamw.optimizer_state,
        "total": 1 - ours.peak / adamw.peak,
    }


def table(config: Config, reports: list[Report]) -> str:
    """The methods as lines of text, and the reductions beside the paper's.

    Sizes are in GiB of 2^30 or MiB of 2^20.
    """
    target = reports[0].target
    unit, size_of = unit_for(max(report.peak for report in reports))
    head = ("weights", "gradients", "state", "activations", "peak")
    lines = [f"{unit:<30}" + "".join(f"{name:>13}" for name in head)]
    for report in reports:
        sizes = (
            report.bytes_of("weights"),
            report.bytes_of("gradients"),
            report.optimizer_state,
            report.bytes_of("activations and workspace"),
            report.peak,
        )
        cells = "".join(f"{size / size_of:>13,.2f}" for size in sizes)
        lines.append(f"{report.method:<30}{cells}  {_fits(report)}")
    ours = reductions(config, reports)
    lines += [
        "",
        f"{'less than AdamW':<30}{'here':>13}{'paper':>13}",
        *(
            f"{name:<30}{ours[key]:>13.1%}{PAPER[key]:>13.1%}"
            for key, name in (
                ("state", "optimizer state, GaLore"),
                ("state_8bit", "optimizer state, 8-bit GaLore"),
                ("total", "total, 8-bit GaLore, layerwise"),
            )
        ),
        "",
        "weights, gradients and state are counted; activations (and workspace) and peak are the",
        f"compiler's, LoRA is a formula. Compiled for {target.label}, not run on it; {versions()}",
    ]
    return "\n".join(lines)


def _fits(report: Report) -> str:
    if report.method == LORA:
        return "formula"
    return {True: "fits", False: "does not fit", None: ""}[report.fits]
