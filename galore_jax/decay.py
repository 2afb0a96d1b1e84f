"""Decoupled weight decay, found in any optimizer's update by differentiation."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax


def update_and_decay(
    inner: optax.GradientTransformationExtraArgs,
    updates: optax.Updates,
    state: optax.OptState,
    params: optax.Params,
    selected: Sequence[int],
    extra_args: dict[str, Any],
    copies: Sequence[int] = (),
) -> tuple[optax.Updates, list[jax.Array | None], optax.OptState]:
    """An optimizer's update and, for each leaf, its coefficient c of decoupled weight decay.

    Decoupled decay (Loshchilov and Hutter 2019, arXiv:1711.05101) adds ``c * params`` to an update,
    so that its derivative along a vector of ones is c in every entry. Trust ratios and parameter
    scales also read params, but not uniformly over a leaf: for them c is zero. An optimizer that
    keeps copies of the weights compares the two: both are shifted, and the difference cancels.

    Args:
      inner: the optimizer.
      updates: gradients, a tree of arrays.
      state: the optimizer's state.
      params: the tree of weights that it sees.
      selected: indices of the leaves whose coefficient is wanted.
      extra_args: passed on to its ``update``.
      copies: indices of the arrays of the flat state that are copies of the selected leaves.

    Returns:
      The updates; for each selected leaf a () coefficient, or None if its update does not depend
      on params; and the new state.

    >>> import jax.numpy as jnp, optax
    >>> tx = optax.with_extra_args_support(optax.adamw(1.0, weight_decay=0.25))
    >>> params = {"w": jnp.array([1.0, 2.0])}
    >>> _, decay, _ = update_and_decay(tx, params, tx.init(params), params, [0], {})
    >>> decay
    [Array(-0.25, dtype=float32)]
    """
    weights, treedef = jax.tree.flatten(params)
    stored, state_treedef = jax.tree.flatten(state)
    reads_params: set[int] = set()

    def inner_update(
        of_selected: list[jax.Array], of_copies: list[jax.Array]
    ) -> tuple[list[jax.Array], Any]:
        seen, seen_state = list(weights), list(stored)
        for i, weight in zip(selected, of_selected, strict=True):
            seen[i] = weight
        for i, copy in zip(copies, of_copies, strict=True):
            seen_state[i] = copy
        new_updates, new_state = inner.update(
            updates, state_treedef.unflatten(seen_state), treedef.unflatten(seen), **extra_args
        )
        leaves = jax.tree.leaves(new_updates)
        noted = [_note_tangent(leaves[i], i, reads_params) for i in selected]
        return noted, (new_updates, new_state)

    primals = [weights[i] for i in selected], [stored[i] for i in copies]
    ones = jax.tree.map(jnp.ones_like, primals)
    _, slopes, (new_updates, new_state) = jax.jvp(inner_update, primals, ones, has_aux=True)

    decay: list[jax.Array | None] = []
    for i, slope in zip(selected, slopes, strict=True):
        first = slope.ravel()[0]
        uniform = jnp.where((slope == first).all(), first, jnp.zeros_like(first))
        decay.append(uniform if i in reads_params else None)
    return new_updates, decay, new_state


def _note_tangent(leaf: jax.Array, index: int, found: set[int]) -> jax.Array:
    """The leaf as it is; its index goes to ``found`` if differentiation reaches it."""

    @jax.custom_jvp
    def note(leaf: jax.Array) -> jax.Array:
        return leaf

    @note.defjvp
    def _(primals, tangents):
        found.add(index)
        return primals[0], tangents[0]

    return note(leaf)
