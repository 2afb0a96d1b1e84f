"""Stochastic rounding: its noise, and updates of bfloat16 weights that are not lost."""

from typing import Literal, get_args

import jax
import jax.numpy as jnp
import optax

Rounding = Literal["nearest", "stochastic"]
ROUNDINGS: tuple[Rounding, ...] = get_args(Rounding)


def dithering(
    shape: tuple[int, ...], count: jax.typing.ArrayLike, seed: jax.typing.ArrayLike = 0
) -> jax.Array:
    """TODO"""
    index, stride = jnp.zeros(shape, jnp.uint32), 1
    for axis in reversed(range(len(shape))):
        index += jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * jnp.uint32(stride % 2**32)
        stride *= shape[axis]
    count = jnp.asarray(count).astype(jnp.uint32)
    # The finaliser of MurmurHash3 (public domain).
    index ^= index >> 16
    index *= jnp.uint32(0x85EBCA6B)
    index ^= index >> 13
    index *= jnp.uint32(0xC2B2AE35)
    index ^= index >> 16
    index += jnp.asarray(count).astype(jnp.uint32) * jnp.uint32(0x9E3779B9)
    return (index >> 8).astype(jnp.float32) * jnp.float32(2.0**-24)


def apply_updates(
    params: optax.Params,
    updates: optax.Updates,
    count: jax.typing.ArrayLike,
    rounding: Rounding = "stochastic",
) -> optax.Params:
    """``optax.apply_updates`` with a choice of how sums are rounded to bfloat16.

    A bfloat16 weight has eight bits: rounded to nearest, an update below a 256th to a 512th of it
    is lost, every time. Stochastic rounding takes the upper neighbour in proportion to nearness, so
    that weights move by the updates on average. Its noise is
    :func:`galore_jax.quantization.dithering`, a function of the count alone.

    Args:
      params: the weights; those of other dtypes than bfloat16 are rounded to nearest.
      updates: what is added, of the same structure.
      count: number of updates before this one, () int.
      rounding: ``"nearest"`` or ``"stochastic"``.

    Returns:
      The new weights, in their dtypes.

    >>> import jax.numpy as jnp
    >>> weights = jnp.ones(10_000, jnp.bfloat16)
    >>> for count in range(8):
    ...     weights = apply_updates(weights, jnp.full(10_000, 2.0**-10), count)
    >>> round((weights.astype(jnp.float32).mean().item() - 1) * 2**10, 1)
    8.0
    """
    if rounding not in ROUNDINGS:
        raise ValueError(f"rounding must be one of {', '.join(ROUNDINGS)}, got {rounding!r}")
    if rounding == "nearest":
        return optax.apply_updates(params, updates)

    def apply(weight: jax.Array, update: jax.Array) -> jax.Array:
        if weight.dtype != jnp.bfloat16:
            return jnp.asarray(weight + update).astype(weight.dtype)
        total = weight.astype(jnp.float32) + update.astype(jnp.float32)
        return to_bfloat16(total, dithering(total.shape, count))

    return jax.tree.map(apply, params, updates)


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
