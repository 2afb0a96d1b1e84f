"""The folder of a run: whose it is, and what differs if it is another run's."""

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from galore_jax.errors import UserError
from galore_jax.training.config import Config, flat_items

# Keys that leave every weight of a run as it is: they may change when it is resumed.
_FREE = frozenset(
    {
        "keep_checkpoints",
        "checkpoint_every_steps",
        "log_every_steps",
        "eval_every_steps",
        "eval_tokens",
        "tensorboard",
    }
)


@contextmanager
def claim(workdir: Path, config: Config) -> Iterator[None]:
    """Holds the folder, made if it is missing, for one process.

    Raises:
      UserError: it holds a run of another config (what differs is told), or is held by another
        process; nothing in it is changed.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        folder = os.open(workdir, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise UserError(f"cannot use --workdir={workdir}: {error.strerror}") from error
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"--workdir={workdir} is in use by another process; wait for it, or give another"
            ) from error
        _check_same_run(workdir, config_json(config))
        yield
    finally:
        os.close(folder)


def config_json(config: Config) -> dict[str, Any]:
    """The config as JSON values."""
    return json.loads(config.to_json_best_effort())


def _check_same_run(workdir: Path, wanted: Mapping[str, Any]) -> None:
    record = workdir / "config.json"
    if not record.exists():
        if (workdir / "checkpoints").exists() or (workdir / "metrics.jsonl").exists():
            raise UserError(
                f"--workdir={workdir} holds a run without its config.json; give another folder"
            )
        return
    try:
        found = json.loads(record.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{record} cannot be read ({error}); give another --workdir") from error
    if not isinstance(found, dict):
        raise UserError(f"{record} is no config of a run; give another --workdir")
    here, there = dict(flat_items(wanted)), dict(flat_items(found))
    differing = [
        f"{key} is {there.get(key)!r} there and {here.get(key)!r} here"
        for key in sorted(here.keys() | there.keys())
        if here.get(key) != there.get(key) and key not in _FREE
    ]
    if differing:
        more = f", and {len(differing) - 4} more" if len(differing) > 4 else ""
        raise UserError(
            f"--workdir={workdir} holds another config's run: {'; '.join(differing[:4])}{more}; "
            "give another --workdir, or the same config to resume"
        )
