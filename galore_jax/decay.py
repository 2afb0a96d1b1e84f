"""Decoupled weight decay, found in any optimizer's update by differentiation."""

from typing import Any

import jax
import jax.numpy as jnp
import optax


def update_and_decay(
    inner: optax.GradientTransformationExtraArgs,
    updates: optax.Updates,
    state: optax.OptState,
    params: optax.Params,
    selected: Any,
    extra_args: dict[str, Any],
) -> tuple[optax.Updates, Any, optax.OptState]:
    """An optimizer's update and, for each leaf, its coefficient c of decoupled weight decay.

    Decoupled decay (Loshchilov and Hutter 2019, arXiv:1711.05101) adds ``c * params`` to an update,
    so that its derivative along a vector of ones is c in every entry. Trust ratios and parameter
    scales also read params, but not uniformly over a leaf: for them c is zero.

    Args:
      inner: the optimizer.
      updates: gradients, a tree of arrays.
      state: the optimizer's state.
      params: the tree of weights that it sees.
      selected: the leaves whose coefficient is wanted, a tree of bools.
      extra_args: passed on to its ``update``.

    Returns:
      The updates; a tree of () coefficients, with None for a leaf that is not selected or whose
      update does not depend on params; and the new state.

    >>> import jax.numpy as jnp, optax
    >>> tx = optax.with_extra_args_support(optax.adamw(1.0, weight_decay=0.25))
    >>> params = {"w": jnp.array([1.0, 2.0])}
    >>> _, decay, _ = update_and_decay(tx, params, tx.init(params), params, {"w": True}, {})
    >>> float(decay["w"])
    -0.25
    """
    weights, treedef = jax.tree.flatten(params)
    chosen = [i for i, wanted in enumerate(jax.tree.leaves(selected)) if wanted]
    reads_params: set[int] = set()

    def inner_update(of_chosen: list[jax.Array]) -> tuple[list[jax.Array], Any]:
        seen = list(weights)
        for i, weight in zip(chosen, of_chosen, strict=True):
            seen[i] = weight
        new_updates, new_state = inner.update(updates, state, treedef.unflatten(seen), **extra_args)
        leaves = jax.tree.leaves(new_updates)
        noted = [_note_tangent(leaves[i], i, reads_params) for i in chosen]
        return noted, (new_updates, new_state)

    primals = [weights[i] for i in chosen]
    ones = [jnp.ones_like(weight) for weight in primals]
    _, slopes, (new_updates, new_state) = jax.jvp(inner_update, (primals,), (ones,), has_aux=True)

    decay: list[jax.Array | None] = [None] * len(weights)
    for i, slope in zip(chosen, slopes, strict=True):
        if i in reads_params:
            first = slope.ravel()[0]
            decay[i] = jnp.where((slope == first).all(), first, jnp.zeros_like(first))
    return new_updates, treedef.unflatten(decay), new_state


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
