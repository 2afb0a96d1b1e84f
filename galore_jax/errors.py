"""Errors that the user can put right, and checks of whole numbers."""

import numbers
from typing import Any

import jax


class UserError(Exception):
    """Something the user can put right, told in one line: what was wrong, and what would be right.

    The trainer prints the message after ``error:`` and exits with code 2, without a traceback.
    """


def check_rank(rank: Any, where: str = "") -> None:
    """Raises TypeError or ValueError unless ``rank`` is an int of at least 1."""
    traced = "; a rank sets shapes, so for optax.inject_hyperparams name it in static_args"
    check_int(f"rank{where}", rank, 1, hint=traced if isinstance(rank, jax.Array) else "")


def check_int(name: str, value: Any, least: int, *, hint: str = "") -> None:
    """Raises TypeError or ValueError unless ``value`` is an int of at least ``least``."""
    if not isinstance(value, numbers.Integral) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int of at least {least}, got {value!r}{hint}")
    if value < least:
        raise ValueError(f"{name} must be an int of at least {least}, got {value}")
