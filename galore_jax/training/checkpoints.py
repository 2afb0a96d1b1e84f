"""Checkpoints that survive a kill, a full disk and a damaged file.

Orbax writes and reads them. This module adds what Orbax leaves open (each was tried):

- Orbax casts a restored array to the dtype asked for, and does not notice a flipped bit in it.
  Every array's shape, dtype and CRC-32 are saved and compared.
- Any damage surfaces as one exception, as does a tree that does not fit. The two are told apart:
  damage falls back to the checkpoint before, a misfit is the user's to put right.
- A failed write or read also prints hundreds of lines of its threads' tracebacks.
"""

import concurrent.futures
import errno
import json
import logging
import os
import shutil
import sys
import textwrap
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from orbax.checkpoint import v1 as ocp

from galore_jax.errors import UserError

_logger = logging.getLogger(__name__)
_PARTIAL = ".orbax-checkpoint-tmp"  # in the names of folders that are not complete


class Restored(NamedTuple):
    """A restored checkpoint: its step, the state on the device, and the JSON ``data``."""

    step: int
    state: Any
    data: dict[str, Any]


class _Unreadable(Exception):
    """The files of one checkpoint are damaged; the message says how, in a few words."""


class Checkpoints:
    """A folder of numbered checkpoints, of which the last ``keep`` stay.

    Each step's folder is an Orbax checkpoint of three checkpointables: ``state``, the arrays as
    nested dicts named like the pytree's paths (PRNG keys as their key data); ``data``, the JSON
    dict given to ``save``; and ``leaves``, the shape, dtype and CRC-32 of every array.
    One process at a time may have the folder open: opening it removes what a killed save left.

    Args:
      directory: a local folder, made if it is missing.
      keep: how many checkpoints stay, at least 1. An older one goes only after a newer is complete.
      warn: called with one line for each damaged checkpoint that ``restore`` passes over.

    Raises:
      UserError: ``keep`` is not at least 1, or the folder cannot be made or read.
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
        self._keep, self._warn = keep, warn
        self._damaged: list[int] = []
        self._saving: concurrent.futures.Future[None] | None = None
        self._saving_what = (0, 0)  # step and bytes
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "checkpoints")

        _quiet_orbax()
        registry = ocp.handlers.local_registry()
        for name in ("data", "leaves"):  # a dict of numbers would else be saved as arrays
            registry.add(ocp.handlers.JsonHandler, checkpointable_name=name)
        self._context = ocp.Context()
        self._context.checkpointables.registry = registry
        self._context.memory.deepcopy_host_arrays = False  # ``save`` hands over arrays of its own
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._remove_partial()
        except OSError as error:
            raise UserError(
                f"cannot use {self.directory} for checkpoints: {error.strerror}"
            ) from error

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """Waits for the save under way and lets go of the folder; raises what ``wait`` raises."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()

    def steps(self) -> list[int]:
        """Returns the steps of the complete checkpoints, ascending, damaged ones included."""
        self.wait()
        return self._steps()

    def save(self, step: int, state: Any, data: dict[str, Any]) -> None:
        """Saves in the background; the arrays of ``state`` may be donated once this returns.

        A save still under way is waited for first. Checkpoints that ``restore`` found damaged are
        removed. A step that the folder already has intact is not written again.

        Args:
          step: the number of the checkpoint.
          state: a pytree of arrays. Nodes without leaves (None, ``optax.MaskedNode()``) are fine.
          data: a dict of JSON values, such as the position of the data iterator.

        Raises:
          UserError: the save before this one failed, as in ``wait``.
        """
        if step in set(self.steps()).difference(self._damaged):
            return
        host = _host_copy(state)
        leaves = {"/".join(path): _index(leaf) for path, leaf in host.items()}
        checkpointables = {
            "state": traverse_util.unflatten_dict(host),
            "data": data,
            "leaves": {"arrays": leaves, "crc32": _json_crc32([leaves, data])},
        }
        self._saving_what = (step, sum(leaf.nbytes for leaf in host.values()))
        self._saving = self._thread.submit(self._write, step, checkpointables)

    def wait(self) -> None:
        """Returns when the save under way, if any, is complete on disk.

        Raises:
          UserError: no space was left for it, or the folder cannot be written.
        """
        saving, self._saving = self._saving, None
        try:
            if saving is not None:
                saving.result()
        except (OSError, ValueError) as error:  # ValueError: tensorstore's, for any cause
            self._remove_partial()
            code, (step, nbytes) = _os_error(error), self._saving_what
            if code is None:
                raise
            where = f"the checkpoint of step {step} in {self.directory}"
            reason = f"cannot write {where}: {os.strerror(code)}"
            if code in (errno.ENOSPC, errno.EDQUOT):
                free = shutil.disk_usage(self.directory).free
                reason = (
                    f"no space left for {where}: it needs up to {nbytes / 1e6:,.1f} MB and "
                    f"{free / 1e6:,.1f} MB are free"
                )
            raise UserError(
                f"{reason}; the earlier checkpoints are untouched: mend that and run the same "
                "command again"
            ) from error

    def restore(self, abstract_state: Any) -> Restored | None:
        """Reads the newest intact checkpoint, bit for bit as it was saved.

        Args:
          abstract_state: the state's pytree with ``jax.ShapeDtypeStruct`` leaves (or arrays); the
            restored arrays go to their ``sharding``, or to the default device without one.

        Returns:
          The checkpoint, or None when the folder has none at all.

        Raises:
          UserError: the checkpoint has other arrays than ``abstract_state``: nothing is cast,
            padded or cut to fit. Or every checkpoint is damaged: whether to start afresh is the
            user's decision.
        """
        steps = self.steps()
        for step in reversed(steps):
            try:
                return self._restore_step(step, abstract_state)
            except _Unreadable as error:
                self._damaged.append(step)
                self._warn(f"the checkpoint of step {step} is damaged ({error}): passing over it")
        if steps:
            raise UserError(
                f"every checkpoint in {self.directory} is damaged (steps {steps}): bring one back "
                "from a backup, or move the folder away to start afresh"
            )
        return None

    def _steps(self) -> list[int]:
        return sorted(int(path.name) for path in self.directory.glob("*") if path.name.isdecimal())

    def _write(self, step: int, checkpointables: dict[str, Any]) -> None:
        while self._damaged:
            self._remove(self._damaged.pop())
        with self._context:
            ocp.save_checkpointables(f"{self.directory}/{step}", checkpointables)
        for old in self._steps()[: -self._keep]:
            self._remove(old)

    def _remove(self, step: int) -> None:
        # Renamed first: a kill half way must leave nothing that looks complete.
        (self.directory / str(step)).rename(self.directory / f"{step}{_PARTIAL}")
        self._remove_partial()

    def _remove_partial(self) -> None:
        for path in self.directory.glob(f"*{_PARTIAL}*"):
            shutil.rmtree(path, ignore_errors=True)

    def _restore_step(self, step: int, abstract_state: Any) -> Restored:
        saved = self._read(step, "data", "leaves")
        data, index = saved["data"], saved["leaves"]
        if not isinstance(index, dict) or index.keys() != {"arrays", "crc32"}:
            raise _Unreadable("the list of its arrays is garbled")
        arrays = index["arrays"]
        if index["crc32"] != _json_crc32([arrays, data]):
            raise _Unreadable("a JSON file's checksum differs")

        leaves, treedef = jax.tree.flatten_with_path(abstract_state)
        wanted = {"/".join(_names(path)): jax.eval_shape(_without_key, x) for path, x in leaves}
        for name in wanted | arrays:
            has = _describe(**arrays[name]) if name in arrays else "missing"
            leaf = wanted.get(name)
            needs = "absent" if leaf is None else _describe(leaf.shape, leaf.dtype)
            if has != needs:
                raise UserError(
                    f"the checkpoint of step {step} in {self.directory} does not fit the model: "
                    f"{name} is {has} in the checkpoint and {needs} in the model; resume with the "
                    "config that wrote it, or start in another workdir"
                )

        host = traverse_util.flatten_dict(self._read(step, "state")["state"])
        restored = []
        for path, leaf in leaves:
            name, array = "/".join(_names(path)), np.asarray(host.pop(_names(path), ()))
            if _index(array) != arrays[name]:
                raise _Unreadable(f"the checksum of {name} differs")
            array = jax.device_put(array, getattr(leaf, "sharding", None))
            restored.append(jax.random.wrap_key_data(array) if _is_key(leaf) else array)
        return Restored(step, treedef.unflatten(restored), data)

    def _load(self, step: int, names: tuple[str, ...]) -> dict[str, Any]:
        with self._context:
            return ocp.load_checkpointables(f"{self.directory}/{step}", dict.fromkeys(names))

    def _read(self, step: int, *names: str) -> dict[str, Any]:
        try:  # in the thread: in the main one uvloop would take over the handling of signals
            return self._thread.submit(self._load, step, names).result()
        except (KeyError, ValueError, OSError) as error:  # KeyError: Orbax's own, for any cause
            cause = error.__cause__ or error.__context__ or error
            if isinstance(cause, MemoryError):
                raise cause from None
            reason = textwrap.shorten(str(cause) or type(cause).__name__, 100, placeholder=" ...")
            raise _Unreadable(f"{' and '.join(names)}: {reason}") from None


def _names(path: tuple[Any, ...]) -> tuple[str, ...]:
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in path)


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _without_key(leaf: Any) -> Any:
    return jax.random.key_data(leaf) if _is_key(leaf) else leaf


def _host_copy(state: Any) -> dict[tuple[str, ...], np.ndarray]:
    """Copies every leaf to host memory, where later donations of its buffer do not reach it."""
    # On the CPU backend device_get gives views of the device's buffers; elsewhere it is the copy.
    copy = np.array if jax.default_backend() == "cpu" else np.asarray
    leaves = jax.tree.leaves_with_path(state)
    host = jax.device_get([_without_key(leaf) for _, leaf in leaves])
    return {_names(path): copy(leaf) for (path, _), leaf in zip(leaves, host, strict=True)}


def _index(array: np.ndarray) -> dict[str, Any]:
    crc32 = zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return {"shape": list(array.shape), "dtype": array.dtype.name, "crc32": crc32}


def _json_crc32(value: Any) -> int:
    as_read_back = json.loads(json.dumps(value))  # keys are strings, tuples are lists
    return zlib.crc32(json.dumps(as_read_back, sort_keys=True).encode())


def _describe(shape: Any, dtype: Any, crc32: int = 0) -> str:
    """Names an array's type, such as ``bfloat16[8,512,512]``."""
    return f"{np.dtype(dtype).name}[{','.join(str(n) for n in shape)}]"


def _os_error(error: BaseException | None) -> int | None:
    """Finds the number of the system's error behind ``error``; tensorstore has it in text alone."""
    codes = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EIO)
    while error is not None:
        if isinstance(error, OSError) and error.errno is not None:
            return error.errno
        for code in codes:
            if os.strerror(code) in str(error):
                return code
        error = error.__cause__ or error.__context__
    return None


def _quiet_orbax() -> None:
    """Drops what Orbax's threads print, above all after a failure, which the caller gets anyway."""
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
