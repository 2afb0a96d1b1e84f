"""Updates of bfloat16 weights that are not lost to rounding."""

from typing import Literal, get_args

import jax
import jax.numpy as jnp
import optax

from galore_jax.quantization import dithering

Rounding = Literal["nearest", "stochastic"]
ROUNDINGS: tuple[Rounding, ...] = get_args(Rounding)


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
    ``galore_jax.quantization.dithering``, a function of the count alone.

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
