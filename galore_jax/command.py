"""What the commands of this package have in common: flags, one-line errors and exit codes."""

import argparse
import difflib
import os
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

import jax

from galore_jax.errors import UserError
from galore_jax.quiet_cuda import quiet_cuda


class Flags(argparse.ArgumentParser):
    """Flags ``--NAME=VALUE``, wrong ones a ``UserError``; ``--help`` prints a text as it is.

    Args:
      usage_text: the help, a module's docstring.
    """

    def __init__(self, usage_text: str):
        super().__init__(add_help=False, allow_abbrev=False)
        self._usage_text = usage_text
        self.add_argument("--help", "-h", action="store_true")

    def parse(self, arguments: Sequence[str]) -> argparse.Namespace | None:
        """Parses a command's arguments; None after printing the help that was asked for.

        Raises:
          UserError: an unknown flag, or a value of the wrong type.
        """
        found, unknown = self.parse_known_args(arguments)
        if found.help:
            print(self._usage_text.strip())
            return None
        if unknown:
            known = [flag for flag in self._option_string_actions if flag.startswith("--")]
            near = difflib.get_close_matches(unknown[0].partition("=")[0], known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"flags are {', '.join(known)}"
            raise UserError(f"unknown argument {unknown[0]!r}; {hint}")
        return found

    def error(self, message: str) -> NoReturn:
        """Raises what argparse would print with the usage."""
        raise UserError(message.removeprefix("argument "))


def run_command(body: Callable[[], int | None]) -> int:
    """Runs a command's body and returns the exit code: 0, or what the body returns.

    2 after a ``UserError``, told on stderr in one line; 130 if interrupted; 141 where a reader such
    as ``head`` has closed the pipe.
    """
    try:
        with quiet_cuda():
            jax.devices()
        code = body() or 0
        sys.stdout.flush()
        return code
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
