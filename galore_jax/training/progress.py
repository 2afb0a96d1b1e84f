"""How far a run has come: a bar on a terminal, plain lines in a file or a pipe."""

import collections
import time
from collections.abc import Callable

import rich.progress
from rich.console import Console
from rich.table import Column
from rich.text import Text

_WINDOW_SECONDS = 60.0
_WINDOW_SAMPLES = 8
_NARROWEST_BAR = 4


def format_duration(seconds: float | None) -> str:
    """Hours, minutes and seconds; dashes for a duration not known yet.

    >>> format_duration(83.4), format_duration(360_000), format_duration(None)
    ('0:01:23', '100:00:00', '-:--:--')
    """
    if seconds is None:
        return "-:--:--"
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"


def format_count(count: float) -> str:
    """Three digits or so, and a suffix for thousands, millions and so on.

    >>> [format_count(n) for n in (0, 7.25, 999, 12_345, 999_999, 3.2e9)]
    ['0', '7.2', '999', '12.3k', '1.0M', '3.2G']
    """
    for suffix in ("", "k", "M", "G"):
        if round(count, 1) < 1000 or suffix == "G":
            break
        count /= 1000
    digits = 0 if not suffix and (count >= 100 or count == int(count)) else 1
    return f"{count:.{digits}f}{suffix}"


class Progress:
    """Shows the run's step, loss, learning rate, speed and time left on standard output.

    On a terminal that is a bar at the bottom, with everything else printed above it; otherwise one
    plain line for each `update` that brings a loss. A context manager: the terminal is put right
    again however the block is left.

    The time left is the pace of the last minute of updates times the steps that remain. The time
    before the first update is no part of it.

    Args:
      total: The run's last step.
      start: The step that the run resumes from.
      console: Where to write; standard output by default.
      clock: Seconds from any origin.

    >>> import sys
    >>> with Progress(1000, console=Console(file=sys.stdout)) as progress:
    ...     progress.update(200, loss=5.12345, learning_rate=0.01, tokens_per_second=12_345)
    step  200/1000  loss 5.1235  lr 1.00e-02  12.3k tokens/s  ETA -:--:--
    """

    def __init__(
        self,
        total: int,
        *,
        start: int = 0,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._total = total
        self._step = start
        self._console = Console() if console is None else console
        self._clock = clock
        self._begun = clock()
        self._samples: collections.deque[tuple[int, float]] = collections.deque()
        self._loss: float | None = None
        self._learning_rate: float | None = None
        self._tokens_per_second: float | None = None
        self._bar = None
        if self._console.is_terminal and not self._console.is_dumb_terminal:
            self._bar = rich.progress.Progress(
                rich.progress.BarColumn(bar_width=None, table_column=Column(ratio=1)),
                _Status(self._status),
                console=self._console,
                expand=True,
                refresh_per_second=2,
            )
            self._task = self._bar.add_task("", total=total, completed=start)

    def __enter__(self) -> "Progress":
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(
        self,
        step: int,
        *,
        loss: float | None = None,
        learning_rate: float | None = None,
        tokens_per_second: float | None = None,
    ) -> None:
        """Moves on to `step`; with a loss, shows the numbers given and, off a terminal, a line."""
        now = self._clock()
        self._step = step
        self._samples.append((step, now))
        while len(self._samples) > _WINDOW_SAMPLES and now - self._samples[1][1] >= _WINDOW_SECONDS:
            self._samples.popleft()
        if loss is not None:
            self._loss = loss
            self._learning_rate = learning_rate
            self._tokens_per_second = tokens_per_second
        if self._bar is not None:
            self._bar.update(self._task, completed=step)
        elif loss is not None:
            fields = self._fields(" tokens/s")
            del fields["elapsed"]
            self.message("step " + "  ".join(fields.values()))

    def message(self, text: str) -> None:
        """Prints `text`, as it is, above the bar."""
        if self._bar is not None:
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            print(text, file=self._console.file, flush=True)

    def seconds_left(self) -> float | None:
        """Seconds until the last step at the recent pace; None while there is none to go by."""
        if self._step >= self._total:
            return 0.0
        if not self._samples or self._samples[-1][0] <= self._samples[0][0]:
            return None
        (first, begun), (last, now) = self._samples[0], self._samples[-1]
        return (self._total - last) * (now - begun) / (last - first)

    def _fields(self, speed_unit: str) -> dict[str, str]:
        width = len(str(self._total))
        fields = {"step": f"{self._step:>{width}}/{self._total}"}
        if self._loss is not None:
            fields["loss"] = f"loss {self._loss:.4f}"
        if self._learning_rate is not None:
            fields["lr"] = f"lr {self._learning_rate:.2e}"
        if self._tokens_per_second is not None:
            fields["speed"] = format_count(self._tokens_per_second) + speed_unit
        fields["elapsed"] = format_duration(self._clock() - self._begun)
        fields["left"] = f"ETA {format_duration(self.seconds_left())}"
        return fields

    def _status(self) -> str:
        """The numbers beside the bar, the least telling ones left out where space is short."""
        fields = self._fields(" tok/s")
        for name in ("elapsed", "lr", "speed", "left", "loss"):
            if len("  ".join(fields.values())) + 1 + _NARROWEST_BAR <= self._console.width:
                break
            fields.pop(name, None)
        return "  ".join(fields.values())


class _Status(rich.progress.ProgressColumn):
    """Text made anew at each refresh, so that the elapsed time runs on between updates."""

    def __init__(self, make: Callable[[], str]):
        super().__init__(table_column=Column(no_wrap=True))
        self._make = make

    def render(self, task: rich.progress.Task) -> Text:
        return Text(self._make(), no_wrap=True)
