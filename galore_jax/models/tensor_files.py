"""Folders of safetensors files, read and written a tensor at a time."""

import json
import math
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from galore_jax.errors import UserError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": jnp.dtype("bfloat16")}
_AT_ONCE = 16 * 2**20  # bytes of a tensor that are read at a time


class TensorSpec(NamedTuple):
    """A tensor's shape and dtype."""

    shape: tuple[int, ...]
    dtype: np.dtype


class TensorFiles:
    """The tensors of a folder: ``model.safetensors``, or several files and their index.

    Attributes:
      specs: shape and dtype of each tensor, by its name.
    """

    def __init__(self, folder: Path):
        """Opens the files and reads their headers.

        Raises:
          UserError: no such files, one that is damaged or cut short, files and index that differ,
            or a tensor of a dtype other than float32, float16 and bfloat16.
        """
        self._files: dict[str, Any] = {}  # by the tensor's name
        self.specs: dict[str, TensorSpec] = {}
        index = _read_index(folder)
        for file in sorted(set(index.values())) if index is not None else [SINGLE]:
            opened = _open(folder, file)
            for name in opened.keys():  # noqa: SIM118  # it is no dict
                if index is not None and index.get(name) != file:
                    raise UserError(f"{folder / file} has a tensor {name} that {INDEX} does not")
                view = opened.get_slice(name)
                if view.get_dtype() not in DTYPES:
                    raise UserError(
                        f"{folder / file}: {name} is {view.get_dtype()}; "
                        f"weights must be {', '.join(DTYPES)}"
                    )
                self._files[name] = opened
                self.specs[name] = TensorSpec(tuple(view.get_shape()), DTYPES[view.get_dtype()])
        for name, file in (index or {}).items():
            if name not in self.specs:
                raise UserError(
                    f"{folder / file} lacks the tensor {name} that {INDEX} places there"
                )

    def read_into(self, name: str, out: np.ndarray, *, transpose: bool = False) -> None:
        """Reads a tensor into an array, whose dtype it takes, a few megabytes at a time.

        Args:
          name: of the tensor.
          out: the array to fill, of the tensor's shape or, with ``transpose``, its reverse.
          transpose: turn the tensor's axes around.
        """
        target = out.T if transpose else out
        for rows, values in self._pieces(name):
            target[rows] = values

    def equal(self, one: str, other: str) -> bool:
        """Tells whether two tensors have the same shape, dtype and values, to the bit."""
        return self.specs[one] == self.specs[other] and all(
            a.tobytes() == b.tobytes()
            for (_, a), (_, b) in zip(self._pieces(one), self._pieces(other), strict=True)
        )

    def _pieces(self, name: str) -> Iterator[tuple[slice, np.ndarray]]:
        """Gives a tensor's rows, a few megabytes at a time."""
        shape, dtype = self.specs[name]
        view = self._files[name].get_slice(name)
        count = max(_AT_ONCE // (dtype.itemsize * math.prod(shape[1:])), 1)
        for start in range(0, shape[0], count):
            rows = slice(start, min(start + count, shape[0]))
            yield rows, view[rows]


def write_tensors(
    folder: Path,
    specs: Mapping[str, TensorSpec],
    get: Callable[[str], np.ndarray],
    *,
    shard_bytes: int,
) -> None:
    """Writes tensors to a folder, in files of at most ``shard_bytes`` where a tensor is no larger.

    Args:
      folder: an empty folder.
      specs: shape and dtype of each tensor, by its name, in the order to write them.
      get: gives a tensor; called once for each, so that one exists at a time.
      shard_bytes: more than one file, with an index, is written if the tensors take more.
    """
    shards: list[list[str]] = []
    filled = 0
    for name, spec in specs.items():
        nbytes = _nbytes(spec)
        if not shards or filled + nbytes > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += nbytes
    if len(shards) == 1:
        _write_file(folder / SINGLE, shards[0], specs, get)
        return
    weight_map = {}
    for i, names in enumerate(shards, start=1):
        file = f"model-{i:05}-of-{len(shards):05}.safetensors"
        _write_file(folder / file, names, specs, get)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": sum(map(_nbytes, specs.values()))}}
    index["weight_map"] = dict(sorted(weight_map.items()))
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _nbytes(spec: TensorSpec) -> int:
    return math.prod(spec.shape) * spec.dtype.itemsize


def _write_file(
    path: Path,
    names: Sequence[str],
    specs: Mapping[str, TensorSpec],
    get: Callable[[str], np.ndarray],
) -> None:
    # The library writes a file from arrays that all exist at once; the format is a page long:
    # the header's length, the header as JSON, padded to eight bytes, and the tensors.
    codes = {dtype: code for code, dtype in DTYPES.items()}
    names = sorted(names, key=lambda name: -specs[name].dtype.itemsize)  # so that all are aligned
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        start, end = end, end + _nbytes(specs[name])
        shape, dtype = specs[name]
        header[name] = {"dtype": codes[dtype], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("xb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in names:
            array = np.ascontiguousarray(get(name))
            if (array.shape, array.dtype) != specs[name]:
                raise ValueError(f"{name} is {array.shape} {array.dtype}, not {specs[name]}")
            file.write(array.reshape(-1).view(np.uint8).data)


def _read_index(folder: Path) -> dict[str, str] | None:
    """Reads which file has which tensor; None for a single file."""
    path = folder / INDEX
    if not path.is_file():
        if not (folder / SINGLE).is_file():
            raise UserError(f"{folder} has neither {SINGLE} nor {INDEX}; give one with safetensors")
        return None
    try:
        index = json.loads(path.read_text())["weight_map"]
        files = {Path(file).name: file for file in index.values()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is no index of safetensors files") from error
    if not index or any(name != file for name, file in files.items()):
        raise UserError(f"{path} is no index of safetensors files in its folder")
    return index


def _open(folder: Path, file: str) -> Any:
    path = folder / file
    if not path.is_file():
        raise UserError(f"{folder} lacks {file}, which its index names")
    try:  # pread: the pages of a mapped file would count beside the arrays that they fill
        return safe_open(path, framework="numpy", backend="pread")
    except (SafetensorError, OSError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path} is no whole safetensors file: {reason}") from error
