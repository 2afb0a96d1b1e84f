"""Trains with each projector, from several seeds, and writes a table.

  python benchmarks/projectors.py --out=docs/projectors_sample.md   (some three hours on two cores)

Each run is ``train.py`` with overrides in a folder of its own under ``--workdir``: what is complete
is not run again.
"""

import argparse
import importlib.metadata
import itertools
import shlex
import statistics
import sys
from pathlib import Path
from typing import NamedTuple

from sample_runs import final_eval_loss, train

# projector, update_proj_gap, and whether first moments are rotated
RUNS = (
    "svd:50",
    "eigh:50",
    "subspace_iteration:50",
    "subspace_iteration:10",
    "subspace_iteration:10:rotate",
    "eigh:10",
    "eigh:10:rotate",
    "subspace_iteration:50:rotate",
    "randomized:50",
    "random:50",
    "eigh:50:rotate",
)


class Variant(NamedTuple):
    """A row of the table."""

    projector: str
    gap: int
    rotate: bool

    @classmethod
    def parse(cls, text: str) -> "Variant":
        """From ``PROJECTOR:GAP`` or ``PROJECTOR:GAP:rotate``."""
        projector, gap, *rest = text.split(":")
        if rest not in ([], ["rotate"]):
            raise ValueError(f"{text!r} is not PROJECTOR:GAP or PROJECTOR:GAP:rotate")
        return cls(projector, int(gap), bool(rest))


def eval_loss(config: str, workdir: Path, variant: Variant, seed: int) -> float:
    folder = workdir / f"{variant.projector}-T{variant.gap}-rotate{variant.rotate}-seed{seed}"
    overrides = {
        "seed": seed,
        "galore.projector": variant.projector,
        "galore.update_proj_gap": variant.gap,
        "galore.rotate_moments": variant.rotate,
    }
    if train(config, folder, overrides) != 0:
        raise SystemExit(f"{folder}: the run failed")
    return final_eval_loss(folder)


def row(variant: Variant, losses: list[float], base: float) -> str:
    mean = statistics.mean(losses)
    spread = statistics.stdev(losses) if len(losses) > 1 else float("nan")
    cells = [
        variant.projector,
        str(variant.gap),
        "yes" if variant.rotate else "no",
        *(f"{loss:.4f}" for loss in losses),
        f"{mean:.4f}",
        f"{spread:.4f}",
        f"{mean - base:+.4f}",
    ]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--config", default="configs/sample.py")
    parser.add_argument("--runs", type=Variant.parse, nargs="+", help="PROJECTOR:GAP[:rotate]")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--workdir", type=Path, default=Path("runs/projectors"))
    parser.add_argument("--out", type=Path, required=True, help="the Markdown table to write")
    arguments = parser.parse_args()
    arguments.out.parent.mkdir(parents=True, exist_ok=True)

    table: dict[Variant, list[float]] = {v: [] for v in arguments.runs or map(Variant.parse, RUNS)}
    for seed, (variant, losses) in itertools.product(arguments.seeds, table.items()):
        losses.append(eval_loss(arguments.config, arguments.workdir, variant, seed))
        print(f"seed {seed} {variant}: eval loss {losses[-1]:.4f}", flush=True)
        seeds = arguments.seeds[: len(losses)]
        base = statistics.mean(next(iter(table.values())))
        lines = [
            f"# Training with each projector: {arguments.config}",
            "",
            "    " + shlex.join(["python", "benchmarks/projectors.py", *sys.argv[1:]]),
            "",
            f"Held-out loss in nats a token, jax {importlib.metadata.version('jax')}, CPU.",
            "Mean and standard deviation over the seeds; difference of the mean from the first's.",
            "",
            "| projector | T | rotated moments | "
            + " | ".join(f"seed {s}" for s in seeds)
            + " | mean | standard deviation | difference |",
            "|---" * (len(seeds) + 6) + "|",
            *(row(v, found, base) for v, found in table.items() if len(found) == len(losses)),
            "",
        ]
        arguments.out.write_text("\n".join(lines))


if __name__ == "__main__":
    main()
