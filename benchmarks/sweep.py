"""Sweeps GaLore and full-rank training over one grid of learning rates, and writes a table.

  python benchmarks/sweep.py --out=docs/sweep_sample.md

Each run is ``train.py`` with overrides in a folder of its own under ``--workdir``: a sweep that is
interrupted goes on where it was. ``--jobs`` runs go side by side, each on a core of its own.
"""

import argparse
import concurrent.futures
import importlib.metadata
import os
import queue
import shlex
import subprocess
import sys
from pathlib import Path

from galore_jax.training.metrics import read_metrics

ROOT = Path(__file__).parents[1]
KNOB = {"galore": "galore.scale", "full": "optimizer.matrix_lr_scale"}


def final_eval_loss(workdir: Path) -> float:
    return [line["eval_loss"] for line in read_metrics(workdir) if "eval_loss" in line][-1]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--config", default="configs/sample.py")
    parser.add_argument("--peak_lr", type=float, nargs="+", default=[0.005, 0.01, 0.02])
    parser.add_argument("--scale", type=float, nargs="+", default=[0.125, 0.25, 0.5])
    parser.add_argument("--workdir", type=Path, default=Path("runs/sweep"))
    parser.add_argument("--out", type=Path, required=True, help="the Markdown table to write")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    arguments = parser.parse_args()

    cores: queue.SimpleQueue[int] = queue.SimpleQueue()
    for core in sorted(os.sched_getaffinity(0))[: arguments.jobs]:
        cores.put(core)

    def run(method: str, peak_lr: float, scale: float) -> float:
        workdir = arguments.workdir / f"{method}-lr{peak_lr:g}-scale{scale:g}"
        command = [
            sys.executable,
            str(ROOT / "train.py"),
            f"--config={arguments.config}:method={method}",
            f"--config.schedule.peak_lr={peak_lr}",
            f"--config.{KNOB[method]}={scale}",
            "--config.eval_every_steps=0",
            "--config.checkpoint_every_steps=0",
            f"--workdir={workdir}",
        ]
        core = cores.get()
        try:
            done = subprocess.run(
                command,
                check=False,
                stdout=subprocess.DEVNULL,
                preexec_fn=lambda: os.sched_setaffinity(0, {core}),
            )
        finally:
            cores.put(core)
        loss = final_eval_loss(workdir) if done.returncode == 0 else float("nan")
        print(f"{method} peak_lr={peak_lr:g} scale={scale:g}: eval loss {loss:.4f}", flush=True)
        return loss

    grid: list[tuple[str, float, float]] = [
        (method, peak_lr, scale)
        for method in KNOB
        for peak_lr in arguments.peak_lr
        for scale in arguments.scale
    ]
    with concurrent.futures.ThreadPoolExecutor(arguments.jobs) as pool:
        losses = dict(zip(grid, pool.map(lambda point: run(*point), grid), strict=True))
    command = shlex.join(["python", "benchmarks/sweep.py", *sys.argv[1:]])
    arguments.out.write_text(
        f"# GaLore and full gradients over one grid: {arguments.config}\n\n    {command}\n\n"
        f"One seed, jax {importlib.metadata.version('jax')}. The best of each grid is in bold.\n\n"
        + table(losses, arguments.peak_lr, arguments.scale)
    )


def table(
    losses: dict[tuple[str, float, float], float], peak_lrs: list[float], scales: list[float]
) -> str:
    lines = []
    for method, knob in KNOB.items():
        lines += [f"## method={method}: eval loss, nats a token", ""]
        lines += ["| peak_lr \\ " + knob + " | " + " | ".join(f"{s:g}" for s in scales) + " |"]
        lines += ["|---" * (len(scales) + 1) + "|"]
        best = min(loss for (m, _, _), loss in losses.items() if m == method)
        for peak_lr in peak_lrs:
            row = [losses[method, peak_lr, scale] for scale in scales]
            cells = [f"**{x:.4f}**" if x == best else f"{x:.4f}" for x in row]
            lines.append(f"| {peak_lr:g} | " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    main()
