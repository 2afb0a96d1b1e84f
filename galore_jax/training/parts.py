"""Micro-batches side by side, and layers in stacks."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def over_parts(of_part: Callable[[Any], tuple[Any, Any]], parts: Any) -> tuple[Any, Any]:
    """For each part what is to be added up, in float32 if there are several, and what is not.

    >>> total, rest = over_parts(lambda x: (x, 2 * x), jnp.arange(3.0))
    >>> total.item(), rest.tolist()
    (3.0, [0.0, 2.0, 4.0])
    """
    if len(jax.tree.leaves(parts)[0]) == 1:
        total, rest = of_part(jax.tree.map(lambda x: x[0], parts))
        return total, jax.tree.map(lambda x: x[None], rest)

    def add(total: Any, part: Any) -> tuple[Any, Any]:
        this, rest = of_part(part)
        return jax.tree.map(lambda a, b: a + b, total, this), rest

    shapes, _ = jax.eval_shape(of_part, jax.tree.map(lambda x: x[0], parts))
    # Of what XLA does not know for zeros, see galore_jax.models.losses.
    zero = jax.lax.optimization_barrier(jnp.float32(0.0))
    zeros = jax.tree.map(lambda x: jnp.full(x.shape, zero), shapes)
    return jax.lax.scan(add, zeros, parts)


def joined(parts: jax.Array) -> jax.Array:
    """Micro-batches side by side as one batch.

    >>> joined(jnp.zeros((2, 3, 4))).shape
    (6, 4)
    """
    return parts.reshape(-1, *parts.shape[2:])


def at(index: jax.Array, stacks: Any) -> Any:
    """One layer of each stack of a tree.

    >>> at(jnp.int32(1), [jnp.arange(3)])[0].item()
    1
    """
    return jax.tree.map(
        lambda stack: jax.lax.dynamic_index_in_dim(stack, index, keepdims=False), stacks
    )


def put(index: jax.Array, stacks: Any, values: Any) -> Any:
    """A tree of stacks with one layer of each exchanged.

    >>> put(jnp.int32(1), [jnp.arange(3)], [jnp.int32(7)])[0].tolist()
    [0, 7, 2]
    """
    return jax.tree.map(
        lambda stack, value: jax.lax.dynamic_update_index_in_dim(stack, value, index, 0),
        stacks,
        values,
    )
