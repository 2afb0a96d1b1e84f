"""Parts of an optimizer's state: what belongs to some of the weights, or to one layer of them."""

import dataclasses
from collections.abc import Collection, Sequence
from typing import Any

import jax
import optax

from galore_jax.stacks import find_owner, find_owners


@dataclasses.dataclass(frozen=True)
class StatePart:
    """Where the arrays of a part are in the whole state.

    The part is a state of the same optimizer for a tree in which ``optax.MaskedNode()`` stands for
    the leaves that are left out, as ``optax.masked`` has it.

    Attributes:
      treedef: structure of the part.
      positions: for each array of the part its position in the whole flat state.
      shared: which of them belong to no leaf: step counts and the like.
    """

    treedef: Any
    positions: tuple[int, ...]
    shared: tuple[bool, ...]

    def owned(self, arrays: Sequence[Any]) -> list[Any]:
        """Of the whole flat state the arrays that belong to the part's leaves."""
        return [arrays[i] for i in self._positions(shared=False)]

    def state(self, arrays: Sequence[Any], owned: Sequence[Any]) -> optax.OptState:
        """The part, with these in the place of the arrays it owns."""
        by_position = dict(zip(self._positions(shared=False), owned, strict=True))
        return self.treedef.unflatten([by_position.get(i, arrays[i]) for i in self.positions])

    def split(self, state: optax.OptState) -> tuple[list[Any], dict[int, Any]]:
        """An updated part as the arrays it owns, and the shared ones by their positions."""
        arrays = self.treedef.flatten_up_to(state)
        owned = [x for x, shared in zip(arrays, self.shared, strict=True) if not shared]
        shared = zip(self._positions(shared=True), self._of(arrays, shared=True), strict=True)
        return owned, dict(shared)

    def replaced(self, arrays: Sequence[Any], owned: Sequence[Any]) -> list[Any]:
        """The whole flat state with these in the place of the arrays that the part owns."""
        by_position = dict(zip(self._positions(shared=False), owned, strict=True))
        return [by_position.get(i, x) for i, x in enumerate(arrays)]

    def _positions(self, *, shared: bool) -> list[int]:
        return self._of(self.positions, shared=shared)

    def _of(self, values: Sequence[Any], *, shared: bool) -> list[Any]:
        return [x for x, is_shared in zip(values, self.shared, strict=True) if is_shared == shared]


def find_part(opt_state: optax.OptState, params: Any, kept: Collection[int]) -> StatePart:
    """The part of a state that belongs to the leaves of these indices in the flat params.

    >>> import jax.numpy as jnp, optax
    >>> params = {"a": jnp.ones(3), "b": jnp.ones(4)}
    >>> part = find_part(optax.adam(0.1).init(params), params, [1])
    >>> part.positions, part.shared
    ((0, 2, 4), (True, False, False))
    """
    owners = find_owners(opt_state, params)
    positions = tuple(i for i, owner in enumerate(owners) if owner is None or owner in kept)
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(params)]

    def without(node: Any, path: tuple[Any, ...]) -> Any:
        owner = find_owner(path, paths, whole=True)
        if owner is not None:
            return node if owner in kept else optax.MaskedNode()
        children, treedef = jax.tree_util.tree_flatten_with_path(
            node, is_leaf=lambda child: child is not node
        )
        if len(children) == 1 and not children[0][0]:
            return node
        return treedef.unflatten([without(child, path + key) for key, child in children])

    return StatePart(
        jax.tree.structure(without(opt_state, ())),
        positions,
        tuple(owners[i] is None for i in positions),
    )
