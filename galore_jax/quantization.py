r"""Arrays in 8 or 4 bits: codes of the array's own shape, and a float32 scale for each block.

A block is a tile of at most ``block_size`` values of the last two axes, mostly neighbours along the
last, see ``galore_jax.blocks.block_shape``. Axes before these are never joined: slicing and mapping
a stack of matrices does the same to codes and scales. The scale of a block is its largest
magnitude, and a code stands for a value of its encoding times that:

| encoding | codes | values |
|---|---|---|
| adaptive | int8 | sign and $v_k$, $0 \le k \le 127$ |
| adaptive_root | uint8 | $v_k^2$, $0 \le k \le 255$; the scale is that of the root |
| int8 | int8 | $k / 127$, $-127 \le k \le 127$ |
| int4 | int4 | $k / 7$, $-7 \le k \le 7$ |

The adaptive values from $v_0 = 0$ to 1 lie nearly evenly on a logarithmic scale, as floats of
few bits do, and each block has its own step. The step is one of 64, from 64 to 4.1 values for a
factor of two (half as many for ``adaptive``), and the finest one that reaches down to the smallest
magnitude of the block: the finest reaches down by a factor of 2**4, the coarsest by 2**61. The last
six bits of the scale say which (a scale is then off by at most 8e-6 of itself). Values are found,
and codes decoded, by arithmetic on the bits of floats: no table is searched or gathered from.

``adaptive_root`` encodes the square root: a second moment enters Adam under a root, so that is
where its precision is wanted. Zero, and zero alone, has its code zero. ``adaptive`` rounds what is
smaller than its smallest value to zero or to that value.
"""

from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp

from galore_jax.blocks import (
    BLOCK_SIZE,
    check_block_size,
    in_blocks,
    out_of_blocks,
    scales_shape,
)
from galore_jax.sharding import zeros_beside

Encoding = Literal["adaptive", "adaptive_root", "int8", "int4"]
ENCODINGS: tuple[Encoding, ...] = get_args(Encoding)

_LEVELS = {"int8": 127, "int4": 7}
_TOP = {"adaptive": 127, "adaptive_root": 255}
_FINEST = {"adaptive": 1 << 18, "adaptive_root": 1 << 17}  # steps, in the bits of float32
_TINY = float(jnp.finfo(jnp.float32).tiny)  # smaller scales are zero: dividing by them is not safe
_ONE = 0x3F800000  # the bits of 1.0
_STEPS = 63  # the bits of a scale that say which step


class Quantized(NamedTuple):
    """A quantised array, a pytree of two arrays.

    It is a named tuple so that ``flax.serialization``, which knows these, can write and read it.

    Attributes:
      codes: of the array's shape; int8, uint8 or int4.
      scales: float32; of the array's shape with the last two axes divided by
        ``galore_jax.blocks.block_shape``, rounded up.
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


def _flatten_with_keys(node: Quantized) -> tuple[Iterable[tuple[Any, Any]], tuple[Any, ...]]:
    keys = map(jax.tree_util.GetAttrKey, ("codes", "scales"))
    return tuple(zip(keys, node[:2], strict=True)), node[2:]


jax.tree_util.register_pytree_with_keys(
    Quantized,
    _flatten_with_keys,
    lambda static, arrays: Quantized(*arrays, *static),
    lambda node: (node[:2], node[2:]),
)


def is_quantized(node: Any) -> bool:
    """Whether a node is a ``Quantized``, as ``is_leaf`` of ``jax.tree`` takes it.

    >>> is_quantized(1.0)
    False
    """
    return isinstance(node, Quantized)


def code_dtype(encoding: Encoding) -> Any:
    """Returns the dtype of an encoding's codes.

    Raises:
      ValueError: no encoding of that name.

    >>> code_dtype("adaptive_root")
    <class 'jax.numpy.uint8'>
    """
    if encoding not in ENCODINGS:
        raise ValueError(f"encoding must be one of {', '.join(ENCODINGS)}, got {encoding!r}")
    return {"adaptive_root": jnp.uint8, "int4": jnp.int4}.get(encoding, jnp.int8)


def quantize(
    array: jax.Array,
    encoding: Encoding = "adaptive",
    *,
    block_size: int = BLOCK_SIZE,
    noise: jax.Array | None = None,
    scales: jax.Array | None = None,
) -> Quantized:
    """Returns the codes and scales nearest to an array, or stochastically rounded ones.

    Args:
      array: (..., m, n) or (n,), of any float dtype; not negative for ``adaptive_root``.
      encoding: see the top of this module.
      block_size: values that share a scale, at least 1.
      noise: of the array's shape, uniform in [0, 1): of the two neighbouring values the upper is
        taken in proportion to nearness, so that the mean is the value itself (its root for
        ``adaptive_root``). None rounds to nearest.
      scales: ``block_scales`` of the array where they are known already.

    Returns:
      The quantised array. Zeros stay zeros. A block with a value that is not finite becomes NaN.

    Raises:
      TypeError, ValueError: a scalar, a block size that is no positive int, an unknown encoding.

    >>> import jax.numpy as jnp
    >>> dequantize(quantize(jnp.array([0.0, -8.0, 127.0]), "int8")).tolist()
    [0.0, -8.0, 127.0]
    """
    if scales is None:
        scales = block_scales(array, encoding, block_size=block_size)
    blocks = in_blocks(_coded(array, encoding), block_size)
    largest = _beside(scales, blocks)
    share = jnp.minimum(jnp.abs(blocks) / jnp.where(largest == 0, jnp.inf, largest), 1)
    up = 0.5 if noise is None else in_blocks(noise, block_size)
    if encoding in _LEVELS:
        level = _LEVELS[encoding]
        number = jnp.minimum(jnp.floor(share * level + up), level)
    else:
        number = _adaptive_number(share, largest, encoding, up)
    if encoding == "adaptive_root":
        number = jnp.maximum(number, (blocks > 0).astype(jnp.float32))
    number = _small_int(number)
    if encoding != "adaptive_root":
        number = jnp.where(blocks < 0, -number, number)
    codes = number.astype(jnp.int8).astype(code_dtype(encoding))
    return Quantized(out_of_blocks(codes, array.shape), scales, encoding, block_size)


def block_scales(
    array: jax.Array,
    encoding: Encoding = "adaptive",
    *,
    block_size: int = BLOCK_SIZE,
    smallest: jax.Array | None = None,
) -> jax.Array:
    """Returns the scales that ``quantize`` gives an array, float32.

    Args:
      array, encoding, block_size: see ``quantize``.
      smallest: of the scales' shape, how far down in each block the values of an adaptive encoding
        have to reach; None for its ``smallest_magnitudes``.

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
    array = _coded(array, encoding)
    blocks = in_blocks(array, block_size)
    # The bits of magnitudes are ordered as they are, NaN last: XLA's maximum of floats may lose it.
    largest = _floats(_bits(jnp.abs(blocks)).max(axis=(-3, -1)))
    scales = largest.reshape(scales_shape(array.shape, block_size))
    scales = jnp.where(scales < _TINY, 0, jnp.where(scales < jnp.inf, scales, jnp.nan))
    if encoding in _LEVELS:
        return scales
    if smallest is None:
        smallest = smallest_magnitudes(array, block_size)
    reach = (_ONE - _bits(jnp.clip(smallest / scales, 0, 1))).astype(jnp.float32)
    step = jnp.maximum(reach / (_TOP[encoding] * _FINEST[encoding]), 1)
    # Floats with four bits after the point have bits in equal steps of 2**19.
    choice = jnp.minimum((_bits(step) - _ONE + (2**19 - 1)) >> 19, _STEPS)
    bits = (_bits(scales) & ~_STEPS) | choice
    return jnp.where(scales > 0, _floats(bits), scales)


def smallest_magnitudes(array: jax.Array, block_size: int = BLOCK_SIZE) -> jax.Array:
    """Returns the smallest magnitude of each block that is not zero, infinite where all are zero.

    >>> import jax.numpy as jnp
    >>> smallest_magnitudes(jnp.array([0.0, -8.0, 2.0])).tolist()
    [2.0]
    """
    blocks = jnp.abs(in_blocks(jnp.asarray(array).astype(jnp.float32), block_size))
    smallest = jnp.where(blocks > 0, blocks, jnp.inf).min(axis=(-3, -1))
    return smallest.reshape(scales_shape(array.shape, block_size))


def _coded(array: jax.Array, encoding: Encoding) -> jax.Array:
    """Returns what the codes encode: the float32 array, or its root."""
    array = jnp.asarray(array).astype(jnp.float32)
    return jnp.sqrt(array) if encoding == "adaptive_root" else array


def quantized_zeros(
    leaf: Any,
    axes: Sequence[int | None],
    shape: tuple[int, ...],
    encoding: Encoding,
    block_size: int = BLOCK_SIZE,
) -> Quantized:
    """Returns zeros, sharded as the given axes of a leaf, see ``galore_jax.sharding.zeros_beside``.

    >>> import jax.numpy as jnp
    >>> quantized_zeros(jnp.ones((8, 600)), (0, 1), (8, 600), "adaptive").scales.shape
    (8, 3)
    """
    codes = zeros_beside(leaf, axes, shape, code_dtype(encoding))
    scales = zeros_beside(leaf, axes, scales_shape(shape, block_size), jnp.float32)
    return Quantized(codes, scales, encoding, block_size)


def dequantize(quantized: Quantized) -> jax.Array:
    """Returns the float32 array that a quantised one stands for.

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
    blocks = in_blocks(quantized.codes, block_size)
    scales = _beside(quantized.scales, blocks)
    number = blocks.astype(jnp.int32)
    if quantized.encoding in _LEVELS:
        values = number.astype(jnp.float32) * (scales / _LEVELS[quantized.encoding])
    else:
        zero, step = _adaptive_grid(scales, quantized.encoding)
        zero_value = _floats(zero)
        values = (_floats(zero + jnp.abs(number) * step) - zero_value) * (scales / (1 - zero_value))
    if quantized.encoding == "adaptive":
        values = jnp.where(number < 0, -values, values)
    elif quantized.encoding == "adaptive_root":
        # Squares must not vanish either.
        values = jnp.maximum(values * values, jnp.minimum(values, _TINY))
    return out_of_blocks(values, shape)


def _beside(scales: jax.Array, blocks: jax.Array) -> jax.Array:
    """Returns scales in a shape that broadcasts to blocks."""
    return scales.reshape(*blocks.shape[:-3], 1, blocks.shape[-2], 1)


def _adaptive_grid(scales: jax.Array, encoding: Encoding) -> tuple[jax.Array, jax.Array]:
    """Returns the bits of the float that stands for zero, and the step to the next, both int32."""
    choice = _bits(scales) & _STEPS
    step = ((16 + (choice & 15)) << (choice >> 4)) * (_FINEST[encoding] // 16)
    return _ONE - _TOP[encoding] * step, step


def _adaptive_number(
    share: jax.Array, scales: jax.Array, encoding: Encoding, up: jax.typing.ArrayLike
) -> jax.Array:
    """Returns the whole number k, in float32, of the value of shares in [0, 1]."""
    top = _TOP[encoding]
    zero, step = _adaptive_grid(scales, encoding)
    zero_value = _floats(zero)
    share = share * (1 - zero_value) + zero_value
    below = jnp.floor((_bits(share) - zero).astype(jnp.float32) / step.astype(jnp.float32))
    below_bits = zero + _small_int(jnp.minimum(below, top)) * step
    value = _floats(below_bits)
    between = (share - value) / (_floats(below_bits + step) - value)
    return jnp.minimum(below + jnp.floor(between + up), top)


def _bits(floats: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(floats, jnp.int32)


def _floats(bits: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def _small_int(whole: jax.Array) -> jax.Array:
    """Returns whole float32 numbers from 0 to 2**22 as int32, faster than the conversion.

    The conversion saturates. Added to 2**23 the numbers are the last bits of the sum.
    """
    return _bits(whole + 2.0**23) & 0x7FFFFF
