"""Optimizers that keep copies of the weights: schedule_free, prodigy, dog and their like.

Inside GaLore such an optimizer trains V in ``W = W_outside + scale * P V``: it sees
``P^T W / scale``, so that its own picture of the weights stays exact, and its copies follow the
projector.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.extend.core import Var

from galore_jax.projection import MatrixSpec, on_matrices, rotate
from galore_jax.weight_decay import note_tangent, replaced

_COPIES = frozenset({"copy", "copy_p", "convert_element_type"})


@dataclasses.dataclass(frozen=True)
class WeightCopies:
    """The arrays of a state that are made from the values of the projected leaves.

    Attributes:
      copies: for each copy of a leaf (``z`` of schedule_free, ``params0`` of prodigy) its index in
        the flat state, and the leaf's index in the flat params.
      derived: indices in the flat state of what else is made from values, such as a first distance
        from a norm (dog).
    """

    copies: dict[int, int]
    derived: frozenset[int]

    def follow(
        self,
        due: bool | jax.Array,
        init: Callable[[optax.Params], optax.OptState],
        state: optax.OptState,
        params: optax.Params | None,
        projectors: tuple[Any, Any],
        specs: Any,
        scale: Any,
        count: jax.Array,
    ) -> optax.OptState:
        """Moves the copies to new projectors; before the first update, makes what is derived.

        Args:
          due: whether the projectors are new, a bool or () bool.
          init: the optimizer's ``init``.
          state: the optimizer's state.
          params: the whole weights.
          projectors: the old and the new projectors, trees of the params' structure.
          specs: a tree of ``MatrixSpec`` and None.
          scale: GaLore's factor on updates.
          count: the number of updates so far, () int32.

        Returns:
          The optimizer's new state.

        Raises:
          ValueError: params that are None.
        """
        if params is None:
            raise ValueError("the optimizer keeps copies of the weights: update needs the params")
        if due is False:
            return state
        arrays, treedef = jax.tree.flatten(state)

        def move(before: dict[int, jax.Array]) -> dict[int, jax.Array]:
            see = functools.partial(seen_weight, scale)
            old_weights, weights = (on_matrices(see, specs, params, p) for p in projectors)
            was, like = jax.tree.flatten(old_weights)
            spec, old, new, now = map(like.flatten_up_to, (specs, *projectors, weights))
            first = jax.tree.leaves(init(weights)) if self.derived else []
            after = {}
            for position, array in before.items():
                if position in self.derived:
                    moved, stays = first[position], count != 0
                else:
                    i = self.copies[position]
                    moved = rotate(array - was[i], old[i], new[i], spec[i].side) + now[i]
                    stays = jax.tree.map(_is_same, old[i], new[i])
                    stays = functools.reduce(jnp.logical_and, jax.tree.leaves(stays))
                after[position] = jnp.where(stays, array, moved.astype(array.dtype))
            return after

        before = {i: arrays[i] for i in (*self.copies, *self.derived)}
        after = move(before) if due is True else jax.lax.cond(due, move, lambda same: same, before)
        return treedef.unflatten(replaced(arrays, after))


def seen_weight(scale: Any, spec: MatrixSpec, weight: jax.Array, projector: Any) -> jax.Array:
    """Returns ``P^T W / scale``, the weight of a leaf as an optimizer that keeps copies sees it."""
    low = spec.to_low_rank(weight, projector)
    return (low / scale).astype(low.dtype)


def _is_same(old: jax.Array, new: jax.Array) -> jax.Array:
    return (old == new).all((-2, -1), keepdims=True)


def find_copies(
    init: Callable[[optax.Params], optax.OptState], params: optax.Params, selected: Any
) -> WeightCopies | None:
    """Finds what ``init`` makes from the values, not only the shapes, of the selected leaves.

    Args:
      init: an optimizer's.
      params: a tree of arrays or shapes.
      selected: a tree of the params' structure with None for the leaves that do not count.

    Returns:
      Where that is in the state; None where nothing is.

    Raises:
      ValueError: an array of a leaf's shape that is made from its values without being a copy: it
        is not known what becomes of it with another projector.

    >>> import jax.numpy as jnp, optax
    >>> find_copies(optax.contrib.madgrad(0.1).init, {"w": jnp.ones((2, 3))}, {"w": 0}).copies
    {3: 0}
    """
    leaves, treedef = jax.tree.flatten(params)
    chosen = [i for i, x in enumerate(treedef.flatten_up_to(selected)) if x is not None]
    reached: set[int] = set()

    def primals_of(*weights: Any) -> list[Any]:
        def noted_state(seen: dict[int, Any]) -> list[Any]:
            arrays = jax.tree.leaves(init(treedef.unflatten(replaced(weights, seen))))
            return [note_tangent(x, i, reached) for i, x in enumerate(arrays)]

        primals = {i: weights[i] for i in chosen}
        return jax.jvp(noted_state, (primals,), (jax.tree.map(jnp.ones_like, primals),))[0]

    program = jax.make_jaxpr(primals_of)(*leaves).jaxpr
    source: dict[Any, int] = {program.invars[i]: i for i in chosen}
    for equation in program.eqns:
        read = equation.invars[0] if equation.primitive.name in _COPIES else None
        if isinstance(read, Var) and read in source:
            source[equation.outvars[0]] = source[read]
    copies = {
        i: source[v] for i, v in enumerate(program.outvars) if isinstance(v, Var) and v in source
    }
    shapes = {jnp.shape(leaves[i]) for i in chosen} - {()}
    derived = frozenset(reached - copies.keys())
    if any(getattr(program.outvars[i].aval, "shape", ()) in shapes for i in derived):
        raise ValueError(
            "the optimizer's state holds a function of the weights' values; only copies of "
            "the weights can follow a projector. Put that optimizer around galore(...)"
        )
    return WeightCopies(copies, derived) if copies or derived else None
