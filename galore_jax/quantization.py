"""Arrays in 8 or 4 bits: codes of the array's own shape, and a float32 scale for each block.

A block is a tile of at most ``block_size`` values of the last two axes, mostly neighbours along the
last, see ``galore_jax.blocks.block_shape``. Axes before these are never joined: slicing and mapping
a stack of matrices does the same to codes and scales. The encodings are in
``galore_jax.encodings``.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from galore_jax.blocks import (
    BLOCK_SIZE,
    check_block_size,
    in_blocks,
    out_of_blocks,
    scales_shape,
)
from galore_jax.encodings import (
    Encoding,
    block_scales,
    code_dtype,
    decode_blocks,
    decode_roots,
    encode_blocks,
)
from galore_jax.sharding import zeros_beside


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


class FirstMoment(NamedTuple):
    """A quantised first moment with the second one, to whose root its codes are a ratio.

    An update of Adam is such a ratio, so that this is where precision is wanted: of gradients whose
    sizes differ by many decades, the ratios do not.

    Attributes:
      ratio: what its codes stand for times the root of ``second`` is the moment.
      second: the second moment, at least 0; where it is zero, so is the first.
    """

    ratio: Quantized
    second: Quantized

    @property
    def shape(self) -> tuple[int, ...]:
        """The moment's shape."""
        return self.ratio.shape


def is_quantized(node: Any) -> bool:
    """Whether a node is a ``Quantized`` or ``FirstMoment``; for ``is_leaf`` of ``jax.tree``.

    >>> is_quantized(1.0)
    False
    """
    return isinstance(node, Quantized | FirstMoment)


def quantize(
    array: jax.Array,
    encoding: Encoding = "int8",
    *,
    block_size: int = BLOCK_SIZE,
    noise: jax.Array | None = None,
    scales: jax.Array | None = None,
) -> Quantized:
    """Returns the codes and scales nearest to an array, or stochastically rounded ones.

    Args:
      array: (..., m, n) or (n,), of any float dtype; not negative for ``adaptive_root``.
      encoding: see the top of ``galore_jax.encodings``.
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
    code_dtype(encoding)
    check_block_size(block_size)
    if jnp.ndim(array) == 0:
        raise ValueError("a scalar has no blocks to quantise; keep it as it is")
    blocks = in_blocks(jnp.asarray(array).astype(jnp.float32), block_size)
    if scales is None:
        scales = block_scales(blocks, encoding).reshape(scales_shape(array.shape, block_size))
    noise = None if noise is None else in_blocks(noise, block_size)
    codes = encode_blocks(blocks, encoding, scales, noise)
    return Quantized(out_of_blocks(codes, array.shape), scales, encoding, block_size)


def quantized_zeros(
    leaf: Any,
    axes: Sequence[int | None],
    shape: tuple[int, ...],
    encoding: Encoding,
    block_size: int = BLOCK_SIZE,
) -> Quantized:
    """Returns zeros, sharded as the given axes of a leaf, see ``galore_jax.sharding.zeros_beside``.

    >>> import jax.numpy as jnp
    >>> quantized_zeros(jnp.ones((8, 600)), (0, 1), (8, 600), "int8").scales.shape
    (8, 3)
    """
    codes = zeros_beside(leaf, axes, shape, code_dtype(encoding))
    scales = zeros_beside(leaf, axes, scales_shape(shape, block_size), jnp.float32)
    return Quantized(codes, scales, encoding, block_size)


def dequantize(quantized: Quantized | FirstMoment) -> jax.Array:
    """Returns the float32 array that a quantised one stands for; for ``ratio``, ratios.

    Raises:
      ValueError: scales that are not those of the codes' shape (a slice through a block).

    >>> import jax.numpy as jnp
    >>> dequantize(quantize(jnp.array([[1.0, -7.0]]), "int4")).tolist()
    [[1.0, -7.0]]
    """
    return out_of_blocks(dequantize_in_blocks(quantized), quantized.shape)


def dequantize_in_blocks(quantized: Quantized | FirstMoment) -> jax.Array:
    """Returns ``dequantize``'s array in the shape of blocks, see ``galore_jax.blocks.in_blocks``.

    >>> import jax.numpy as jnp
    >>> dequantize_in_blocks(quantize(jnp.ones((6, 512)), "int8")).shape
    (6, 1, 2, 256)
    """
    if isinstance(quantized, FirstMoment):
        second = quantized.second
        codes = in_blocks(second.codes, second.block_size)
        return dequantize_in_blocks(quantized.ratio) * decode_roots(codes, second.scales)
    shape, block_size = quantized.shape, quantized.block_size
    expected = scales_shape(shape, block_size)
    if jnp.shape(quantized.scales) != expected:
        raise ValueError(
            f"codes of shape {shape} in blocks of {block_size} have scales of shape {expected}, "
            f"got {jnp.shape(quantized.scales)}"
        )
    codes = in_blocks(quantized.codes, block_size)
    return decode_blocks(codes, quantized.scales, quantized.encoding)


def quantize_like(old: Any, new: jax.Array) -> Any:
    """Returns an array, quantised (to nearest) as the old one is, if it is.

    >>> import jax.numpy as jnp
    >>> quantize_like(quantize(jnp.ones(2), "int8"), jnp.ones(2)).codes.tolist()
    [127, 127]
    """
    if isinstance(old, FirstMoment):
        ratio = ratio_to_root(new, dequantize(old.second))
        return FirstMoment(quantize_like(old.ratio, ratio), old.second)
    if isinstance(old, Quantized):
        return quantize(new, old.encoding, block_size=old.block_size)
    return new


def ratio_to_root(first: jax.Array, second: jax.Array) -> jax.Array:
    """Divides first moments by the roots of second ones; 0 where those are 0.

    >>> import jax.numpy as jnp
    >>> ratio_to_root(jnp.array([3.0, 1.0]), jnp.array([4.0, 0.0])).tolist()
    [1.5, 0.0]
    """
    root = jnp.sqrt(second)
    return jnp.where(root == 0, 0, first / jnp.where(root == 0, 1, root))
