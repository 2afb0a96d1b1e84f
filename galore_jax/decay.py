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
      extra_args: passed on to its ``update``.

    Returns:
      The updates; a tree of () coefficients, with None for a leaf whose update does not depend on
      params; and the new state.

    >>> import jax.numpy as jnp, optax
    >>> tx = optax.with_extra_args_support(optax.adamw(1.0, weight_decay=0.25))
    >>> params = {"w": jnp.array([1.0, 2.0])}
    >>> _, decay, _ = update_and_decay(tx, params, tx.init(params), params, {})
    >>> float(decay["w"])
    -0.25
    """
    reads_params: set[int] = set()

    def inner_update(params: optax.Params) -> tuple[optax.Updates, optax.OptState]:
        new_updates, new_state = inner.update(updates, state, params, **extra_args)
        leaves, treedef = jax.tree.flatten(new_updates)
        noted = [_note_tangent(leaf, i, reads_params) for i, leaf in enumerate(leaves)]
        return treedef.unflatten(noted), new_state

    ones = jax.tree.map(jnp.ones_like, params)
    new_updates, slope, new_state = jax.jvp(inner_update, (params,), (ones,), has_aux=True)

    def coefficient(i: int, slope: jax.Array) -> jax.Array | None:
        if i not in reads_params:
            return None
        first = slope.ravel()[0]
        return jnp.where((slope == first).all(), first, jnp.zeros_like(first))

    leaves, treedef = jax.tree.flatten(slope)
    decay = treedef.unflatten([coefficient(i, leaf) for i, leaf in enumerate(leaves)])
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
