r"""Arrays in 8 or 4 bits: codes of the array's own shape, and a float32 scale for each block.

A block is a tile of at most ``block_size`` values of the last two axes, mostly neighbours along the
last, see ``block_shape``. Axes before these are never joined: slicing and mapping a stack of
matrices does the same to codes and scales. The scale of a block is its largest
magnitude, and a code stands for a value of its encoding times that:

| encoding | codes | values |
|---|---|---|
| dynamic | int8 | the signed dynamic map of Dettmers et al. 2022, arXiv:2110.02861 |
| dynamic_unsigned | uint8 | its unsigned map |
| dynamic_root | uint8 | squares of the unsigned map |
| int8 | int8 | $k / 127$, $-127 \le k \le 127$ |
| int4 | int4 | $k / 7$, $-7 \le k \le 7$ |

The dynamic maps divide each decade $[10^{-d-1}, 10^{-d}]$, d from 0 to 6, evenly into
$2^{6-d}$ bins (the unsigned one into twice as many), whose middles are their values, along
with 0 and 1. A value is found, and a code decoded, by arithmetic: no table is searched or gathered
from. ``dynamic_root`` encodes the square root: a second moment enters Adam under a root, so that is
where its precision is wanted, and it reaches over 14 decades, not 7. Zero has the code zero.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp

from galore_jax.sharding import zeros_beside

Encoding = Literal["dynamic", "dynamic_unsigned", "dynamic_root", "int8", "int4"]
ENCODINGS: tuple[Encoding, ...] = get_args(Encoding)
BLOCK_SIZE = 256

_LEVELS = {"int8": 127, "int4": 7}
_DECADES = 6  # borders between decades: 1e-6, ..., 0.1
_TINY = float(jnp.finfo(jnp.float32).tiny)  # smaller scales are zero: dividing by them is not safe


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["codes", "scales"],
    meta_fields=["encoding", "block_size"],
)
@dataclasses.dataclass(frozen=True)
class Quantized:
    """A quantised array, a pytree of two arrays.

    Attributes:
      codes: of the array's shape; int8, uint8 or int4.
      scales: float32; of the array's shape with the last two axes divided by ``block_shape``,
        rounded up.
      encoding: what the codes stand for.
      block_size: the most values that share a scale.
    """

    codes: Any
    scales: Any
    encoding: Encoding
    block_size: int

    @property
    def shape(self) -> tuple[int, ...]:
        """The array's shape."""
        return jnp.shape(self.codes)


def is_quantized(node: Any) -> bool:
    """Whether a node is a ``Quantized``, as ``is_leaf`` of ``jax.tree`` takes it.

    >>> is_quantized(1.0)
    False
    """
    return isinstance(node, Quantized)


def block_shape(shape: tuple[int, ...], block_size: int = BLOCK_SIZE) -> tuple[int, int]:
    """Rows and columns of a block of an array of that shape.

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
    """Shape of the scales of an array of that shape.

    >>> scales_shape((8, 64, 1376)), scales_shape((1000,))
    ((8, 64, 8), (4,))
    """
    rows, columns = block_shape(shape, block_size)
    last = math.ceil(shape[-1] / columns)
    if len(shape) == 1:
        return (last,)
    return (*shape[:-2], math.ceil(shape[-2] / rows), last)


def code_dtype(encoding: Encoding) -> Any:
    """The dtype of an encoding's codes.

    Raises:
      ValueError: no encoding of that name.

    >>> code_dtype("dynamic_root")
    <class 'jax.numpy.uint8'>
    """
    if encoding not in ENCODINGS:
        raise ValueError(f"encoding must be one of {', '.join(ENCODINGS)}, got {encoding!r}")
    if encoding in ("dynamic", "int8"):
        return jnp.int8
    return jnp.int4 if encoding == "int4" else jnp.uint8


def quantize(
    array: jax.Array,
    encoding: Encoding = "dynamic",
    *,
    block_size: int = BLOCK_SIZE,
    noise: jax.Array | None = None,
    scales: jax.Array | None = None,
) -> Quantized:
    """The codes and scales nearest to an array, or stochastically rounded ones.

    Args:
      array: (..., m, n) or (n,), of any float dtype; not negative for the unsigned encodings.
      encoding: see the top of this module.
      block_size: values that share a scale, at least 1.
      noise: of the array's shape, uniform in [0, 1): of the two neighbouring values the upper is
        taken in proportion to nearness, so that the mean is the value itself (its root for
        ``dynamic_root``). None rounds to nearest.
      scales: ``block_scales`` of the array where they are known already.

    Returns:
      The quantised array. What is not finite makes its whole block NaN.

    Raises:
      TypeError, ValueError: a scalar, a block size that is no positive int, an unknown encoding.

    >>> import jax.numpy as jnp
    >>> dequantize(quantize(jnp.array([0.0, -8.0, 127.0]), "int8")).tolist()
    [0.0, -8.0, 127.0]
    """
    if scales is None:
        scales = block_scales(array, encoding, block_size=block_size)
    blocks = _in_blocks(_coded(array, encoding), block_size)
    of_blocks = scales.reshape(*blocks.shape[:-3], 1, blocks.shape[-2], 1)
    if encoding == "dynamic_root":
        of_blocks = jnp.sqrt(of_blocks)
    share = jnp.abs(blocks) / jnp.where(of_blocks == 0, jnp.inf, of_blocks)
    up = 0.5 if noise is None else _in_blocks(noise, block_size)
    if encoding in _LEVELS:
        level = _LEVELS[encoding]
        steps = jnp.minimum(jnp.floor(share * level + up), level)
    else:
        steps = _dynamic_step(share, 6 if encoding == "dynamic" else 7, up)
    steps = _small_int(steps)
    if encoding in ("dynamic", *_LEVELS):
        # +1 of the signed map, which has no -1, takes the one code that is left: 128 is -128.
        steps = jnp.where(blocks < 0, -jnp.minimum(steps, 127), steps)
    codes = steps.astype(jnp.int8).astype(code_dtype(encoding))
    return Quantized(_out_of_blocks(codes, array.shape), scales, encoding, block_size)


def block_scales(
    array: jax.Array, encoding: Encoding = "dynamic", *, block_size: int = BLOCK_SIZE
) -> jax.Array:
    """The scales that ``quantize`` gives an array: each block's largest magnitude, float32.

    Raises:
      TypeError, ValueError: see ``quantize``.

    >>> import jax.numpy as jnp
    >>> block_scales(jnp.array([0.0, -8.0, 2.0])).tolist()
    [8.0]
    """
    code_dtype(encoding)
    check_block_size(block_size)
    if jnp.ndim(array) == 0:
        raise ValueError("a scalar has no blocks to quantise; keep it as it is")
    blocks = _in_blocks(_coded(array, encoding), block_size)
    scales = jnp.abs(blocks).max(axis=(-3, -1))
    scales = jnp.where(scales < _TINY, 0, scales)
    if encoding == "dynamic_root":
        scales = jnp.square(scales)
    return scales.reshape(scales_shape(array.shape, block_size))


def _coded(array: jax.Array, encoding: Encoding) -> jax.Array:
    """What the codes are of: the float32 array, or its root."""
    array = jnp.asarray(array).astype(jnp.float32)
    return jnp.sqrt(array) if encoding == "dynamic_root" else array


def quantized_zeros(
    leaf: Any,
    axes: Sequence[int | None],
    shape: tuple[int, ...],
    encoding: Encoding,
    block_size: int = BLOCK_SIZE,
) -> Quantized:
    """Zeros, sharded as the given axes of a leaf, see ``galore_jax.sharding.zeros_beside``.

    >>> import jax.numpy as jnp
    >>> quantized_zeros(jnp.ones((8, 600)), (0, 1), (8, 600), "dynamic").scales.shape
    (8, 3)
    """
    codes = zeros_beside(leaf, axes, shape, code_dtype(encoding))
    scales = zeros_beside(leaf, axes, scales_shape(shape, block_size), jnp.float32)
    return Quantized(codes, scales, encoding, block_size)


def dequantize(quantized: Quantized) -> jax.Array:
    """The float32 array that a quantised one stands for.

    Raises:
      ValueError: scales that are not those of the codes' shape (a slice through a block).

    >>> import jax.numpy as jnp
    >>> dequantize(quantize(jnp.array([[1.0, -7.0]]), "int4")).tolist()
    [[1.0, -7.0]]
    """
    shape, block_size = quantized.shape, quantized.block_size
    expected = scales_shape(shape, block_size)
    if jnp.shape(quantized.scales) != expected:
        raise ValueError(
            f"codes of shape {shape} in blocks of {block_size} have scales of shape {expected}, "
            f"got {jnp.shape(quantized.scales)}"
        )
    blocks = _in_blocks(quantized.codes, block_size)
    scales = quantized.scales.reshape(*blocks.shape[:-3], 1, blocks.shape[-2], 1)
    steps = blocks.astype(jnp.int32)
    if quantized.encoding in _LEVELS:
        values = steps.astype(jnp.float32) * (scales / _LEVELS[quantized.encoding])
    elif quantized.encoding == "dynamic":
        values = _dynamic_value(jnp.abs(steps), 6) * scales
        values = jnp.where((steps < 0) & (steps > -128), -values, values)
    else:
        values = _dynamic_value(jnp.where(steps == 0, 0, steps + 1), 7)
        values = (values * values if quantized.encoding == "dynamic_root" else values) * scales
    return _out_of_blocks(values, shape)


def dequantize_tree(tree: Any) -> Any:
    """The tree with float32 arrays for the quantised ones; the others are as they were.

    >>> import jax.numpy as jnp
    >>> dequantize_tree([quantize(jnp.ones(2), "int8"), 3])
    [Array([1., 1.], dtype=float32), 3]
    """
    return jax.tree.map(
        lambda x: dequantize(x) if is_quantized(x) else x, tree, is_leaf=is_quantized
    )


def quantize_like(old: Any, new: Any) -> Any:
    """A tree of arrays, quantised (to nearest) where that of the same structure before it is.

    >>> import jax.numpy as jnp
    >>> quantize_like(quantize(jnp.ones(2), "int8"), jnp.ones(2)).codes.tolist()
    [127, 127]
    """

    def like(old: Any, new: Any) -> Any:
        if not is_quantized(old):
            return new
        return quantize(new, old.encoding, block_size=old.block_size)

    return jax.tree.map(like, old, new, is_leaf=is_quantized)


def dithering(shape: tuple[int, ...], count: jax.typing.ArrayLike) -> jax.Array:
    """Noise for ``quantize`` that sweeps [0, 1) evenly in time: a golden-ratio sequence.

    Each value starts from a hash of its index, and moves by the golden ratio with the count. A
    change too small for the code is then made once in so many updates, nearly as exactly as if the
    remainder had been kept, with far less noise than independent random numbers have.

    Args:
      shape: of the noise.
      count: updates so far, () int.

    Returns:
      float32 of that shape, uniform in [0, 1).

    >>> noise = dithering((1000,), 3)
    >>> abs(noise.mean().item() - 0.5) < 0.03
    True
    """
    index, stride = jnp.zeros(shape, jnp.uint32), 1
    for axis in reversed(range(len(shape))):
        index += jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * jnp.uint32(stride % 2**32)
        stride *= shape[axis]
    # The finaliser of MurmurHash3 (public domain).
    index ^= index >> 16
    index *= jnp.uint32(0x85EBCA6B)
    index ^= index >> 13
    index *= jnp.uint32(0xC2B2AE35)
    index ^= index >> 16
    index += jnp.asarray(count).astype(jnp.uint32) * jnp.uint32(0x9E3779B9)
    return (index >> 8).astype(jnp.float32) * jnp.float32(2.0**-24)


def check_block_size(block_size: Any) -> None:
    """Raises TypeError or ValueError unless ``block_size`` is an int of at least 1."""
    if not isinstance(block_size, int) or isinstance(block_size, bool):
        raise TypeError(f"block_size must be an int of at least 1, got {block_size!r}")
    if block_size < 1:
        raise ValueError(f"block_size must be an int of at least 1, got {block_size}")


def _dividing(size: int, most: int) -> int:
    """The largest divisor of a size up to ``most``; ``most`` itself if only a fourth is left."""
    most = max(1, min(size, most))
    return next((d for d in range(most, most // 4, -1) if size % d == 0), most)


def _in_blocks(array: jax.Array, block_size: int) -> jax.Array:
    """(..., m, n) as (..., m / rows, rows, n / columns, columns), padded with zeros."""
    rows, columns = block_shape(array.shape, block_size)
    *stack, m, n = array.shape if array.ndim > 1 else (1, *array.shape)
    matrix = array.reshape(*stack, m, n)
    if m % rows or n % columns:
        matrix = jnp.pad(matrix, [(0, 0)] * len(stack) + [(0, -m % rows), (0, -n % columns)])
    return matrix.reshape(*stack, -(-m // rows), rows, -(-n // columns), columns)


def _out_of_blocks(blocks: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The array of that shape, its padding cut off."""
    *stack, a, rows, b, columns = blocks.shape
    matrix = blocks.reshape(*stack, a * rows, b * columns)
    m = shape[-2] if len(shape) > 1 else 1
    return matrix[..., :m, : shape[len(shape) - 1]].reshape(shape)


def _dynamic_step(share: jax.Array, top: int, up: jax.typing.ArrayLike) -> jax.Array:
    """The code of a share in [0, 1]; ``top`` is 6 for the signed map and 7 for the unsigned one.

    Values are numbered from the smallest on; that of bin j of the decade with ``2**e`` bins, e up
    to ``top``, has the number ``2**e + j``. Position within a decade is bent where a neighbour
    belongs to the decade below or above, so that between any two values it is linear.
    """
    fewest, most = 2.0 ** (top - _DECADES), 2.0**top
    bins = jnp.full_like(share, most)
    for decades in (3, 2, 1):  # together as many as there are below the first one
        small = share < 10.0**-decades
        share = jnp.where(small, share * 10.0**decades, share)
        bins = jnp.where(small, bins * 2.0**-decades, bins)
    at = (share / 0.9 - 1 / 9) * bins - 0.5
    slope_below = jnp.where(bins == fewest, 1 / (fewest / 9 + 0.5), 5 / 3)
    slope_beyond = jnp.where(bins == most, 2.0, 1 / 3)
    beyond = jnp.maximum(at - (bins - 1), 0)
    at += jnp.minimum(at, 0) * (slope_below - 1) + beyond * (slope_beyond - 1)
    number = jnp.minimum(bins + jnp.floor(at + up), 2 * most)
    return jnp.maximum(number - (top - _DECADES), 0)


def _dynamic_value(number: jax.Array, top: int) -> jax.Array:
    """The value with that number: ``10**(e - top) * (0.1 + 0.9 * (j + 0.5) / 2**e)``."""
    of = jnp.maximum(number, 1).astype(jnp.float32)
    exponent = (jax.lax.bitcast_convert_type(of, jnp.int32) >> 23) - 127
    bins = _power_of_two(exponent)
    power = jnp.where(exponent & 1, 5.0, 1.0)
    power *= jnp.where(exponent & 2, 25.0, 1.0)
    power *= jnp.where(exponent & 4, 625.0, 1.0)
    value = (18 * of - 16 * bins + 9) * power / (2 * 10.0 ** (top + 1))
    value = jnp.where(number >= 2 ** (top + 1), 1.0, value)
    # Not a choice between this and 0: XLA may keep an array of zeros from elsewhere for it.
    return value * jnp.minimum(number, 1)


def _power_of_two(exponent: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type((exponent + 127) << 23, jnp.float32)


def _small_int(whole: jax.Array) -> jax.Array:
    """Whole float32 numbers from 0 to 2**22 as int32; faster than the conversion, which saturates.

    Added to 2**23 they are the last bits of the sum.
    """
    return jax.lax.bitcast_convert_type(whole + 2.0**23, jnp.int32) & 0x7FFFFF
