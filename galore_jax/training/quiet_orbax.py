"""No noise from Orbax's threads, above all after a failure, which the caller gets anyway."""

import logging
import os
import sys
import warnings
from typing import Any


def quiet_orbax() -> None:
    """Drops what Orbax's threads print."""
    for name in ("absl", "asyncio"):
        logging.getLogger(name).addFilter(_is_news)
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
    if sys.unraisablehook is sys.__unraisablehook__:
        sys.unraisablehook = _print_unraisable


def _is_news(record: logging.LogRecord) -> bool:
    unretrieved = record.name == "asyncio" and "was never retrieved" in record.getMessage()
    return not (unretrieved or f"{os.sep}orbax{os.sep}" in record.pathname)


def _print_unraisable(unraisable: Any) -> None:
    if str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)
