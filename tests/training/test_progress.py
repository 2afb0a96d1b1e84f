"""The bar fits the terminal and leaves it as it was; lines off a terminal can be read by grep."""

import io
import os
import pty
import re
import signal
import subprocess
import sys

import pytest
from rich.console import Console

from galore_jax.training.progress import Progress

SHOW_CURSOR = "\x1b[?25h"
HIDE_CURSOR = "\x1b[?25l"


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def terminal(width=80, **options):
    return Console(file=io.StringIO(), force_terminal=True, width=width, _environ={}, **options)


def plain():
    return Console(file=io.StringIO(), width=40)


def text_of(console):
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", console.file.getvalue())


NUMBERS = {"loss": 5.1234, "learning_rate": 0.01, "tokens_per_second": 12345.0}


def test_plain_lines_are_whole_and_free_of_escapes(capsys):
    """Rich wraps at 80 columns, or at 40 here, even when nothing reads the output but a file."""
    console = plain()
    with Progress(1000, console=console) as progress:
        progress.update(200)
        progress.update(200, **NUMBERS)
        progress.message(
            "[bold] saved /a/very/long/path/that/is/longer/than/the/console " + "x" * 80
        )
    lines = console.file.getvalue().splitlines()
    assert lines[0] == "step  200/1000  loss 5.1234  lr 1.00e-02  12.3k tokens/s  ETA -:--:--"
    assert lines[1].startswith("[bold] saved")
    assert len(lines) == 2


def test_time_left_leaves_out_compilation_and_the_steps_before_a_resume():
    clock = Clock()
    progress = Progress(1000, start=600, console=plain(), clock=clock)
    assert progress.seconds_left() is None
    clock.now += 300  # compiles, then runs the first ten steps
    progress.update(610)
    assert progress.seconds_left() is None
    clock.now += 20
    progress.update(620)
    assert progress.seconds_left() == pytest.approx(380 * 2)
    clock.now += 20
    progress.update(630)
    assert progress.seconds_left() == pytest.approx(370 * 2)
    progress.update(1000)
    assert progress.seconds_left() == 0


def test_time_left_follows_a_change_of_pace():
    clock = Clock()
    progress = Progress(10_000, console=plain(), clock=clock)
    for step in range(200):
        clock.now += 1 if step < 100 else 5
        progress.update(step)
    assert progress.seconds_left() == pytest.approx((10_000 - 199) * 5)


@pytest.mark.parametrize("total", [1000, 150_000])
def test_bar_fits_eighty_columns_with_everything_on_it(total):
    console = terminal(80)
    with Progress(total, console=console) as progress:
        progress.update(total // 2, **NUMBERS)
    last = text_of(console).rstrip().splitlines()[-1]
    assert len(last) <= 80
    wanted = [
        f"{total // 2}/{total}",
        "loss 5.1234",
        "lr 1.00e-02",
        "12.3k tok/s",
        "0:00:00",
        "ETA",
    ]
    assert [part for part in wanted if part not in last] == []
    assert "━" in last


@pytest.mark.parametrize("width", [20, 40, 60])
def test_narrow_terminal_gets_one_line_with_the_step(width):
    console = terminal(width)
    with Progress(1000, console=console) as progress:
        progress.update(500, **NUMBERS)
    lines = text_of(console).rstrip().splitlines()
    assert all(len(line) <= width for line in lines)
    assert "500/1000" in lines[-1]
    assert "…" not in lines[-1]


def test_message_is_printed_as_it_is():
    """A path in brackets must not be eaten as markup."""
    console = terminal()
    with Progress(10, console=console) as progress:
        progress.message("saved [red]/tmp/x[/red] at 3")
    assert "saved [red]/tmp/x[/red] at 3" in text_of(console)


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, RuntimeError])
def test_terminal_is_put_right_whatever_happens(error):
    console = terminal()
    with pytest.raises(error), Progress(10, console=console):
        raise error
    written = console.file.getvalue()
    assert written.rindex(SHOW_CURSOR) > written.rindex(HIDE_CURSOR)


def test_no_color_is_honoured():
    console = Console(
        file=io.StringIO(),
        force_terminal=True,
        width=80,
        _environ={"NO_COLOR": "1", "TERM": "xterm"},
    )
    with Progress(10, console=console) as progress:
        progress.update(5, **NUMBERS)
    assert re.findall(r"\x1b\[[0-9;]*3[0-9][0-9;]*m", console.file.getvalue()) == []


ON_A_TERMINAL = """
import signal, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job inherits none
from galore_jax.training.progress import Progress
with Progress(100) as progress:
    progress.update(10, loss=3.0, learning_rate=0.01, tokens_per_second=1000.0)
    print("printed by others")
    progress.message("half way")
    while True:
        time.sleep(0.01)
"""


@pytest.mark.parametrize(("term", "bar"), [("xterm", True), ("dumb", False)])
def test_interrupted_on_a_real_terminal(term, bar):
    controller, worker = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", ON_A_TERMINAL],
        stdout=worker,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "TERM": term, "COLUMNS": "80"},
    )
    os.close(worker)
    written = b""
    while b"half way" not in written:
        written += os.read(controller, 4096)
    process.send_signal(signal.SIGINT)
    try:
        while chunk := os.read(controller, 4096):
            written += chunk
    except OSError:  # how Linux tells that the other side is closed
        pass
    os.close(controller)
    process.wait(timeout=10)
    written = written.decode()
    assert "printed by others" in written
    assert "loss 3.0000" in written
    assert (HIDE_CURSOR in written) == bar
    if bar:
        assert written.rindex(SHOW_CURSOR) > written.rindex(HIDE_CURSOR)
