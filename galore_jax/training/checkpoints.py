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
import logging
import os
import shutil
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from orbax.checkpoint import v1 as ocp

from galore_jax.errors import UserError
from galore_jax.training.array_index import describe, index_array, json_crc32, placeholder
from galore_jax.training.quiet_orbax import quiet_orbax

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
    One process at a time may have the folder open to write: that removes what a killed save left.

    Args:
      directory: a local folder, made if it is missing.
      keep: how many checkpoints stay, at least 1. An older one goes only after a newer is complete.
      read_only: only to read, which any number of processes may do at any time.
      warn: called with one line for each damaged checkpoint that ``restore`` passes over.

    Raises:
      UserError: ``keep`` is not at least 1, or the folder cannot be made or read.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        keep: int = 1,
        read_only: bool = False,
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

        quiet_orbax()
        registry = ocp.handlers.local_registry()
        for name in ("data", "leaves"):  # a dict of numbers would else be saved as arrays
            registry.add(ocp.handlers.JsonHandler, checkpointable_name=name)
        self._context = ocp.Context()
        self._context.checkpointables.registry = registry
        self._context.memory.deepcopy_host_arrays = False  # ``save`` hands over arrays of its own
        self._context.pytree.loading.partial_load = True  # the arrays asked for alone
        if read_only:
            return
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
        leaves = {"/".join(path): index_array(leaf) for path, leaf in host.items()}
        checkpointables = {
            "state": traverse_util.unflatten_dict(host),
            "data": data,
            "leaves": {"arrays": leaves, "crc32": json_crc32([leaves, data])},
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
        return self._newest_intact(lambda step: self._restore_step(step, abstract_state))

    def restore_part(self, part: str, step: int | None = None) -> Restored | None:
        """Reads one field of the saved states, such as ``params``, without the rest.

        Args:
          part: the name of the field.
          step: which checkpoint; None for the newest intact one.

        Returns:
          As ``restore``; the state is the field alone, as nested dicts of arrays on the default
          device.

        Raises:
          UserError: there is no checkpoint of that step, or that one or every one is damaged.
        """
        if step is None:
            return self._newest_intact(lambda step: self._restore_part(step, part))
        steps = self.steps()
        if step not in steps:
            kept = f"it has those of steps {steps}" if steps else "it has none"
            raise UserError(f"{self.directory} has no checkpoint of step {step}; {kept}")
        try:
            return self._restore_part(step, part)
        except _Unreadable as error:
            raise UserError(
                f"the checkpoint of step {step} in {self.directory} is damaged ({error})"
            ) from error

    def _newest_intact(self, restore: Callable[[int], Restored]) -> Restored | None:
        steps = self.steps()
        for step in reversed(steps):
            try:
                return restore(step)
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

    def _restore_part(self, step: int, part: str) -> Restored:
        data, arrays = self._read_index(step)
        wanted = {name: entry for name, entry in arrays.items() if name.startswith(f"{part}/")}
        like = {tuple(name.split("/")): placeholder(entry) for name, entry in wanted.items()}
        state = self._read(step, state=traverse_util.unflatten_dict(like))["state"]
        host: Any = traverse_util.flatten_dict(state[part])
        for path in list(host):
            name, array = "/".join((part, *path)), host[path]
            if index_array(array) != arrays[name]:
                raise _Unreadable(f"the checksum of {name} differs")
            host[path] = jax.device_put(array)
        return Restored(step, traverse_util.unflatten_dict(host), data)

    def _read_index(self, step: int) -> tuple[dict[str, Any], dict[str, Any]]:
        """Reads the JSON data of a checkpoint, and shape, dtype and checksum of its arrays."""
        saved = self._read(step, data=None, leaves=None)
        data, index = saved["data"], saved["leaves"]
        if not isinstance(index, dict) or index.keys() != {"arrays", "crc32"}:
            raise _Unreadable("the list of its arrays is garbled")
        arrays = index["arrays"]
        if index["crc32"] != json_crc32([arrays, data]):
            raise _Unreadable("a JSON file's checksum differs")
        return data, arrays

    def _restore_step(self, step: int, abstract_state: Any) -> Restored:
        data, arrays = self._read_index(step)
        leaves, treedef = jax.tree.flatten_with_path(abstract_state)
        wanted = {"/".join(_names(path)): jax.eval_shape(_without_key, x) for path, x in leaves}
        for name in wanted | arrays:
            has = describe(**arrays[name]) if name in arrays else "missing"
            leaf = wanted.get(name)
            needs = "absent" if leaf is None else describe(leaf.shape, leaf.dtype)
            if has != needs:
                raise UserError(
                    f"the checkpoint of step {step} in {self.directory} does not fit the model: "
                    f"{name} is {has} in the checkpoint and {needs} in the model; resume with the "
                    "config that wrote it, or start in another workdir"
                )

        host = traverse_util.flatten_dict(self._read(step, state=None)["state"])
        restored = []
        for path, leaf in leaves:
            name, array = "/".join(_names(path)), np.asarray(host.pop(_names(path), ()))
            if index_array(array) != arrays[name]:
                raise _Unreadable(f"the checksum of {name} differs")
            array = jax.device_put(array, getattr(leaf, "sharding", None))
            restored.append(jax.random.wrap_key_data(array) if _is_key(leaf) else array)
        return Restored(step, treedef.unflatten(restored), data)

    def _load(self, step: int, wanted: dict[str, Any]) -> dict[str, Any]:
        with self._context:
            return ocp.load_checkpointables(f"{self.directory}/{step}", wanted)

    def _read(self, step: int, **wanted: Any) -> dict[str, Any]:
        """Reads checkpointables; those whose value is None whole, else the arrays it is like."""
        try:  # in the thread: in the main one uvloop would take over the handling of signals
            return self._thread.submit(self._load, step, wanted).result()
        except (KeyError, ValueError, OSError) as error:  # KeyError: Orbax's own, for any cause
            cause = error.__cause__ or error.__context__ or error
            if isinstance(cause, MemoryError):
                raise cause from None
            reason = textwrap.shorten(str(cause) or type(cause).__name__, 100, placeholder=" ...")
            raise _Unreadable(f"{' and '.join(wanted)}: {reason}") from None


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
