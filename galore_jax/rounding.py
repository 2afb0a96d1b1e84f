"""Stochastic rounding: its noise, and updates of short weights that are not lost."""

import math
import zlib
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import optax

from galore_jax.int8_kernels import add, is_int8

Rounding = Literal["nearest", "stochastic"]
ROUNDINGS: tuple[Rounding, ...] = get_args(Rounding)


_PERIOD_BITS = 6  # the noise covers [0, 1) evenly in 2**6 counts


def dithering(
    shape: tuple[int, ...],
    count: jax.typing.ArrayLike,
    *,
    seed: int = 0,
    layer: jax.typing.ArrayLike = 0,
) -> jax.Array:
    """Returns noise for rounding that covers [0, 1) evenly in any aligned 64 counts.

    Each value goes through the 64 parts of [0, 1) in an order drawn anew, by a hash of its index,
    every 64 counts. A change too small for the code is then made once in so many updates, with less
    noise than independent random numbers have. Counts any number apart are no likelier to meet like
    noise than independent numbers are, so that nothing resonates with periodic gradients.

    Args:
      shape: of the noise.
      count: updates so far, () int.
      seed: arrays that are to have noise of their own have seeds far apart.
      layer: the place in a stack of layers of this shape whose noise is asked for, () int.

    Returns:
      float32 of that shape, uniform in [0, 1).

    >>> noise = dithering((1000,), 3)
    >>> abs(noise.mean().item() - 0.5) < 0.03
    True
    >>> (dithering((4, 5), 3, layer=2) == dithering((6, 4, 5), 3)[2]).all().item()
    True
    """
    size = math.prod(shape) % 2**32
    first = jnp.asarray(layer).astype(jnp.uint32) * jnp.uint32(size)
    index, stride = jnp.broadcast_to(first, shape), 1
    for axis in reversed(range(len(shape))):
        index += jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * jnp.uint32(stride % 2**32)
        stride *= shape[axis]
    count = jnp.asarray(count).astype(jnp.uint32)
    start = jnp.uint32((0x9E3779B9 + seed) % 2**32)
    key = _hashed(index + _hashed((count >> _PERIOD_BITS) + start))
    # Odd factors and shifts permute the numbers below 64; the key chooses among the orders.
    part = (count + key) * (((key >> 6) & 31) * 2 + 1) & 63
    part = (part ^ (part >> 3)) * (((key >> 11) & 31) * 2 + 1) & 63
    part ^= part >> 3
    number = (part << 18) | (key >> 14)
    return number.astype(jnp.float32) * jnp.float32(2.0**-24)


def _hashed(number: jax.Array) -> jax.Array:
    """Returns the finaliser of MurmurHash3 (public domain) of uint32 numbers."""
    number ^= number >> 16
    number *= jnp.uint32(0x85EBCA6B)
    number ^= number >> 13
    number *= jnp.uint32(0xC2B2AE35)
    return number ^ (number >> 16)


def apply_updates(
    params: optax.Params,
    updates: optax.Updates,
    count: jax.typing.ArrayLike,
    rounding: Rounding = "stochastic",
    *,
    layer: jax.typing.ArrayLike = 0,
) -> optax.Params:
    """``optax.apply_updates`` with a choice of how sums are rounded to bfloat16 and to int8.

    A bfloat16 weight has eight bits: rounded to nearest, an update below a 256th to a 512th of it
    is lost, every time. Stochastic rounding takes the upper neighbour in proportion to nearness, so
    that weights move by the updates on average. Its noise is ``dithering``, a function of the
    count and of each value's place: the path of its leaf, and its index there. Layers that are
    updated one by one get the noise that they would have in their stack.

    Args:
      params: the weights; those of other dtypes than bfloat16 are rounded to nearest, and an
        ``Int8Kernel`` by ``galore_jax.int8_kernels.add``.
      updates: what is added, of the same structure.
      count: number of updates before this one, () int.
      rounding: ``"nearest"`` or ``"stochastic"``.
      layer: where all leaves are one layer of stacks, the index of it, () int.

    Returns:
      The new weights, in their dtypes.

    >>> import jax.numpy as jnp
    >>> weights = jnp.ones(10_000, jnp.bfloat16)
    >>> for count in range(64):
    ...     weights = apply_updates(weights, jnp.full(10_000, 2.0**-13), count)
    >>> round((weights.astype(jnp.float32).mean().item() - 1) * 2**13, 1)
    64.0
    """
    if rounding not in ROUNDINGS:
        raise ValueError(f"rounding must be one of {', '.join(ROUNDINGS)}, got {rounding!r}")

    def noise(path: tuple[Any, ...], update: jax.Array) -> jax.Array:
        seed = zlib.crc32(jax.tree_util.keystr(path).encode())
        return dithering(update.shape, count, seed=seed, layer=layer)

    def apply(path: tuple[Any, ...], weight: Any, update: jax.Array) -> Any:
        if is_int8(weight):
            return add(weight, update, None if rounding == "nearest" else noise(path, update))
        if rounding == "nearest":
            return optax.apply_updates(weight, update)
        if weight.dtype != jnp.bfloat16:
            return jnp.asarray(weight + update).astype(weight.dtype)
        total = weight.astype(jnp.float32) + update.astype(jnp.float32)
        return to_bfloat16(total, noise(path, update))

    return jax.tree_util.tree_map_with_path(apply, params, updates, is_leaf=is_int8)


def to_bfloat16(array: jax.Array, noise: jax.Array) -> jax.Array:
    """A float32 array in bfloat16, rounded up in magnitude where the lost part exceeds the noise.

    Args:
      array: float32.
      noise: of its shape, uniform in [0, 1).

    >>> import jax.numpy as jnp
    >>> to_bfloat16(jnp.full(2, 1 + 2.0**-9), jnp.array([0.2, 0.9])).tolist()
    [1.0, 1.0078125]
    """
    bits = jax.lax.bitcast_convert_type(array, jnp.uint32)
    bits += (noise * 65536).astype(jnp.uint32)
    rounded = jax.lax.bitcast_convert_type(bits & jnp.uint32(0xFFFF0000), jnp.float32)
    return jnp.where(jnp.isfinite(array), rounded, array).astype(jnp.bfloat16)
