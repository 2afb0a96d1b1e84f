"""Folders of safetensors files, read and written a tensor at a time."""

import json
import math
import re
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
_AT_ONCE = 2**20  # bytes read or written at a time: a transpose within a CPU's cache is fast


class TensorSpec(NamedTuple):
    """A tensor's shape and dtype."""

    shape: tuple[int, ...]
    dtype: np.dtype


class TensorFiles:
    """The tensors of a folder: ``model.safetensors``, or several files and their index.

    Attributes:
      specs: shape and dtype of each tensor, by its name.
    """

    def __init__(self, folder: Path, *, ignored: str | None = None):
        """Reads the headers of the files; tensors whose names match ``ignored`` do not count.

        Raises:
          UserError: no such files, one that is damaged or cut short, files and index that differ,
            or a tensor of a dtype other than float32, float16 and bfloat16.
        """
        self._places: dict[str, tuple[Path, int]] = {}  # file and offset, by the tensor's name
        self.specs: dict[str, TensorSpec] = {}
        index = _read_index(folder)
        for file in sorted(set(index.values())) if index is not None else [SINGLE]:
            path = folder / file
            for name, (spec, offset) in _read_header(path, ignored).items():
                if index is not None and index.get(name) != file:
                    raise UserError(f"{path} has a tensor {name} that {INDEX} does not place there")
                self._places[name], self.specs[name] = (path, offset), spec
        for name, file in (index or {}).items():
            if name not in self.specs and not (ignored and re.fullmatch(ignored, name)):
                raise UserError(
                    f"{folder / file} lacks the tensor {name} that {INDEX} places there"
                )

    def read_into(self, name: str, out: np.ndarray, *, transpose: bool = False) -> None:
        """Reads a tensor into an array, whose dtype it takes, a piece at a time.

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
        path, offset = self._places[name]
        shape, dtype = self.specs[name]
        # Not mapped, for a mapped file's pages would count beside the arrays that they fill.
        with path.open("rb") as file:
            file.seek(offset)
            for rows in _rows_at_once(self.specs[name]):
                count = math.prod((rows.stop - rows.start, *shape[1:]))
                yield rows, np.fromfile(file, dtype, count).reshape(-1, *shape[1:])


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


def _rows_at_once(spec: TensorSpec) -> Iterator[slice]:
    """Cuts the first axis of a tensor into pieces of about a megabyte."""
    length, count = spec.shape[0], max(_AT_ONCE * spec.shape[0] // max(_nbytes(spec), 1), 1)
    for start in range(0, length, count):
        yield slice(start, min(start + count, length))


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
            array = get(name)
            if (array.shape, array.dtype) != specs[name]:
                raise ValueError(f"{name} is {array.shape} {array.dtype}, not {specs[name]}")
            for rows in _rows_at_once(specs[name]):
                file.write(np.ascontiguousarray(array[rows]).reshape(-1).view(np.uint8).data)


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


def _read_header(path: Path, ignored: str | None) -> dict[str, tuple[TensorSpec, int]]:
    """Reads shape, dtype and place of every tensor of a file."""
    if not path.is_file():
        raise UserError(f"{path.parent} lacks {path.name}, which its index names")
    try:
        with safe_open(path, framework="numpy"):  # checks the header, and that the file is whole
            pass
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
    except (SafetensorError, OSError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path} is no whole safetensors file: {reason}") from error
    found = {}
    for name, entry in header.items():
        if name == "__metadata__" or (ignored and re.fullmatch(ignored, name)):
            continue
        if entry["dtype"] not in DTYPES or not entry["shape"]:
            raise UserError(
                f"{path}: {name} is {entry['dtype']} of shape {entry['shape']}; weights are arrays "
                f"in {', '.join(DTYPES)}"
            )
        spec = TensorSpec(tuple(entry["shape"]), DTYPES[entry["dtype"]])
        found[name] = spec, 8 + length + entry["data_offsets"][0]
    return found
