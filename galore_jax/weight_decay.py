"""Decoupled weight decay, found in any optimizer's update by differentiation."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from galore_jax.projection import Projector, project_back
from galore_jax.weights import MatrixSpec


def update_and_decay(
    optimizer: optax.GradientTransformationExtraArgs,
    updates: optax.Updates,
    state: optax.OptState,
    params: optax.Params | None,
    specs: Any,
    copies: Sequence[int] = (),
    **extra_args: Any,
) -> tuple[optax.Updates, Any, optax.OptState]:
    """Runs an optimizer and finds each leaf's coefficient c of decoupled weight decay.

    Decoupled decay (Loshchilov and Hutter 2019, arXiv:1711.05101) adds ``c * params`` to an update,
    so that its derivative along a vector of ones is c in every entry. Trust ratios and parameter
    scales also read params, but not uniformly over a leaf: for them c is zero. In a matrix of one
    entry every slope is uniform; there a decay is known by its slope being the same at a weight of
    zero. An optimizer that keeps copies of the weights compares the two: both are shifted, and the
    difference cancels.

    Args:
      optimizer: the optimizer.
      updates: gradients, a tree of arrays.
      state: the optimizer's state.
      params: the tree of weights that it sees, or None.
      specs: how each leaf is projected; None for leaves whose coefficient is not wanted.
      copies: indices of the arrays of the flat state that are copies of the selected leaves.
      extra_args: the update's other arguments.

    Returns:
      The updates; for each selected leaf a () coefficient, or None if its update does not depend
      on params, and None for the others; and the new state.

    >>> import jax.numpy as jnp, optax
    >>> tx = optax.with_extra_args_support(optax.adamw(1.0, weight_decay=0.25))
    >>> params = {"w": jnp.array([[1.0, 2.0]])}
    >>> specs = {"w": MatrixSpec((1, 2), (), (0,), (1,), "left", 1)}
    >>> update_and_decay(tx, params, tx.init(params), params, specs)[1]
    {'w': Array(-0.25, dtype=float32)}
    """
    if params is None:
        steps, state = optimizer.update(updates, state, None, **extra_args)
        return steps, jax.tree.map(lambda _: None, steps), state
    weights, treedef = jax.tree.flatten(params)
    spec = treedef.flatten_up_to(specs)
    chosen = [i for i in range(len(weights)) if spec[i] is not None]
    arrays, state_treedef = jax.tree.flatten(state)
    reads_params: set[int] = set()

    def update(chosen_weights: list[Any], copied: list[Any]) -> tuple[list[Any], Any]:
        seen = replaced(weights, chosen, chosen_weights)
        stored = state_treedef.unflatten(replaced(arrays, copies, copied))
        new = optimizer.update(updates, stored, treedef.unflatten(seen), **extra_args)
        leaves = treedef.flatten_up_to(new[0])
        return [note_tangent(leaves[i], i, reads_params) for i in chosen], new

    primals = [weights[i] for i in chosen], [arrays[i] for i in copies]
    ones = jax.tree.map(jnp.ones_like, primals)
    _, slopes, (new_updates, new_state) = jax.jvp(update, primals, ones, has_aux=True)
    if any(math.prod(spec[i].low_shape[-2:]) == 1 for i in reads_params):
        zeros = jax.tree.map(jnp.zeros_like, primals)
        _, slopes_at_zero, _ = jax.jvp(update, zeros, ones, has_aux=True)
    else:
        slopes_at_zero = slopes

    decay: list[jax.Array | None] = [None] * len(weights)
    for i, slope, at_zero in zip(chosen, slopes, slopes_at_zero, strict=True):
        if i in reads_params:
            first = slope.ravel()[0]
            is_decay = (slope == first).all()
            if math.prod(spec[i].low_shape[-2:]) == 1:
                is_decay &= (at_zero == first).all()
            decay[i] = jnp.where(is_decay, first, jnp.zeros_like(first))
    return new_updates, treedef.unflatten(decay), new_state


def bring_back(
    spec: MatrixSpec,
    step: jax.Array,
    scale: Any,
    projector: Projector,
    decay: jax.Array | None,
    low_weight: Any,
    weight: Any,
) -> jax.Array:
    """Brings one leaf's low-rank update back, and completes the decay of its whole weight.

    The low-rank update holds ``c P^T W``; the decay is to be ``c W``, free of ``scale``.

    Args:
      spec: how the leaf is projected.
      step: the update of the shape of R, decay included.
      scale: the factor on the update, () or (*stack, 1, 1).
      projector: P.
      decay: c, (), or None.
      low_weight: the weight as the optimizer sees it, of the shape of R.
      weight: the leaf.

    Returns:
      The update of the leaf's shape, in the dtype of ``step``.
    """
    if decay is None:
        back = scale * project_back(step, projector, spec.side)
    else:
        back = scale * project_back(step - decay * low_weight, projector, spec.side)
        back += decay * spec.to_matrix(weight)
    return spec.from_matrix(back.astype(step.dtype))


def replaced(values: Sequence[Any], positions: Sequence[int], new: Sequence[Any]) -> list[Any]:
    """Exchanges the values at some positions.

    >>> replaced([1, 2], [1], [3])
    [1, 3]
    """
    by_position = dict(zip(positions, new, strict=True))
    return [by_position.get(i, value) for i, value in enumerate(values)]


def note_tangent(leaf: jax.Array, index: int, found: set[int]) -> jax.Array:
    """Returns the leaf as it is; its index goes to ``found`` if differentiation reaches it."""

    @jax.custom_jvp
    def note(leaf: jax.Array) -> jax.Array:
        return leaf

    @note.defjvp
    def _(primals, tangents):
        found.add(index)
        return primals[0], tangents[0]

    return note(leaf)
