"""A polite end: SIGTERM, SIGINT and SIGHUP ask the loop to stop; a second SIGINT ends at once."""

import os
import signal
import sys
import threading
from types import FrameType

_SHOW_CURSOR = b"\x1b[?25h"


class StopRequest:
    """Catches SIGTERM, SIGINT and SIGHUP while its block runs.

    A second SIGINT ends the process at once, with exit code 130, as a SIGKILL would: what was saved
    stays. A thread does it, because the main thread does not come to its handlers while XLA
    compiles, and an exception there would leave compiling threads behind, which crash the exit.

    Attributes:
      name: the signal that came, such as ``"SIGTERM"``; None before one has.
    """

    def __init__(self):
        self.name: str | None = None

    @property
    def requested(self) -> bool:
        """Whether a signal has come."""
        return self.name is not None

    def __enter__(self) -> "StopRequest":
        self._terminals = [s for s in (sys.stdout, sys.stderr) if s.isatty()]  # once hung up, not
        reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        threading.Thread(target=self._watch, args=(reader,), daemon=True).start()
        self._fd_before = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        caught = [signal.SIGTERM, signal.SIGINT]
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as under nohup
            caught.append(signal.SIGHUP)
        self._before = {number: signal.signal(number, self._note) for number in caught}
        return self

    def __exit__(self, *exc_info: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._fd_before)
        os.close(self._writer)  # ends the thread

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.name = signal.Signals(number).name
        if number == signal.SIGHUP:  # the terminal is gone: writing to it would fail
            for stream in self._terminals:
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())

    def _watch(self, reader: int) -> None:
        """Reads the number of each signal, which Python writes as soon as it comes."""
        stopping = False
        while number := os.read(reader, 1):
            if number[0] == signal.SIGINT and stopping:
                for stream in self._terminals:
                    os.write(stream.fileno(), _SHOW_CURSOR)
                os.write(2, b"interrupted at once; run the same command again to go on\n")
                os._exit(130)
            if number[0] == signal.SIGINT:
                print(
                    "stopping as soon as it can be saved; Ctrl-C again ends at once",
                    file=sys.stderr,
                )
            stopping = stopping or number[0] in self._before
        os.close(reader)
