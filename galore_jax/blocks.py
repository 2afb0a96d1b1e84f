"""Blocks of an array: tiles of a few hundred values of its last two axes."""

import math
from typing import Any

import jax
import jax.numpy as jnp

BLOCK_SIZE = 256


def block_shape(shape: tuple[int, ...], block_size: int = BLOCK_SIZE) -> tuple[int, int]:
    """Returns the rows and columns of a block of an array of that shape.

    As many columns as fit, then as many rows; of either, numbers that divide the axis, since what
    would have to be padded takes a multiple of the time. Only where a fourth of what fits is more
    than the best divisor, the last blocks are ragged.

    >>> block_shape((64, 11008)), block_shape((3, 512, 64)), block_shape((64,))
    ((1, 256), (4, 64), (1, 64))
    >>> block_shape((64, 1376)), block_shape((512, 5461)), block_shape((64, 1021))
    ((1, 172), (2, 127), (1, 256))
    """
    columns = _dividing(shape[-1], block_size)
    return _dividing(shape[-2] if len(shape) > 1 else 1, block_size // columns), columns


def scales_shape(shape: tuple[int, ...], block_size: int = BLOCK_SIZE) -> tuple[int, ...]:
    """Returns the shape of the scales of an array of that shape, one for each block.

    >>> scales_shape((8, 64, 1376)), scales_shape((1000,))
    ((8, 64, 8), (4,))
    """
    rows, columns = block_shape(shape, block_size)
    last = math.ceil(shape[-1] / columns)
    if len(shape) == 1:
        return (last,)
    return (*shape[:-2], math.ceil(shape[-2] / rows), last)


def check_block_size(block_size: Any) -> None:
    """Raises TypeError or ValueError unless ``block_size`` is an int of at least 1."""
    if not isinstance(block_size, int) or isinstance(block_size, bool):
        raise TypeError(f"block_size must be an int of at least 1, got {block_size!r}")
    if block_size < 1:
        raise ValueError(f"block_size must be an int of at least 1, got {block_size}")


def in_blocks(array: jax.Array, block_size: int) -> jax.Array:
    """Returns (..., m, n) as (..., m / rows, rows, n / columns, columns), padded with zeros."""
    rows, columns = block_shape(array.shape, block_size)
    *stack, m, n = array.shape if array.ndim > 1 else (1, *array.shape)
    matrix = array.reshape(*stack, m, n)
    if m % rows or n % columns:
        matrix = jnp.pad(matrix, [(0, 0)] * len(stack) + [(0, -m % rows), (0, -n % columns)])
    return matrix.reshape(*stack, -(-m // rows), rows, -(-n // columns), columns)


def out_of_blocks(blocks: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Returns the array of that shape from its blocks, the padding cut off."""
    *stack, a, rows, b, columns = blocks.shape
    matrix = blocks.reshape(*stack, a * rows, b * columns)
    m = shape[-2] if len(shape) > 1 else 1
    return matrix[..., :m, : shape[len(shape) - 1]].reshape(shape)


def _dividing(size: int, most: int) -> int:
    """Returns the largest divisor of a size up to ``most``; ``most`` if only a fourth is left."""
    most = max(1, min(size, most))
    return next((d for d in range(most, most // 4, -1) if size % d == 0), most)
