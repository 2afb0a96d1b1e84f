"""Sweeps GaLore and full-rank training over one grid of learning rates, and writes a table.

  python benchmarks/sweep.py --out=docs/sweep_sample.md

Each run is ``train.py`` with overrides in a folder of its own under ``--workdir``: a sweep that is
interrupted goes on where it was.
"""

import argparse
import importlib.metadata
import itertools
import shlex
import sys
from pathlib import Path

from sample_runs import final_eval_loss, train

KNOB = {"galore": "galore.scale", "full": "optimizer.matrix_lr_scale"}


def eval_loss(config: str, workdir: Path, method: str, peak_lr: float, scale: float) -> float:
    overrides = {"schedule.peak_lr": peak_lr, KNOB[method]: scale}
    if train(f"{config}:method={method}", workdir, overrides) != 0:
        return float("inf")  # it diverged, and has said so
    return final_eval_loss(workdir)


def table(losses: dict[tuple[float, float], float], method: str) -> list[str]:
    peak_lrs, scales = (sorted(set(values)) for values in zip(*losses, strict=True))
    lines = [
        f"## method={method}: eval loss, nats a token",
        "",
        f"| peak_lr \\ {KNOB[method]} | " + " | ".join(f"{scale:g}" for scale in scales) + " |",
        "|---" * (len(scales) + 1) + "|",
    ]
    best = min(losses.values())
    for peak_lr in peak_lrs:
        row = [losses[peak_lr, scale] for scale in scales]
        cells = [f"**{loss:.4f}**" if loss == best else f"{loss:.4f}" for loss in row]
        lines.append(f"| {peak_lr:g} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--config", default="configs/sample.py")
    parser.add_argument("--peak_lr", type=float, nargs="+", default=[0.01, 0.02, 0.04])
    parser.add_argument("--scale", type=float, nargs="+", default=[0.03125, 0.0625, 0.125])
    parser.add_argument("--workdir", type=Path, default=Path("runs/sweep"))
    parser.add_argument("--out", type=Path, required=True, help="the Markdown table to write")
    arguments = parser.parse_args()
    arguments.out.parent.mkdir(parents=True, exist_ok=True)

    lines = [
        f"# GaLore and full gradients over one grid: {arguments.config}",
        "",
        "    " + shlex.join(["python", "benchmarks/sweep.py", *sys.argv[1:]]),
        "",
        f"One seed, jax {importlib.metadata.version('jax')}. The best of each grid is in bold.",
        "",
    ]
    for method in KNOB:
        losses = {}
        for peak_lr, scale in itertools.product(arguments.peak_lr, arguments.scale):
            workdir = arguments.workdir / f"{method}-lr{peak_lr:g}-scale{scale:g}"
            loss = eval_loss(arguments.config, workdir, method, peak_lr, scale)
            losses[peak_lr, scale] = loss
            print(f"{method} peak_lr={peak_lr:g} scale={scale:g}: eval loss {loss:.4f}", flush=True)
        lines += table(losses, method)
    arguments.out.write_text("\n".join(lines))


if __name__ == "__main__":
    main()
