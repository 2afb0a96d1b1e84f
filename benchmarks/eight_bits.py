"""Trains with 8-bit states and projectors, and bfloat16 or int8 weights, and writes a table.

  python benchmarks/eight_bits.py --out=docs/eight_bits_sample.md

Each run is ``train.py`` with overrides in a folder of its own under ``--workdir``: what is complete
is not run again. A difference is that of the same seed's run with float32 states.
"""

import argparse
import importlib.metadata
import shlex
import sys
from pathlib import Path
from typing import NamedTuple

from sample_runs import final_eval_loss, train

BF16: dict[str, object] = {"param_dtype": "bfloat16"}
INT8: dict[str, object] = {"param_dtype": "int8"}


class Variant(NamedTuple):
    """A row of the table.

    Attributes:
      method: what follows the colon of ``--config``.
      overrides: config keys that differ.
      base: the row that it is compared with.
    """

    method: str
    overrides: dict[str, object]
    base: str


VARIANTS = {
    "galore": Variant("method=galore", {}, "galore"),
    "galore, adamw8bit": Variant("method=galore,optimizer=adamw8bit", {}, "galore"),
    "galore, projector in 8 bits": Variant("method=galore", {"galore.projector_bits": 8}, "galore"),
    "galore, projector in 4 bits": Variant("method=galore", {"galore.projector_bits": 4}, "galore"),
    "full": Variant("method=full", {}, "full"),
    "full, adamw8bit": Variant("method=full,optimizer=adamw8bit", {}, "full"),
    "galore, adamw8bit, bfloat16 weights, nearest": Variant(
        "method=galore,optimizer=adamw8bit", BF16, "galore, adamw8bit"
    ),
    "galore, adamw8bit, bfloat16 weights, stochastic": Variant(
        "method=galore,optimizer=adamw8bit",
        {**BF16, "param_rounding": "stochastic"},
        "galore, adamw8bit",
    ),
}
BY_DEFAULT = list(VARIANTS)  # the others are for docs/int8.md
VARIANTS |= {
    "galore, int8 weights": Variant("method=galore", INT8, "galore"),
    "galore, int8 weights, projector in 4 bits": Variant(
        "method=galore", {**INT8, "galore.projector_bits": 4}, "galore, projector in 4 bits"
    ),
    "galore, int8 weights, projector in 4 bits, nearest": Variant(
        "method=galore",
        {**INT8, "galore.projector_bits": 4, "param_rounding": "nearest"},
        "galore, projector in 4 bits",
    ),
    "galore, lazy refreshes": Variant("method=galore", {"galore.lazy_refresh": 0.4}, "galore"),
}


def eval_loss(config: str, workdir: Path, name: str, seed: int) -> float:
    variant = VARIANTS[name]
    folder = workdir / f"{name.replace(', ', '-').replace(' ', '-')}-seed{seed}"
    overrides = {"seed": seed, **variant.overrides}
    if train(f"{config}:{variant.method}", folder, overrides) != 0:
        raise SystemExit(f"{folder}: the run failed")
    return final_eval_loss(folder)


def table(losses: dict[str, list[float]], seeds: list[int]) -> list[str]:
    lines = [
        "| run | compared with | "
        + " | ".join(f"seed {seed} | difference" for seed in seeds)
        + " |",
        "|---" * (2 + 2 * len(seeds)) + "|",
    ]
    for name, of_seeds in losses.items():
        base = VARIANTS[name].base
        cells = [name, "" if base == name else base]
        for loss, reference in zip(of_seeds, losses[base], strict=True):
            cells += [f"{loss:.4f}", "" if base == name else f"{loss - reference:+.4f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--config", default="configs/sample.py")
    parser.add_argument("--runs", choices=VARIANTS, nargs="+", default=BY_DEFAULT)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--workdir", type=Path, default=Path("runs/eight_bits"))
    parser.add_argument("--out", type=Path, required=True, help="the Markdown table to write")
    arguments = parser.parse_args()
    wanted = {name for run in arguments.runs for name in (run, VARIANTS[run].base)}
    losses: dict[str, list[float]] = {name: [] for name in VARIANTS if name in wanted}
    for seed in arguments.seeds:
        for name, of_seeds in losses.items():
            of_seeds.append(eval_loss(arguments.config, arguments.workdir, name, seed))
            print(f"seed {seed} {name}: eval loss {of_seeds[-1]:.4f}", flush=True)
    lines = [
        f"# 8-bit states and bfloat16 weights: {arguments.config}",
        "",
        "    " + shlex.join(["python", "benchmarks/eight_bits.py", *sys.argv[1:]]),
        "",
        f"Held-out loss in nats a token, jax {importlib.metadata.version('jax')}, CPU.",
        "",
        *table(losses, arguments.seeds),
        "",
    ]
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text("\n".join(lines))


if __name__ == "__main__":
    main()
