"""A change of basis: new projectors, and what of an optimizer's state follows them."""

import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from galore_jax import projection
from galore_jax.inner_state import at_nodes
from galore_jax.matrices import Matrix
from galore_jax.projection import Projector
from galore_jax.quantization import dequantize_tree, is_quantized, quantize_like
from galore_jax.stacks import one_by_one

# Of the leaves that are projected, by their index in the flat tree.
Leaves = Mapping[int, jax.Array]
Projectors = Mapping[int, Projector]
Refresh = bool | jax.Array | Literal["only"] | None


def refreshed_if(
    refresh: Any,
    find_basis: Callable[..., Projector],
    projectors: Projectors,
    inner_state: optax.OptState,
    gradients: Leaves,
    weights: Leaves,
    matrices: Mapping[int, Matrix],
    copies: Mapping[int, int],
    moments: Mapping[int, int],
) -> tuple[Projectors, optax.OptState]:
    """New bases if ``refresh``, and what of the optimizer's state follows them.

    Matrices of a stack have their turns one after the other. One whose gradient has a NaN or an
    infinity keeps all that it had.

    Args:
      refresh: a bool, or a traced one.
      find_basis: :func:`galore_jax.bases.find_basis` with its basis and key.
      projectors: those so far, as they are stored.
      inner_state: the wrapped optimizer's.
      gradients: full ones, as matrices.
      weights: full ones, as matrices, where there are copies.
      matrices: how each is projected.
      copies: positions of copies of the weights in the flat inner state, with their leaves.
      moments: the same of first moments, a quantised array counting as one.

    Raises:
      TypeError: a ``refresh`` that is no bool.
    """
    nodes, treedef = jax.tree.flatten(inner_state, is_leaf=is_quantized)
    copies = at_nodes(nodes, copies)
    owners = {**copies, **moments}
    followers = {position: nodes[position] for position in owners}

    def refreshed(
        operands: tuple[Projectors, Mapping[int, Any]],
    ) -> tuple[Projectors, Mapping[int, Any]]:
        stored, followers = operands
        kept, moved = {}, {}
        for i, matrix in matrices.items():
            mine = {p: x for p, x in followers.items() if owners[p] == i}
            copied = {p for p in mine if p in copies}
            one = functools.partial(_refreshed, find_basis, matrix, copied)
            of_matrix = stored[i], gradients[i], weights.get(i), mine
            kept[i], new = one_by_one(one, of_matrix, depth=len(matrix.stack_shape))
            moved |= new
        return kept, moved

    operands = projectors, followers
    if isinstance(refresh, bool | np.bool_):
        projectors, followers = refreshed(operands) if refresh else operands
    elif jnp.shape(refresh) == () and jnp.issubdtype(jnp.result_type(refresh), jnp.bool_):
        projectors, followers = jax.lax.cond(refresh, refreshed, lambda same: same, operands)
    else:
        raise TypeError(f"refresh must be a bool, a () bool array or None, got {refresh!r}")
    return projectors, treedef.unflatten(replaced(nodes, followers))


def is_only(refresh: Refresh) -> bool:
    """Whether bases alone are to change.

    >>> is_only("only"), is_only(True)
    (True, False)
    """
    return isinstance(refresh, str) and refresh == "only"


def check_not_due(refresh: Any, count: Any, update_proj_gap: Any) -> None:
    """Projected gradients cannot change the basis: they must come where it is not due."""
    concrete = not isinstance(count, Tracer) and refresh is None
    if not concrete or count % update_proj_gap == 0:
        raise ValueError(
            "a new basis needs the full gradients, and these are projected: give full ones with "
            "refresh=True, projected ones with refresh=False"
        )


def where(condition: jax.Array, new: jax.Array, old: jax.Array) -> jax.Array:
    """The new array, in the old one's dtype, where a condition holds.

    >>> where(jnp.array(True), jnp.ones(1), jnp.zeros(1, jnp.int32)).tolist()
    [1]
    """
    return jnp.where(condition, new.astype(old.dtype), old)


def replaced(leaves: Sequence[Any], by: Mapping[int, Any]) -> list[Any]:
    """Some leaves exchanged, by their index.

    >>> replaced([1, 2], {1: 3})
    [1, 3]
    """
    return [by.get(i, leaf) for i, leaf in enumerate(leaves)]


def _refreshed(
    find_basis: Callable[..., Projector],
    matrix: Matrix,
    copied: Collection[int],
    operands: tuple[Projector, jax.Array, jax.Array | None, Mapping[int, Any]],
) -> tuple[Projector, Mapping[int, Any]]:
    """One matrix's new basis, and what follows it: copies of the weight, and first moments."""
    stored, gradient, weight, followers = operands
    old, side = dequantize_tree(stored), matrix.side
    finite = jnp.isfinite(gradient).all()
    keep = functools.partial(where, finite)
    clean = jnp.where(finite, gradient, 0)
    basis = find_basis(clean, matrix.rank, side, old=old)
    kept = jax.tree.map(keep, quantize_like(stored, basis), stored)
    new = dequantize_tree(kept)
    moved = {}
    for position, follower in followers.items():
        array = dequantize_tree(follower)
        if position in copied:
            assert weight is not None
            before, after = (
                projection.project(weight.astype(array.dtype), p, side) for p in (old, new)
            )
            there = after + projection.transport(array - before, old, new, side)
        else:
            there = projection.transport(array, old, new, side)
        moved[position] = jax.tree.map(keep, quantize_like(follower, there), follower)
    return kept, moved
