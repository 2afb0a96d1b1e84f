"""Runs of train.py, as the benchmarks make them."""

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from galore_jax.training.metrics import read_metrics

ROOT = Path(__file__).parents[1]


def train(
    config: str, workdir: Path, overrides: Mapping[str, object], *, evaluate: bool = False
) -> int:
    """Trains with these config keys changed; the exit code.

    It evaluates at the end, or with ``evaluate`` as often as the config says.
    """
    command = [
        sys.executable,
        str(ROOT / "train.py"),
        f"--config={config}",
        *(f"--config.{key}={value}" for key, value in overrides.items()),
        *(() if evaluate else ("--config.eval_every_steps=0",)),
        "--config.checkpoint_every_steps=0",
        f"--workdir={workdir}",
    ]
    return subprocess.run(command, check=False, stdout=subprocess.DEVNULL).returncode


def final_eval_loss(workdir: Path) -> float:
    """The last held-out loss of a run, nats a token."""
    return [line["eval_loss"] for line in read_metrics(workdir) if "eval_loss" in line][-1]
