"""Params as tensors of a Hugging Face folder: one for each, or of stacked blocks for each layer.

A kernel is (in, out) here and (out, in) there.
"""

import dataclasses
import functools
import json
import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path as Folder
from typing import Any, Protocol

import jax
import numpy as np
from flax import traverse_util
from jax.typing import DTypeLike

from galore_jax.errors import UserError
from galore_jax.folders import complete_or_absent
from galore_jax.int8_kernels import decoded
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


def check_tensors(
    folder: Folder,
    wanted: Mapping[str, tuple[int, ...]],
    found: Mapping[str, tuple[int, ...]],
    surplus: Collection[str],
) -> None:
    """Compares the names and shapes of a folder's tensors with the model's.

    Args:
      folder: where they are.
      wanted: the model's.
      found: the folder's.
      surplus: names in the folder that the model has no use for.

    Raises:
      UserError: a tensor that is missing, left over or of the wrong shape.
    """
    for kind, names in (("lacks", wanted.keys() - found.keys()), ("has too much:", surplus)):
        if names:
            first, more = min(names), f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise UserError(f"{folder} {kind} the tensor {first}{more}, as its config.json has it")
    for name, shape in wanted.items():
        if found[name] != shape:
            raise UserError(
                f"{folder}: the tensor {name} has the shape {found[name]}; by its config.json it "
                f"must be {shape}"
            )


def read_leaf(
    folder: Folder,
    files: TensorFiles,
    path: Path,
    shape: tuple[int, ...],
    names: Sequence[str],
    dtype: DTypeLike | None,
) -> jax.Array:
    """Reads a leaf, straight into a stacked array on the default device.

    Args:
      folder: where they are.
      files: its tensors.
      path: of the leaf.
      shape: of the leaf.
      names: the tensors, one for each layer of a leaf of the blocks.
      dtype: of the leaf; None for that of the tensors.

    Raises:
      UserError: layers of different dtypes, without a dtype to read them in.
    """
    array = aligned(shape, leaf_dtype(folder, files, names, dtype))
    stack = array if path[0] == BLOCKS else array[None]
    for layer, name in enumerate(names):
        files.read_into(name, stack[layer], transpose=path[-1] == "kernel")
    return jax.device_put(array)


def leaf_dtype(
    folder: Folder, files: TensorFiles, names: Sequence[str], dtype: DTypeLike | None
) -> np.dtype:
    """Returns a dtype, or where that is None the one of a leaf's tensors, see ``read_leaf``."""
    if dtype is not None:
        return np.dtype(dtype)
    first, *others = {files.specs[name].dtype for name in names}
    if others:
        raise UserError(f"{folder}: {names[0]} has another dtype than the same of other layers")
    return first


@dataclasses.dataclass(frozen=True)
class LeafTensors:
    """Leaves to be written as tensors.

    Attributes:
      leaves: arrays by path; an ``Int8Kernel`` is written as the array that it stands for.
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
        leaf = self.leaves[path][layer] if path[0] == BLOCKS else self.leaves[path]
        array = np.asarray(decoded(leaf))
        return array.T if path[-1] == "kernel" else array


def save_folder(
    folder: Folder,
    config_json: Mapping[str, Any],
    tensors: LeafTensors,
    tokenizer: TokenizerFiles | None,
) -> None:
    """Writes ``config.json``, tensors and tokenizer beside, and renames when all is complete."""
    with complete_or_absent(folder) as partial:
        (partial / "config.json").write_text(json.dumps(config_json, indent=2) + "\n")
        tensors.write(partial)
        if tokenizer is not None:
            tokenizer.save(partial)


def check_tokenizer(tokenizer: TokenizerFiles | None, vocab_size: int) -> None:
    """Raises a UserError for a tokenizer of more ids than a model's vocabulary."""
    if tokenizer is not None and tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} ids and the model a vocabulary of "
            f"{vocab_size}; they do not belong together"
        )


def aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Allocates an array that JAX can use in place on a CPU."""
    nbytes = math.prod(shape) * dtype.itemsize
    space = np.empty(nbytes + _ALIGNMENT, np.uint8)
    start = -space.ctypes.data % _ALIGNMENT
    return space[start : start + nbytes].view(dtype).reshape(shape)
