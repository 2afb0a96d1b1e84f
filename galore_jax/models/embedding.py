"""Rows of an embedding table, with a gradient that adds up in float32 in little memory."""

import functools
import math

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

_CHUNK = 16 * 2**20  # values of the float32 sum that exist at a time


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def embed(table: jax.Array, tokens: jax.Array, dtype: DTypeLike) -> jax.Array:
    """Rows of the table; NaN for ids outside it rather than a wrong row.

    A frequent token's many small gradients are added in float32, and rounded to the table's dtype
    once: some columns at a time, so that no float32 array of a large table's size exists.

    Args:
      table: ``(V, D)``.
      tokens: ids of any shape, int32.
      dtype: of the rows.

    Returns:
      ``(*tokens.shape, D)``.

    >>> embed(jnp.eye(3), jnp.array([2, 0]), "float32").tolist()
    [[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]]
    """
    return jnp.take(table, tokens, axis=0, mode="fill").astype(dtype)


def _forward(table, tokens, dtype):
    return embed(table, tokens, dtype), (tokens, jnp.zeros((table.shape[0], 0), table.dtype))


def _backward(dtype, saved, gradient):
    del dtype
    tokens, like = saved
    ids, width = tokens.reshape(-1), gradient.shape[-1]
    gradient = gradient.reshape(-1, width)
    pieces = math.ceil(like.shape[0] * width / _CHUNK)
    columns = math.ceil(width / pieces)

    def summed(piece: jax.Array) -> jax.Array:
        zeros = jnp.zeros((like.shape[0], piece.shape[1]), jnp.float32)
        return zeros.at[ids].add(piece.astype(jnp.float32), mode="drop").astype(like.dtype)

    def put(i: jax.Array, total: jax.Array) -> jax.Array:
        # The last piece may overlap the one before: both have the same sums there.
        start = jnp.minimum(i * columns, width - columns)
        piece = jax.lax.dynamic_slice_in_dim(gradient, start, columns, axis=1)
        return jax.lax.dynamic_update_slice_in_dim(total, summed(piece), start, axis=1)

    if pieces <= 1:
        return summed(gradient), None
    total = jnp.zeros((like.shape[0], width), like.dtype)
    return jax.lax.fori_loop(0, math.ceil(width / columns), put, total), None


embed.defvjp(_forward, _backward)
