r"""Trains by method x rates x seeds on one corpus, and writes a table and two plots.

  python benchmarks/quality.py --out=docs/quality_sample.md
  python benchmarks/quality.py --methods AdamW Muon GaLore-Muon --seeds 0 1 2 --out=FILE.md
  python benchmarks/quality.py --seeds 0 --train_steps=2400 --rates=best --out=FILE.md

Every method is tried with the same number of pairs of rates: that of what is not a projected matrix
(schedule.peak_lr), and a factor for the matrices. The first seed runs the whole grid, the others
its best pair; --rates=best takes the best pairs that are known, for another length. Each run is
train.py in a folder of its own, and then a line of runs.jsonl beside them: what is there is not run
again, so that an interrupted command goes on where it was. --config takes any corpus and model.
"""

import argparse
import dataclasses
import importlib.metadata
import itertools
import json
import shlex
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from sample_runs import train

from galore_jax.memory.count import tree_bytes
from galore_jax.training.cli import find_configs, parse
from galore_jax.training.experiment import make_experiment
from galore_jax.training.metrics import read_metrics

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Method:
    """A row of the table.

    Attributes:
      argument: what follows the colon of ``--config``.
      factor: the config key of the matrices' factor.
      factors: of which to try these.
      changes: config keys that differ.
    """

    argument: str
    factor: str
    factors: tuple[float, ...]
    changes: dict[str, Any] = dataclasses.field(default_factory=dict)


SCALE, MATRIX = "galore.scale", "optimizer.matrix_lr_scale"
PUBLISHED = {"galore.projector": "svd", "galore.rotate_moments": False}
PUBLISHED["galore.update_proj_gap"] = 50
RECOVERY = {"galore.recovery": "column"}
METHODS = {
    "AdamW": Method("method=full", MATRIX, (1 / 128, 1 / 64, 1 / 32)),
    "Muon": Method("method=full,optimizer=muon", MATRIX, (1 / 16, 1 / 8, 1 / 4)),
    "GaLore as published": Method("method=galore", SCALE, (1 / 32, 1 / 16, 1 / 8), PUBLISHED),
    "GaLore": Method("method=galore", SCALE, (1 / 32, 1 / 16, 1 / 8)),
    "GaLore, recovery": Method("method=galore", SCALE, (1 / 64, 1 / 32, 1 / 16), RECOVERY),
    "GaLore, ranks by module": Method(
        "method=galore",
        SCALE,
        (1 / 32, 1 / 16, 1 / 8),
        {"galore.rank": "{'q_proj|k_proj': 32, 'down_proj': 128, '': 64}"},
    ),
    "GaLore-Muon": Method("method=galore_muon", SCALE, (1 / 8, 1 / 4, 1 / 2)),
    "GaLore-Muon, recovery": Method("method=galore_muon", SCALE, (1 / 16, 1 / 8, 1 / 4), RECOVERY),
    "LoRA": Method("method=lora", MATRIX, (1 / 16, 1 / 4, 1)),
    "ReLoRA": Method("method=relora", MATRIX, (1 / 16, 1 / 4, 1)),
    "low rank": Method("method=low_rank", MATRIX, (1 / 32, 1 / 16, 1 / 8)),
}


@dataclasses.dataclass(frozen=True)
class Sweep:
    """Where runs are kept, and what is common to them."""

    config: str
    workdir: Path
    train_steps: int | None

    def all_rows(self) -> list[Row]:
        """The runs that are done, of any config and length."""
        file = self.workdir / "runs.jsonl"
        return [json.loads(x) for x in file.read_text().splitlines()] if file.is_file() else []

    def rows(self) -> list[Row]:
        """The runs that are done, of this config and length."""
        mine = (self.config, self.train_steps)
        return [row for row in self.all_rows() if (row["config"], row["train_steps"]) == mine]

    def row(self, name: str, peak_lr: float, factor: float, seed: int) -> Row:
        """One run, done now if it is not there."""
        method = METHODS[name]
        key = {"method": name, "peak_lr": peak_lr, "factor": factor, "seed": seed}
        for row in self.rows():
            if row["changes"] == method.changes and all(row[k] == v for k, v in key.items()):
                return row
        overrides = {"schedule.peak_lr": peak_lr, method.factor: factor, "seed": seed}
        overrides |= method.changes
        parts = [name.replace(", ", "-").replace(" ", "-"), f"lr{peak_lr:g}", f"x{factor:g}"]
        parts += [f"seed{seed}", Path(self.config).stem]
        if self.train_steps is not None:
            overrides["train_steps"] = self.train_steps
            parts.append(str(self.train_steps))
        folder, begun = self.workdir / "-".join(parts), time.monotonic()
        config = f"{self.config}:{method.argument}"
        code = train(config, folder, overrides, evaluate=True)
        lines = read_metrics(folder)
        evals = [(x["step"], x["eval_loss"]) for x in lines if "eval_loss" in x]
        logged = [x for x in lines if "tokens_per_second" in x]
        if not logged:
            raise SystemExit(f"{folder}: the run failed before its first update")
        row = key | {
            "config": self.config,
            "train_steps": self.train_steps,
            "changes": method.changes,
            "loss": evals[-1][1] if code == 0 else None,  # None: it diverged, and has said so
            "evals": evals,
            "tokens": logged[-1]["tokens"],
            "tokens_per_second": statistics.median(x["tokens_per_second"] for x in logged),
            "state_bytes": state_bytes(config, overrides),
            "seconds": time.monotonic() - begun,
            "jax": importlib.metadata.version("jax"),
        }
        with (self.workdir / "runs.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
        loss = "diverged" if row["loss"] is None else f"{row['loss']:.4f}"
        print(f"{name}, peak_lr {peak_lr:g}, {fraction(factor)}, seed {seed}: {loss}", flush=True)
        return row


def state_bytes(config: str, overrides: dict[str, Any]) -> int:
    """The bytes of the optimizer's state."""
    flags = [f"--config.{key}={value}" for key, value in overrides.items()]
    arguments = parse(["", f"--config={config}", *flags], usage="", configs=find_configs())
    assert arguments is not None
    return tree_bytes(make_experiment(arguments.config).abstract_state().opt_state)


def best(rows: list[Row], name: str) -> Row | None:
    """The run of a method with the lowest loss."""
    mine = [row for row in rows if row["method"] == name and row["loss"] is not None]
    return min(mine, key=lambda row: row["loss"], default=None)


def run_all(sweep: Sweep, names: list[str], peak_lrs: list[float], seeds: list[int]) -> None:
    """The grid of each method with the first seed, and its best pair with the others."""
    for name in names:
        if peak_lrs:
            grid = list(itertools.product(peak_lrs, METHODS[name].factors))
        else:
            found = best([x for x in sweep.all_rows() if x["config"] == sweep.config], name)
            if found is None:
                raise SystemExit(f"--rates=best: no run of {name} in {sweep.workdir}")
            grid = [(found["peak_lr"], found["factor"])]
        rows = [sweep.row(name, *pair, seeds[0]) for pair in grid]
        chosen = best(rows, name)
        if chosen is not None:
            for seed in seeds[1:]:
                sweep.row(name, chosen["peak_lr"], chosen["factor"], seed)


def chosen_runs(sweep: Sweep, names: list[str], seeds: list[int]) -> dict[str, list[Row]]:
    """For each method the runs of its best pair of rates, by seed."""
    chosen = {}
    for name in names:
        found = best([row for row in sweep.rows() if row["seed"] == seeds[0]], name)
        if found is not None:
            chosen[name] = [
                row
                for row in sweep.rows()
                if row["seed"] in seeds
                and row["loss"] is not None
                and all(row[key] == found[key] for key in ("method", "peak_lr", "factor"))
            ]
    return chosen


def table(chosen: dict[str, list[Row]], grids: dict[str, list[Row]]) -> list[str]:
    """The methods with their best rates, and then the losses of every pair."""
    lines = [
        "| method | peak_lr, factor | held-out loss | deviation | seeds | state, MiB | tokens/s |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, rows in chosen.items():
        losses = [row["loss"] for row in rows]
        deviation = f"{statistics.stdev(losses):.4f}" if len(losses) > 1 else ""
        cells = [name, f"{rows[0]['peak_lr']:g}, {fraction(rows[0]['factor'])}"]
        cells += [f"{statistics.mean(losses):.4f}", deviation, str(len(losses))]
        cells += [f"{rows[0]['state_bytes'] / 2**20:.2f}"]
        cells += [f"{statistics.median(row['tokens_per_second'] for row in rows):,.0f}"]
        lines.append("| " + " | ".join(cells) + " |")
    for name, rows in grids.items():
        factors = sorted({row["factor"] for row in rows})
        lines += ["", f"**{name}**, first seed: peak_lr down, `{METHODS[name].factor}` across", ""]
        lines += ["| | " + " | ".join(map(fraction, factors)) + " |"]
        lines += ["|---" * (len(factors) + 1) + "|"]
        least = best(rows, name)
        for peak_lr in sorted({row["peak_lr"] for row in rows}):
            cells = []
            for factor in factors:
                pair = (peak_lr, factor)
                row = next((x for x in rows if (x["peak_lr"], x["factor"]) == pair), None)
                loss = "" if row is None else "diverged"
                if row is not None and row["loss"] is not None:
                    loss = f"**{row['loss']:.4f}**" if row is least else f"{row['loss']:.4f}"
                cells.append(loss)
            lines.append(f"| {peak_lr:g} | " + " | ".join(cells) + " |")
    return lines


def fraction(factor: float) -> str:
    return f"1/{1 / factor:g}" if factor < 1 else f"{factor:g}"


def plot(chosen: dict[str, list[Row]], file: Path) -> None:
    """Held-out loss against tokens, and the last one against the bytes of the optimizer's state."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    colours = pyplot.get_cmap("tab20").colors  # pyright: ignore[reportAttributeAccessIssue]
    for colour, (name, rows) in zip(colours, chosen.items(), strict=False):
        steps = [step for step, _ in rows[0]["evals"]][1:]
        tokens = [rows[0]["tokens"] * step / rows[0]["evals"][-1][0] / 1e6 for step in steps]
        means = [
            statistics.mean(dict(map(tuple, row["evals"]))[step] for row in rows) for step in steps
        ]
        left.plot(tokens, means, marker="o", markersize=3, color=colour, label=name)
        mib = rows[0]["state_bytes"] / 2**20
        losses = [row["loss"] for row in rows]
        spread = statistics.stdev(losses) if len(losses) > 1 else 0
        right.errorbar(mib, statistics.mean(losses), yerr=spread, marker="o", color=colour)
        right.annotate(name, (mib, statistics.mean(losses)), (5, 3), textcoords="offset points")
    left.set(xlabel="tokens, millions", ylabel="held-out loss, nats a token")
    right.set(xlabel="optimizer state, MiB", ylabel="held-out loss at the end")
    left.legend(fontsize=8, frameon=False)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    figure.savefig(file, dpi=150)
    print(f"written: {file}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--config", default="configs/sample.py", help="as for train.py, without :")
    parser.add_argument("--methods", choices=METHODS, nargs="+", default=list(METHODS))
    parser.add_argument("--peak_lr", type=float, nargs="+", default=[0.02, 0.04, 0.08])
    parser.add_argument("--rates", choices=("grid", "best"), default="grid")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--train_steps", type=int, help="default: the config's")
    parser.add_argument("--workdir", type=Path, default=Path("runs/quality"))
    parser.add_argument("--out", type=Path, required=True, help="the Markdown table to write")
    parser.add_argument("--plot", type=Path, help="a .png or .svg file")
    arguments = parser.parse_args()
    arguments.workdir.mkdir(parents=True, exist_ok=True)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    names, seeds = arguments.methods, arguments.seeds
    sweep = Sweep(arguments.config, arguments.workdir, arguments.train_steps)
    run_all(sweep, names, arguments.peak_lr if arguments.rates == "grid" else [], seeds)
    first = [row for row in sweep.rows() if row["seed"] == seeds[0]]
    grids = {name: [row for row in first if row["method"] == name] for name in names}
    chosen = chosen_runs(sweep, names, seeds)
    if arguments.plot is not None:
        plot(chosen, arguments.plot)
    lines = [
        f"# Methods side by side: {arguments.config}",
        "",
        "    " + shlex.join(["python", "benchmarks/quality.py", *sys.argv[1:]]),
        "",
        f"Held-out loss in nats a token at the end, jax {importlib.metadata.version('jax')}, CPU.",
        "",
        *table(chosen, grids),
        "",
    ]
    arguments.out.write_text("\n".join(lines))


if __name__ == "__main__":
    main()
