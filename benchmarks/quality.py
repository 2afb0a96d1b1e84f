r"""Trains by method x rates x seeds on one corpus, and writes a table and two plots.

  python benchmarks/quality.py --out=docs/quality_sample.md
  python benchmarks/quality.py --methods AdamW Muon GaLore-Muon --seeds 0 1 2 --out=FILE.md
  python benchmarks/quality.py --best_of=runs/quality/runs.jsonl --train_steps=2400 --out=FILE.md

Every method is tried with the same number of pairs of rates: that of what is not a projected matrix
(schedule.peak_lr), and a factor for the matrices. With the first seed the whole grid is run, with
the others the best pair. Each run is ``train.py`` in a folder of its own, and then a line of
``runs.jsonl`` beside them: what is there is not run again, so that an interrupted command goes on
where it was, and several commands may share a folder. --config takes any corpus and model.
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

from galore_jax.training.cli import load_config
from galore_jax.training.experiment import make_experiment
from galore_jax.training.metrics import read_metrics


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
    "GaLore-Muon, recovery": Method(
        "method=galore_muon", SCALE, (1 / 16, 1 / 8, 1 / 4), RECOVERY
    ),
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

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The runs that are done."""
        file = self.workdir / "runs.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []

    def row(self, name: str, peak_lr: float, factor: float, seed: int) -> dict[str, Any]:
        """One run, done now if it is not there."""
        method = METHODS[name]
        key = {"config": self.config, "method": name, "peak_lr": peak_lr, "factor": factor}
        key |= {"seed": seed, "train_steps": self.train_steps, "changes": method.changes}
        for row in self.rows:
            if all(row[k] == v for k, v in key.items()):
                return row
        slug = name.replace(", ", "-").replace(" ", "-")
        folder = self.workdir / f"{slug}-lr{peak_lr:g}-x{factor:g}-seed{seed}"
        overrides = {"schedule.peak_lr": peak_lr, method.factor: factor, "seed": seed}
        overrides |= method.changes
        if self.train_steps is not None:
            overrides["train_steps"] = self.train_steps
            folder = folder.with_name(f"{folder.name}-{self.train_steps}")
        begun = time.monotonic()
        config = f"{self.config}:{method.argument}"
        code = train(config, folder, overrides, evaluate=True)
        lines = read_metrics(folder)
        evals = [(x["step"], x["eval_loss"]) for x in lines if "eval_loss" in x]
        speeds = [x["tokens_per_second"] for x in lines if "tokens_per_second" in x]
        state, total = state_bytes(config, overrides)
        row = key | {
            "loss": evals[-1][1] if code == 0 else None,  # None: it diverged, and has said so
            "evals": evals,
            "tokens": [x["tokens"] for x in lines if "tokens" in x][-1:],
            "tokens_per_second": statistics.median(speeds) if speeds else None,
            "state_bytes": state,
            "weight_bytes": total,
            "seconds": time.monotonic() - begun,
            "jax": importlib.metadata.version("jax"),
        }
        with (self.workdir / "runs.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
        loss = "diverged" if row["loss"] is None else f"{row['loss']:.4f}"
        print(f"{name}, peak_lr {peak_lr:g}, factor {factor:g}, seed {seed}: {loss}", flush=True)
        return row


def state_bytes(config: str, overrides: dict[str, Any]) -> tuple[int, int]:
    """The bytes of the optimizer's state, and of the weights."""
    flags = [f"--config.{key}={value}" for key, value in overrides.items()]
    state = make_experiment(load_config([f"--config={config}", *flags])).abstract_state()
    return tree_bytes(state.opt_state), tree_bytes(state.params)


def best(rows: list[dict[str, Any]], name: str, seed: int) -> dict[str, Any] | None:
    """The run of a method with the lowest loss."""
    mine = [x for x in rows if (x["method"], x["seed"]) == (name, seed) and x["loss"] is not None]
    return min(mine, key=lambda x: x["loss"], default=None)
