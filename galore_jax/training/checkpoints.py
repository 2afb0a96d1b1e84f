"""Checkpoints that survive a kill, a full disk and a damaged file.

Orbax writes them: step folders, renamed into place once complete, the last few kept. What is
added here, because Orbax leaves it open (each was tried):

- Orbax casts a restored array to the dtype asked for, without a word. Every leaf's shape and dtype
  are compared with the model's first.
- A flipped bit inside array data goes unnoticed. Every leaf's CRC-32 is saved and checked.
- Any damage at all surfaces as one exception, as does a tree that does not fit. The two are told
  apart: damage falls back to the checkpoint before, a misfit is the user's to put right.
"""

import contextlib
import dataclasses
import errno
import json
import logging
import os
import shutil
import sys
import textwrap
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import traverse_util
from orbax.checkpoint import v1 as ocp

from galore_jax.errors import UserError

_logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Restored:
    """What `Checkpoints.restore` found: the step, the state on the device, the JSON `data`."""

    step: int
    state: Any
    data: dict[str, Any]


class _Unreadable(Exception):
    """The files of one checkpoint are damaged; the message says how, in a few words."""


class Checkpoints:
    """A folder of numbered checkpoints, of which the last `keep` stay.

    Each step's folder is an Orbax checkpoint of three checkpointables: `state`, the arrays as
    nested dicts named like the pytree's paths; `data`, the JSON dict given to `save`; and `leaves`,
    the shape, dtype and CRC-32 of every array. One process at a time may have the folder open:
    opening it removes what a killed save left half-written.

    Args:
      directory: The folder, made if it is missing. Local.
      keep: How many checkpoints stay; at least 1. An older one goes only after a newer is complete.
      warn: Called with one line for each damaged checkpoint that `restore` passes over.

    Raises:
      UserError: `keep` is not at least 1, or the folder cannot be made or written.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        keep: int,
        warn: Callable[[str], object] = _logger.warning,
    ):
        if keep < 1:
            raise UserError(f"checkpoints to keep must be at least 1, not {keep}")
        self.directory = Path(directory).absolute()
        self._warn = warn
        self._damaged: list[int] = []
        self._pending: tuple[int, int] | None = None  # step and bytes of the save under way

        _hush_orbax()
        registry = ocp.handlers.local_registry()
        for name in ("data", "leaves"):  # a dict of numbers would else be saved as arrays
            registry.add(ocp.handlers.JsonHandler, checkpointable_name=name)
        context = ocp.Context()
        context.checkpointables.registry = registry
        context.memory.deepcopy_host_arrays = False  # `save` hands over arrays of its own
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._remove_partial()  # Orbax would do it behind the back of a first `restore`
            self._checkpointer = ocp.training.Checkpointer(
                str(self.directory),
                context=context,
                preservation_policy=ocp.training.preservation_policies.LatestN(keep),  # pyright: ignore[reportArgumentType]
            )
        except OSError as error:
            raise UserError(
                f"cannot use {self.directory} for checkpoints: {error.strerror}"
            ) from error

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """Waits for the save under way and lets go of the folder; raises what `wait` raises."""
        try:
            self.wait()
        finally:
            self._checkpointer.close()

    def steps(self) -> list[int]:
        """The steps of the complete checkpoints, ascending, damaged ones included."""
        self.wait()
        return [checkpoint.step for checkpoint in self._checkpointer.checkpoints]

    def save(self, step: int, state: Any, data: dict[str, Any]) -> None:
        """Saves in the background; the arrays of `state` may be donated once this returns.

        A save still under way is waited for first. What `restore` found damaged is removed. A step
        that this folder already has intact is not written again.

        Args:
          step: The number of the checkpoint.
          state: A pytree of arrays. Nodes without leaves (None, `optax.MaskedNode()`) are fine.
          data: A dict of JSON values, such as the position of the data iterator.

        Raises:
          UserError: No space is left, now or in the save before, or the folder cannot be written.
        """
        self.wait()
        for damaged in self._damaged:
            self._checkpointer.delete(damaged, missing_ok=True)
        self._damaged.clear()
        if step in self.steps():
            return

        host = _host_copy(state)
        leaves = {
            "/".join(path): {
                "shape": list(leaf.shape),
                "dtype": leaf.dtype.name,
                "crc32": _crc32(leaf),
            }
            for path, leaf in host.items()
        }
        checkpointables = {
            "state": traverse_util.unflatten_dict(host),
            "data": data,
            "leaves": {"arrays": leaves, "crc32": _json_crc32([leaves, data])},
        }
        self._pending = (step, sum(leaf.nbytes for leaf in host.values()))
        try:
            self._checkpointer.save_checkpointables_async(step, checkpointables, force=True)
        except (OSError, ValueError) as error:
            self._fail(error)

    def wait(self) -> None:
        """Returns when the save under way, if any, is complete on disk.

        Raises:
          UserError: That save found no space left, or could not write to the folder.
        """
        if self._pending is None:
            return
        try:
            self._checkpointer.wait()
        except (OSError, ValueError) as error:
            self._fail(error)
        self._pending = None

    def restore(self, abstract_state: Any) -> Restored | None:
        """Reads the newest intact checkpoint, bit for bit as it was saved.

        Args:
          abstract_state: The state's pytree with `jax.ShapeDtypeStruct` leaves (or arrays); the
            restored arrays go to their `sharding`, or to the default device without one.

        Returns:
          What was saved, or None when the folder has no checkpoint at all.

        Raises:
          UserError: The checkpoint has other arrays than `abstract_state`: nothing is cast, padded
            or cut to fit. Or every checkpoint is damaged: whether to start afresh is the user's
            decision.
        """
        steps = self.steps()
        with _hushed_interpreter():
            for step in reversed(steps):
                try:
                    return self._restore_step(step, abstract_state)
                except _Unreadable as error:
                    self._damaged.append(step)
                    self._warn(
                        f"the checkpoint of step {step} is damaged ({error}): passing over it"
                    )
        if steps:
            raise UserError(
                f"every checkpoint in {self.directory} is damaged (steps {steps}): bring one back "
                "from a backup, or move the folder away to start afresh"
            )
        return None

    def _restore_step(self, step: int, abstract_state: Any) -> Restored:
        saved = self._read(step, "data", "leaves")
        data, index = saved["data"], saved["leaves"]
        if not isinstance(index, dict) or index.keys() != {"arrays", "crc32"}:
            raise _Unreadable("the list of its arrays is garbled")
        if index["crc32"] != _json_crc32([index["arrays"], data]):
            raise _Unreadable("a JSON file's checksum differs")

        wanted, treedef = jax.tree.flatten_with_path(abstract_state)
        wanted = {_names(path): leaf for path, leaf in wanted}
        self._check_fit(step, index["arrays"], {"/".join(p): leaf for p, leaf in wanted.items()})

        host = traverse_util.flatten_dict(self._read(step, "state")["state"])
        restored = []
        for path, leaf in wanted.items():
            name, array = "/".join(path), np.asarray(host.get(path))
            intact = (array.shape, array.dtype) == (leaf.shape, leaf.dtype)
            if not intact or _crc32(array) != index["arrays"][name]["crc32"]:
                raise _Unreadable(f"the checksum of {name} differs")
            restored.append(jax.device_put(array, getattr(leaf, "sharding", None)))
        return Restored(step, treedef.unflatten(restored), data)

    def _read(self, step: int, *names: str) -> dict[str, Any]:
        try:
            return self._checkpointer.load_checkpointables(step, dict.fromkeys(names))
        except (KeyError, ValueError, OSError) as error:  # KeyError: Orbax's own, for any cause
            cause = error.__cause__ or error.__context__ or error
            if isinstance(cause, MemoryError):
                raise cause from None
            reason = textwrap.shorten(str(cause) or type(cause).__name__, 100, placeholder=" ...")
            raise _Unreadable(f"{' and '.join(names)}: {reason}") from None

    def _check_fit(
        self, step: int, saved: Mapping[str, Mapping[str, Any]], wanted: Mapping[str, Any]
    ) -> None:
        for name in [*wanted, *(name for name in saved if name not in wanted)]:
            has = _describe(**saved[name]) if name in saved else "missing"
            needs = (
                _describe(wanted[name].shape, wanted[name].dtype) if name in wanted else "absent"
            )
            if has != needs:
                raise UserError(
                    f"the checkpoint of step {step} in {self.directory} does not fit the model: "
                    f"{name} is {has} in the checkpoint and {needs} in the model; resume with the "
                    "config that wrote it, or start in another workdir"
                )

    def _remove_partial(self) -> None:
        for partial in self.directory.glob("*.orbax-checkpoint-tmp*"):
            shutil.rmtree(partial, ignore_errors=True)

    def _fail(self, error: Exception) -> None:
        """Tells what went wrong with the save under way; the checkpoints before it are intact."""
        assert self._pending is not None
        step, nbytes = self._pending
        self._pending = None
        self._remove_partial()
        self._checkpointer.reload()
        if _is_no_space(error):
            free = shutil.disk_usage(self.directory).free
            raise UserError(
                f"no space left for the checkpoint of step {step} in {self.directory}: it needs up "
                f"to {nbytes / 1e6:,.1f} MB and {free / 1e6:,.1f} MB are free; the earlier "
                "checkpoints are untouched: free some space and run the same command again"
            ) from error
        if isinstance(error, OSError):
            raise UserError(
                f"cannot write the checkpoint of step {step} in {self.directory}: "
                f"{error.strerror}; the earlier checkpoints are untouched"
            ) from error
        raise error


def _names(path: tuple[Any, ...]) -> tuple[str, ...]:
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in path)


def _host_copy(state: Any) -> dict[tuple[str, ...], np.ndarray]:
    """Every leaf in host memory of its own: the background write must not see donated buffers."""
    # On the CPU backend device_get gives views of the device's buffers; elsewhere it is the copy.
    copy = np.array if jax.default_backend() == "cpu" else np.asarray
    leaves = jax.tree.leaves_with_path(state)
    host = jax.device_get([leaf for _, leaf in leaves])
    return {_names(path): copy(leaf) for (path, _), leaf in zip(leaves, host, strict=True)}


def _crc32(array: np.ndarray) -> int:
    return zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


def _json_crc32(value: Any) -> int:
    as_read_back = json.loads(json.dumps(value))  # keys are strings, tuples are lists
    return zlib.crc32(json.dumps(as_read_back, sort_keys=True).encode())


def _describe(shape: Any, dtype: Any, **_: Any) -> str:
    """An array's type, such as `bfloat16[8,512,512]`."""
    return f"{np.dtype(dtype).name}[{','.join(str(n) for n in shape)}]"


def _is_no_space(error: BaseException | None) -> bool:
    """Whether a full disk or quota is behind `error`; tensorstore says so in its text alone."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if any(os.strerror(code) in str(error) for code in (errno.ENOSPC, errno.EDQUOT)):
            return True
        error = error.__cause__ or error.__context__
    return False


@contextlib.contextmanager
def _hushed_interpreter() -> Iterator[None]:
    """Drops the tracebacks of reads that Orbax leaves behind, unawaited, when another one fails."""
    hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            yield
    finally:
        sys.unraisablehook = hook


class _FromOrbax(logging.Filter):
    """Drops what Orbax logs about its doings; its failures reach the caller as exceptions."""

    def filter(self, record: logging.LogRecord) -> bool:
        unretrieved = record.getMessage().startswith("Task exception was never retrieved")
        return not (unretrieved or f"{os.sep}orbax{os.sep}" in record.pathname)


_from_orbax = _FromOrbax()


def _hush_orbax() -> None:
    for name in ("absl", "asyncio"):
        logging.getLogger(name).addFilter(_from_orbax)
