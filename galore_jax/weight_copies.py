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

from galore_jax import projection
from galore_jax.weight_decay import note_tangent, replaced
from galore_jax.weights import MatrixSpec, low_rank_gradient, on_matrices

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

    def __bool__(self) -> bool:
        """Whether the state is made from the weights at all."""
        return bool(self.copies or self.derived)

    def follow(
        self,
        init: Callable[[optax.Params], optax.OptState],
        state: optax.OptState,
        params: optax.Params | None,
        projectors: tuple[Any, Any],
        specs: Any,
        scale: Any,
        count: jax.Array,
    ) -> tuple[optax.Params, optax.OptState]:
        """Moves the copies to new projectors; before the first update, makes what is derived.

        Args:
          init: the optimizer's ``init``.
          state: the optimizer's state.
          params: the whole weights.
          projectors: the old and the new projectors, decoded, trees of the params' structure.
          specs: a tree of ``MatrixSpec`` and None.
          scale: GaLore's factor on updates.
          count: the number of updates so far, () int32.

        Returns:
          The params that the optimizer sees, and its state.

        Raises:
          ValueError: params that are None.
        """
        if params is None:
            raise ValueError("the optimizer keeps copies of the weights: update needs the params")

        def see(spec: MatrixSpec, weight: jax.Array, projector: Any) -> jax.Array:
            low = low_rank_gradient(spec, weight, projector)
            return (low / scale).astype(low.dtype)

        old_params, low_params = (on_matrices(see, specs, params, p) for p in projectors)
        arrays, treedef = jax.tree.flatten(state)
        before, like = jax.tree.flatten(old_params)
        after, old, new, spec = map(like.flatten_up_to, (low_params, *projectors, specs))
        for position, i in self.copies.items():
            copy = arrays[position]
            is_same = jax.tree.map(_is_same, old[i], new[i])
            moved = projection.rotate(copy - before[i], old[i], new[i], spec[i].side) + after[i]
            keep = functools.reduce(jnp.logical_and, jax.tree.leaves(is_same))
            arrays[position] = jnp.where(keep, copy, moved.astype(copy.dtype))
        if self.derived:
            first = jax.tree.leaves(init(low_params))
            for position in self.derived:
                arrays[position] = jnp.where(count == 0, first[position], arrays[position])
        return low_params, treedef.unflatten(arrays)


def _is_same(old: jax.Array, new: jax.Array) -> jax.Array:
    return (old == new).all((-2, -1), keepdims=True)


def find_copies(
    init: Callable[[optax.Params], optax.OptState], params: optax.Params, selected: Any
) -> WeightCopies:
    """Finds what ``init`` makes from the values, not only the shapes, of the selected leaves.

    Args:
      init: an optimizer's.
      params: a tree of arrays or shapes.
      selected: a tree of the params' structure with None for the leaves that do not count.

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

    def noted_state(weights: list[Any], chosen_weights: list[Any]) -> list[Any]:
        given = replaced(weights, chosen, chosen_weights)
        arrays = jax.tree.leaves(init(treedef.unflatten(given)))
        return [note_tangent(x, i, reached) for i, x in enumerate(arrays)]

    def primals_of(*weights: Any) -> list[Any]:
        primals = [weights[i] for i in chosen]
        of_chosen = functools.partial(noted_state, list(weights))
        return jax.jvp(of_chosen, (primals,), (list(map(jnp.ones_like, primals)),))[0]

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
    return WeightCopies(copies, derived)
