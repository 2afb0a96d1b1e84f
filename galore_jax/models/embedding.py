"""Rows of an embedding table, with a gradient that adds up in float32 in little memory."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from galore_jax.int8_kernels import Int8Kernel, is_int8

_CHUNK = 16 * 2**20  # values of the float32 sum that exist at a time


def embed(table: Any, tokens: jax.Array, dtype: DTypeLike) -> jax.Array:
    """Rows of the table; NaN for ids outside it rather than a wrong row.

    A frequent token's many small gradients are added in float32, and rounded to the table's dtype
    once: some columns at a time, so that no float32 array of a large table's size exists.

    Args:
      table: ``(V, D)``, an array or an ``Int8Kernel``.
      tokens: ids of any shape, int32.
      dtype: of the rows.

    Returns:
      ``(*tokens.shape, D)``.

    >>> embed(jnp.eye(3), jnp.array([2, 0]), "float32").tolist()
    [[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]]
    """
    if is_int8(table):
        return _embed(table.variable, dataclasses.replace(table, variable=None), tokens, dtype)
    return _embed(table, None, tokens, dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _embed(table: Any, codes: Int8Kernel | None, tokens: jax.Array, dtype: DTypeLike) -> jax.Array:
    """Rows of the table, or of the kernel whose variable it is."""
    if codes is not None:
        return codes.rows(tokens, dtype)
    return jnp.take(table, tokens, axis=0, mode="fill").astype(dtype)


def _forward(table, codes, tokens, dtype):
    like = None if table is None else jnp.zeros((table.shape[0], 0), table.dtype)
    return _embed(table, codes, tokens, dtype), (tokens, like)


def _backward(dtype, saved, gradient):
    del dtype
    tokens, like = saved
    if like is None:
        return None, None, None
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
        return summed(gradient), None, None
    total = jnp.zeros((like.shape[0], width), like.dtype)
    return jax.lax.fori_loop(0, math.ceil(width / columns), put, total), None, None


_embed.defvjp(_forward, _backward)
