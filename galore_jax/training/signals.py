"""A polite end: SIGTERM and SIGINT ask the loop to stop."""

import signal
from types import FrameType


class StopRequest:
    """Catches SIGTERM and SIGINT while its block runs; a second SIGINT interrupts at once.

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
        self._before = {n: signal.signal(n, self._note) for n in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *exc_info: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.name = signal.Signals(number).name
