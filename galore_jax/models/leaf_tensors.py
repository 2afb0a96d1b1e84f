"""Params as tensors of a Hugging Face folder: one for each, or of stacked blocks for each layer.

A kernel is (in, out) here and (out, in) there.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path as Folder
from typing import Any, Protocol

import jax
import numpy as np
from flax import traverse_util
from jax.typing import DTypeLike

from galore_jax.errors import UserError
from galore_jax.models.stages import BLOCKS
from galore_jax.models.tensor_files import DTYPES, TensorFiles, TensorSpec, write_tensors

_SHARD_BYTES = 5 * 10**9
_ALIGNMENT = 64  # bytes; JAX uses a NumPy array that is so aligned without a copy on a CPU

Path = tuple[str, ...]  # of a leaf


class TokenizerFiles(Protocol):
    """A tokenizer that can put its files into a folder."""

    vocab_size: int

    def save(self, folder: Folder) -> None:
        """Writes the files by which it is loaded again, by transformers too."""
        ...


def tensor_shape(path: Path, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the shape of the tensor of a leaf, of one layer if it is of the blocks.

    >>> tensor_shape(("blocks", "mlp", "kernel"), (2, 4, 6))
    (6, 4)
    """
    shape = shape[path[0] == BLOCKS :]
    return shape[::-1] if path[-1] == "kernel" else shape


def check_shapes(shapes: Any, params: Any, what: str = "the params") -> None:
    """Checks that params have the names and shapes of a model's, both nested dicts.

    Raises:
      UserError: one that the model lacks, or that lacks, or of another shape.
    """
    wanted, found = traverse_util.flatten_dict(shapes), traverse_util.flatten_dict(params)
    for path in sorted(wanted.keys() | found.keys()):
        want, has = (getattr(tree.get(path), "shape", "no array") for tree in (wanted, found))
        if has != want:
            raise UserError(f"{what} do not fit the model: {'/'.join(path)} is {has}, not {want}")


def read_leaf(
    files: TensorFiles,
    path: Path,
    shape: tuple[int, ...],
    names: Sequence[str],
    dtype: DTypeLike | None,
) -> jax.Array:
    """Reads a leaf, straight into a stacked array on the default device.

    Args:
      files: a folder's.
      path: of the leaf.
      shape: of the leaf.
      names: the tensors, one for each layer of a leaf of the blocks.
      dtype: of the leaf; None for that of the tensors.

    Raises:
      UserError: layers of different dtypes, without a dtype to read them in.
    """
    stored = {files.specs[name].dtype for name in names}
    if dtype is None and len(stored) > 1:
        raise UserError(f"{names[0]} has another dtype than the same of other layers")
    array = _aligned(shape, np.dtype(dtype) if dtype is not None else stored.pop())
    stack = array if path[0] == BLOCKS else array[None]
    for layer, name in enumerate(names):
        files.read_into(name, stack[layer], transpose=path[-1] == "kernel")
    return jax.device_put(array)


@dataclasses.dataclass(frozen=True)
class LeafTensors:
    """Leaves to be written as tensors.

    Attributes:
      leaves: arrays by path.
      names: the names of the tensors of each.

    Raises:
      UserError: a leaf of another dtype than float32, float16 and bfloat16.
    """

    leaves: Mapping[Path, Any]
    names: Mapping[Path, Sequence[str]]

    def __post_init__(self):
        for path, leaf in self.leaves.items():
            if leaf.dtype not in DTYPES.values():
                raise UserError(
                    f"{'/'.join(path)} is {leaf.dtype}; "
                    "weights are saved in float32, float16 or bfloat16"
                )

    def spec(self, name: str) -> TensorSpec:
        """Returns the shape and dtype of a tensor."""
        path, _ = self._places[name]
        return TensorSpec(tensor_shape(path, self.leaves[path].shape), self.leaves[path].dtype)

    def write(self, folder: Folder) -> None:
        """Writes the tensors, each copied by itself, in files of at most 5 GB."""
        specs = {name: self.spec(name) for name in self._places}
        write_tensors(folder, specs, self._tensor, shard_bytes=_SHARD_BYTES)

    @functools.cached_property
    def _places(self) -> dict[str, tuple[Path, int]]:
        return {
            name: (path, layer)
            for path in self.leaves
            for layer, name in enumerate(self.names[path])
        }

    def _tensor(self, name: str) -> np.ndarray:
        path, layer = self._places[name]
        array = np.asarray(self.leaves[path][layer] if path[0] == BLOCKS else self.leaves[path])
        return array.T if path[-1] == "kernel" else array


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Allocates an array that JAX can use in place on a CPU."""
    nbytes = math.prod(shape) * dtype.itemsize
    space = np.empty(nbytes + _ALIGNMENT, np.uint8)
    start = -space.ctypes.data % _ALIGNMENT
    return space[start : start + nbytes].view(dtype).reshape(shape)
