"""A run's folder: one process at a time, and one config for all of them."""

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from galore_jax.data.tokenizer import Tokenizer
from galore_jax.errors import UserError
from galore_jax.folders import complete_or_absent
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
    """Locks the folder, made if it is missing, for this process.

    Raises:
      UserError: it holds a run of another config (the message says what differs), or another
        process has locked it; nothing in it is changed.
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
    """Returns the config as JSON values."""
    return json.loads(config.to_json_best_effort())


def check_writable(workdir: Path) -> None:
    """Checks before a run that its files can be written; to read a complete one, none need be.

    Raises:
      UserError: the folder or its checkpoints are read-only, or a folder has the name of a file.
    """
    for folder in (workdir, workdir / "checkpoints"):
        if not os.access(folder, os.W_OK):
            raise UserError(f"cannot write to {folder}: it is read-only; give another --workdir")
    for name in ("config.json", "versions.json", "metrics.jsonl"):
        if (workdir / name).is_dir():
            raise UserError(f"{workdir / name} is a folder; remove it, or give another --workdir")


def keep_tokenizer(workdir: Path, tokenizer: Tokenizer) -> None:
    """Copies the tokenizer to the workdir, so that the run can be used wherever it is moved."""
    if not (workdir / "tokenizer").exists():
        with complete_or_absent(workdir / "tokenizer") as folder:
            tokenizer.copy(folder)


def _check_same_run(workdir: Path, wanted: Mapping[str, Any]) -> None:
    record = workdir / "config.json"
    if not record.exists():  # killed before its first step, if it is a run at all
        checkpoints = [path for path in workdir.glob("checkpoints/*") if path.name.isdecimal()]
        if checkpoints or (workdir / "metrics.jsonl").exists():
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
    new, old = dict(flat_items(wanted)), dict(flat_items(found))
    differing = [
        f"{key} is {old.get(key)!r} there and {new.get(key)!r} here"
        for key in sorted(new.keys() | old.keys())
        if new.get(key) != old.get(key) and key not in _FREE
    ]
    if differing:
        more = f", and {len(differing) - 4} more" if len(differing) > 4 else ""
        raise UserError(
            f"--workdir={workdir} holds another config's run: {'; '.join(differing[:4])}{more}; "
            "give another --workdir, or the same config to resume"
        )
