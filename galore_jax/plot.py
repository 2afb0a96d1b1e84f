r"""Draws a run, or several beside each other: losses, learning rate, tokens a second.

  python -m galore_jax.plot runs/sample-galore-adamw --out=run.png
  python -m galore_jax.plot runs/sample-galore-adamw runs/sample-full-adamw --out=runs.svg

A RUN is the --workdir of train.py, also of a run that is still going on. Training losses are drawn
thin as they were logged and bold as a running mean, held-out losses as points.

flags:
  --out=FILE.png|.svg     the picture (extra: plot)
  --help                  this text
"""

import math
import os
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from galore_jax.command import Flags, run_command
from galore_jax.errors import UserError
from galore_jax.memory.plot import check_path
from galore_jax.training.metrics import read_metrics

_INK, _GREY = "#2b2b2b", "#666666"
# Told apart without red and green, and in print.
_COLOURS = ("#2f87ab", "#d9822b", "#44546a", "#8e5ea2", "#5aa17f", "#b03a2e", "#a79f92", "#c9a227")


class Curves(NamedTuple):
    """What a run logged; arrays are float64, a value that was not finite is NaN.

    Attributes:
      name: what tells the run from the others.
      tokens: tokens so far at each training line, (n,).
      loss: training loss at each, nats a token, (n,).
      learning_rate: of each, (n,).
      speed: tokens a second, (n,).
      eval_tokens: tokens so far at each evaluation, (k,).
      eval_loss: held-out loss of each, nats a token, (k,).
    """

    name: str
    tokens: np.ndarray
    loss: np.ndarray
    learning_rate: np.ndarray
    speed: np.ndarray
    eval_tokens: np.ndarray
    eval_loss: np.ndarray


def read_curves(workdir: Path, name: str) -> Curves:
    """Reads what a run has logged.

    Raises:
      UserError: a folder that is no run, or a run that has not logged an update yet.
    """
    if not (workdir / "metrics.jsonl").is_file():
        raise UserError(
            f"{workdir} is no run: it has no metrics.jsonl; give a --workdir of train.py"
        )
    lines = read_metrics(workdir)
    train = [line for line in lines if "loss" in line and "tokens" in line]
    if not train:
        raise UserError(f"{workdir} has not logged an update yet; try again when it has")
    held_out = [line for line in lines if "eval_loss" in line]

    def column(key: str, of: list[dict[str, Any]]) -> np.ndarray:
        values = np.array([float(line.get(key, math.nan)) for line in of])
        return np.where(np.isfinite(values), values, math.nan)

    # An evaluation has the step alone; at step 0 no tokens were seen.
    steps, tokens = column("step", train), column("tokens", train)
    eval_tokens = np.interp(column("step", held_out), [0.0, *steps], [0.0, *tokens])
    return Curves(
        name=name,
        tokens=tokens,
        loss=column("loss", train),
        learning_rate=column("learning_rate", train),
        speed=column("tokens_per_second", train),
        eval_tokens=eval_tokens,
        eval_loss=column("eval_loss", held_out),
    )


def running_mean(values: np.ndarray, span: float) -> np.ndarray:
    """Returns an exponential mean over about ``span`` values, without bias to the first ones.

    NaN counts for nothing, and stays where it is.

    >>> running_mean(np.array([2.0, 2.0, 2.0]), 10).tolist()
    [2.0, 2.0, 2.0]
    """
    keep = 1 - 1 / max(span, 1.0)
    means, total, weight = np.full(values.shape, math.nan), 0.0, 0.0
    for i, value in enumerate(values):
        if not math.isnan(value):
            total, weight = keep * total + value, keep * weight + 1
            means[i] = total / weight
    return means


def plot(runs: list[Curves], path: Path) -> None:
    """Draws the runs to a .png or .svg file.

    Raises:
      UserError: another kind of file, no such folder, or no matplotlib.
    """
    check_path(path, flag="--out")
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, MaxNLocator

    figure = Figure(figsize=(10.4, 5.2), layout="constrained")
    grid = figure.add_gridspec(2, 2, width_ratios=(2.1, 1))
    loss = figure.add_subplot(grid[:, 0])
    rate = figure.add_subplot(grid[0, 1], sharex=loss)
    speed = figure.add_subplot(grid[1, 1], sharex=loss)
    low, high = _loss_limits(runs)
    for i, run in enumerate(runs):
        colour = _COLOURS[i % len(_COLOURS)]
        style: Any = {"color": colour, "linestyle": "-" if i < len(_COLOURS) else "--"}
        mean = running_mean(run.loss, max(5.0, len(run.loss) / 40))
        loss.plot(run.tokens, run.loss, linewidth=0.6, alpha=0.35, **style)
        loss.plot(run.tokens, mean, linewidth=1.6, label=_label(run), **style)
        marks = {"marker": "o", "markersize": 5, "markeredgecolor": "white", "linestyle": ""}
        # Whole where they touch the frame, but none outside of it.
        points = np.where(run.eval_loss <= high, run.eval_loss, math.nan)
        loss.plot(run.eval_tokens, points, color=colour, zorder=3, clip_on=False, **marks)
        rate.plot(run.tokens, run.learning_rate, linewidth=1.4, **style)
        speed.plot(run.tokens, run.speed, linewidth=1.2, **style)
    loss.set_ylim(low, high)
    # Perplexities are as readers of papers know them.
    perplexity = loss.secondary_yaxis("right", functions=(np.exp, _log))
    perplexity.set_ylabel("perplexity", color=_GREY)
    legend = loss.legend(frameon=False, loc="upper right", title="last held-out loss (points)")
    legend.get_title().set_color(_GREY)
    for axes, title in (
        (loss, "loss, nats a token"),
        (rate, "learning rate"),
        (speed, "tokens a second"),
    ):
        axes.set_title(title, loc="left", fontsize=11, color=_INK)
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.xaxis.set_major_locator(MaxNLocator(7 if axes is loss else 4))
        axes.set_xlim(0, max(run.tokens[-1] for run in runs))
        axes.grid(True, color="#e8e8e8")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color("#b8b8b8")
        axes.tick_params(length=0, labelcolor=_INK)
    perplexity.spines[:].set_visible(False)
    perplexity.tick_params(length=0, labelcolor=_GREY)
    rate.tick_params(labelbottom=False)
    rate.set_ylim(bottom=0)
    speed.set_ylim(bottom=0)
    speed.yaxis.set_major_formatter(EngFormatter(sep=""))
    loss.set_xlabel("tokens", color=_GREY)
    speed.set_xlabel("tokens", color=_GREY)
    try:
        figure.savefig(path, dpi=160, facecolor="white")
    except OSError as error:
        raise UserError(f"--out={path} cannot be written: {error.strerror}") from error


def names(workdirs: list[Path]) -> list[str]:
    """Returns the shortest ends of the paths that tell the runs apart.

    >>> names([Path("a/lr1/run"), Path("a/lr2/run")])
    ['lr1/run', 'lr2/run']
    """
    parts = [Path(os.path.abspath(path)).parts for path in workdirs]
    most = max(map(len, parts))
    for count in range(1, most + 1):
        short = ["/".join(each[-count:]) for each in parts]
        if len(set(short)) == len(set(parts)):
            return short
    return ["/".join(each) for each in parts]


def _label(run: Curves) -> str:
    finite = run.eval_loss[np.isfinite(run.eval_loss)]
    return f"{run.name}: {finite[-1]:.3f}" if finite.size else run.name


def _loss_limits(runs: list[Curves]) -> tuple[float, float]:
    """Leaves out the first fall from the loss of guessing, which would press the rest together."""
    late = [run.loss[run.tokens >= 0.1 * run.tokens[-1]] for run in runs]
    shown = np.concatenate([*late, *(run.eval_loss[1:] for run in runs)])
    shown = shown[np.isfinite(shown)]
    if not shown.size:
        return 0.0, 1.0
    low, high = shown.min(), np.quantile(shown, 0.995)
    margin = 0.05 * (high - low) or 0.1
    return low - margin, high + margin


def _log(perplexity: Any) -> Any:
    return np.log(np.maximum(perplexity, 1e-9))


def main(argv: list[str]) -> int:
    """The command; see the module's text for its flags, and ``run_command`` for exit codes."""
    return run_command(lambda: _run(argv[1:]))


def _run(arguments: list[str]) -> None:
    flags = Flags(__doc__ or "")
    flags.add_argument("runs", nargs="*", type=Path)
    flags.add_argument("--out", type=Path)
    given = flags.parse(arguments)
    if given is None:
        return
    if not given.runs or given.out is None:
        raise UserError("give one RUN or more, and --out=FILE.png; --help tells more")
    check_path(given.out, flag="--out")
    runs = map(read_curves, given.runs, names(given.runs))
    plot(list(runs), given.out)
    print(f"written: {given.out}")


if __name__ == "__main__":
    sys.exit(main(sys.argv))
