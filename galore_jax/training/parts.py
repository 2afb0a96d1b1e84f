"""Micro-batches side by side, layers in stacks, and trees in groups of leaves."""

from collections.abc import Callable, Sequence
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


def assembled(treedef: Any, *groups: tuple[Sequence[int], Sequence[Any]]) -> Any:
    """A tree from groups of its leaves, each with their indices.

    >>> assembled(jax.tree.structure([0, 0]), ([1], ["b"]), ([0], ["a"]))
    ['a', 'b']
    """
    by_index: dict[int, Any] = {}
    for kept, leaves in groups:
        by_index |= dict(zip(kept, leaves, strict=True))
    return treedef.unflatten([by_index[i] for i in range(len(by_index))])


def at(index: jax.Array, stacks: Sequence[jax.Array]) -> list[jax.Array]:
    """One layer of each stack.

    >>> at(jnp.int32(1), [jnp.arange(3)])[0].item()
    1
    """
    return [jax.lax.dynamic_index_in_dim(stack, index, keepdims=False) for stack in stacks]


def put(
    index: jax.Array, stacks: Sequence[jax.Array], values: Sequence[jax.Array]
) -> list[jax.Array]:
    """The stacks with one layer of each exchanged.

    >>> put(jnp.int32(1), [jnp.arange(3)], [jnp.int32(7)])[0].tolist()
    [0, 7, 2]
    """
    return [
        jax.lax.dynamic_update_index_in_dim(stack, value, index, 0)
        for stack, value in zip(stacks, values, strict=True)
    ]
