"""Training methods side by side, as in Figures 1 and 4 and Table 1 of the GaLore paper."""

from collections.abc import Callable

from galore_jax.memory.count import STATE_ROWS, count_state
from galore_jax.memory.report import ACTIVATIONS, Report, make_report, unit_for, versions
from galore_jax.memory.targets import Target
from galore_jax.training.config import Config
from galore_jax.training.experiment import Experiment, make_experiment

LAYERWISE = "8-bit GaLore, layerwise"
INT8 = "the same, int8 weights"
_FULL = {"method": "full", "updates": "standard", "projected_gradients": None}
_GALORE = {"method": "galore", "updates": "standard", "optimizer.name": "adamw8bit"}
METHODS = {
    "AdamW": {**_FULL, "optimizer.name": "adamw"},
    "Adafactor": {**_FULL, "optimizer.name": "adafactor"},
    "8-bit Adam": {**_FULL, "optimizer.name": "adamw8bit"},
    "LoRA": {**_FULL, "method": "lora", "optimizer.name": "adamw"},
    "8-bit GaLore, full gradients": {**_GALORE, "projected_gradients": False},
    "8-bit GaLore, projected": {**_GALORE, "projected_gradients": True},
    LAYERWISE: {**_GALORE, "projected_gradients": None, "updates": "layerwise"},
    INT8: {
        **_GALORE,
        **{"projected_gradients": None, "updates": "layerwise"},
        **{"param_dtype": "int8", "galore.projector_bits": 4},
    },
}
# Totals for LLaMA 7B, in bytes: Zhang et al. 2024 (arXiv:2407.08296), measured at 16 x 256 tokens;
# Zhu et al. 2024 (arXiv:2412.05270), whose abstract says less than 12 GB, with int8 weights.
_PUBLISHED_7B = {"Q-GaLore": 15.26e9, "APOLLO-Mini, less than": 12e9}
# Savings against AdamW in bfloat16 in the abstract of Zhao et al. 2024 (arXiv:2403.03507).
_PAPER = {
    "state": ("optimizer state, GaLore", 0.655),
    "state_8bit": ("optimizer state, 8-bit GaLore", 0.825),
    "total": ("total, 8-bit GaLore, layerwise", 0.633),
}


def compare(
    config: Config, target: Target, say: Callable[[str], None]
) -> tuple[list[Report], dict[str, float]]:
    """Reports each method with the config's model, batch and rank; clipping is left out.

    The numbers beside the reports are what GaLore saves of AdamW's memory, as parts of 1.

    Raises:
      UserError: see ``galore_jax.memory.report.make_report``.
    """
    reports = {}
    for method, changes in METHODS.items():
        say(f"compiling {method} for {target.label}")
        experiment = _changed(config, changes)
        reports[method] = make_report(experiment, target, method)
    adamw, layerwise = reports["AdamW"], reports[LAYERWISE]
    in_weights_dtype = _changed(config, {**_GALORE, "optimizer.name": "adamw"}).abstract_state()
    savings = {
        "state": 1 - count_state(in_weights_dtype.opt_state).total / adamw.optimizer_state,
        "state_8bit": 1 - layerwise.optimizer_state / adamw.optimizer_state,
        "total": 1 - layerwise.peak / adamw.peak,
    }
    return list(reports.values()), savings


def published(config: Config) -> dict[str, float]:
    """Returns what others publish for a config's model: method and bytes."""
    model = config.model
    is_7b = (model.hidden_size, model.num_layers) == (4096, 32)
    return _PUBLISHED_7B if is_7b else {}


def _changed(config: Config, changes: dict[str, object]) -> Experiment:
    changed = config.copy_and_resolve_references()
    # Not every alias takes the settings of another.
    cleared = dict.fromkeys(f"optimizer.{key}" for key in ("clip_norm", "b1", "b2", "eps"))
    if config.param_dtype == "int8":
        cleared |= {"param_dtype": config.dtype, "galore.projector_bits": None}
    changed.update_from_flattened_dict({**cleared, **changes})
    if isinstance(changed.galore.rank, int):
        changed.lora.rank = changed.galore.rank
    return make_experiment(changed)


def table(reports: list[Report], savings: dict[str, float]) -> str:
    """The methods, in GiB of 2^30 or MiB of 2^20, and the savings beside the paper's, as text."""
    unit, unit_bytes = unit_for(max(report.peak for report in reports))
    head = ("weights", "gradients", "state", "activations", "peak")
    lines = [f"{unit:<30}" + "".join(f"{name:>13}" for name in head)]
    for report in reports:
        columns = (("weights",), ("gradients",), STATE_ROWS, (ACTIVATIONS,))
        sizes = [*(report.bytes_of(*rows) for rows in columns), report.peak]
        cells = "".join(f"{size / unit_bytes:>13,.2f}" for size in sizes)
        fits = {True: "fits", False: "does not fit", None: ""}[report.fits]
        lines.append(f"{report.method:<30}{cells}  {fits}".rstrip())
    lines += ["", f"{'less than AdamW':<30}{'here':>13}{'paper':>13}"]
    for key, (name, paper) in _PAPER.items():
        lines.append(f"{name:<30}{savings[key]:>13.1%}{paper:>13.1%}")
    lines += [
        "",
        "weights, gradients and state are counted; activations (and workspace) and peak are the",
        f"compiler's. Compiled for {reports[0].target.label}, not run on it;",
        versions(),
    ]
    return "\n".join(lines)
