"""Decoupled weight decay, found in any optimizer's update by differentiation."""

import functools
import math
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from galore_jax.projection import MatrixSpec, Projector


def update_and_decay(
    optimizer: optax.GradientTransformationExtraArgs,
    updates: optax.Updates,
    state: optax.OptState,
    params: optax.Params | None,
    specs: Any,
    copies: Iterable[int] = (),
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
    >>> specs = {"w": MatrixSpec.of_kernel((1, 2), 1)}
    >>> update_and_decay(tx, params, tx.init(params), params, specs)[1]
    {'w': Array(-0.25, dtype=float32)}
    """
    if params is None:
        steps, state = optimizer.update(updates, state, None, **extra_args)
        return steps, jax.tree.map(lambda _: None, steps), state
    weights, treedef = jax.tree.flatten(params)
    arrays, state_treedef = jax.tree.flatten(state)
    spec = dict(enumerate(treedef.flatten_up_to(specs)))
    reads_params: set[int] = set()

    def update(seen: dict[int, Any], copied: dict[int, Any]) -> tuple[dict[int, Any], Any]:
        shifted = treedef.unflatten(replaced(weights, seen))
        stored = state_treedef.unflatten(replaced(arrays, copied))
        new = optimizer.update(updates, stored, shifted, **extra_args)
        steps = treedef.flatten_up_to(new[0])
        return {i: note_tangent(steps[i], i, reads_params) for i in seen}, new

    seen = {i: weights[i] for i in spec if spec[i] is not None}
    primals = seen, {i: arrays[i] for i in copies}
    ones = jax.tree.map(jnp.ones_like, primals)
    _, slopes, (new_updates, new_state) = jax.jvp(update, primals, ones, has_aux=True)
    slopes_at_zero = slopes
    if any(math.prod(spec[i].low_shape[-2:]) == 1 for i in reads_params):
        zeros = jax.tree.map(jnp.zeros_like, primals)
        _, slopes_at_zero, _ = jax.jvp(update, zeros, ones, has_aux=True)

    decay: list[jax.Array | None] = [None] * len(weights)
    for i in sorted(reads_params):
        first = slopes[i].ravel()[0]
        is_decay = (slopes[i] == first).all()
        if math.prod(spec[i].low_shape[-2:]) == 1:
            is_decay &= (slopes_at_zero[i] == first).all()
        decay[i] = jnp.where(is_decay, first, jnp.zeros_like(first))
    return new_updates, treedef.unflatten(decay), new_state


def bring_back(
    scale: Any,
    is_new: Any,
    spec: MatrixSpec,
    step: jax.Array,
    projector: Projector,
    decay: jax.Array | None,
    outside: jax.Array | None,
    low_weight: Any,
    weight: Any,
) -> jax.Array:
    """Brings one leaf's low-rank update back, and completes the decay of its whole weight.

    The low-rank update holds ``c P^T W``; the decay is to be ``c W``, free of ``scale``.

    Args:
      scale: the factor on the update.
      is_new: True if the projector is known to be new. Otherwise the update of a matrix that has
        none yet (zeros) is NaN, which no one overlooks.
      spec: how the leaf is projected.
      step: the update of the shape of R, decay included.
      projector: P.
      decay: c, (), or None.
      outside: what is added to the update outside the subspace, (*stack, m, n), or None.
      low_weight: the weight as the optimizer sees it, of the shape of R.
      weight: the leaf.

    Returns:
      The update of the leaf's shape, in the dtype of ``step``.
    """
    if is_new is not True:
        for basis in jax.tree.leaves(projector):
            step = jnp.where((basis != 0).any((-2, -1), keepdims=True), step, jnp.nan)
    back = spec.from_low_rank(without_decay(spec, step, decay, low_weight), projector)
    if outside is not None:
        back = back + spec.from_matrix(outside)
    back = scale * back
    return (back if decay is None else back + decay * weight).astype(step.dtype)


def without_decay(
    spec: MatrixSpec, step: jax.Array, decay: jax.Array | None, low_weight: Any
) -> jax.Array:
    """Takes the decay out of one leaf's low-rank update.

    Args:
      spec: how the leaf is projected.
      step: the update of the shape of R, decay included.
      decay: c, (), or None.
      low_weight: the weight as the optimizer sees it, of the shape of R.
    """
    del spec
    return step if decay is None else step - decay * low_weight


def replaced(values: Sequence[Any], new: dict[int, Any]) -> list[Any]:
    """Exchanges the values at some positions.

    >>> replaced([1, 2], {1: 3})
    [1, 3]
    """
    return list((dict(enumerate(values)) | new).values())


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def note_tangent(leaf: jax.Array, index: int, found: set[int]) -> jax.Array:
    """Returns the leaf as it is; its index goes to ``found`` if differentiation reaches it."""
    del index, found
    return leaf


@note_tangent.defjvp
def _note(index, found, primals, tangents):
    found.add(index)
    return primals[0], tangents[0]
