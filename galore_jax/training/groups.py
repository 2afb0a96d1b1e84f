"""Groups of weights that layerwise updates take one by one, each with its part of the state."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import optax

from galore_jax.int8_kernels import decoded
from galore_jax.models.stages import BLOCKS, LAYERS, Stages
from galore_jax.per_layer import layer_axes, layer_depths, put_layer, take_layer
from galore_jax.training.step import TrainState


@dataclasses.dataclass(frozen=True)
class Groups:
    """The groups of a model: the parts of a block, what comes after the blocks, what before.

    They are numbered in this order. A group's params and optimizer state are the whole trees with
    ``optax.MaskedNode()`` in the place of all other leaves, as ``optax.masked`` has it.

    Attributes:
      params, opt_state: the group of each leaf, -1 in the state for what all share (step counts);
        an ``Int8Kernel`` counts as a leaf.
      param_axes, state_axes: whether an array has a leading layer axis.
      after, before: the numbers of these two groups.
    """

    params: Any
    opt_state: Any
    param_axes: Any
    state_axes: Any
    after: int
    before: int

    def pick(self, group: int, params: Any) -> Any:
        """Takes a group out of a tree like the params, layer axes and all."""
        return jax.tree.map(
            lambda i, x: x if i == group else optax.MaskedNode(), self.params, params
        )

    def take(self, group: int, index: Any, state: TrainState) -> tuple[Any, optax.OptState]:
        """Takes the params and the state of a group, of the layer of that index in the blocks."""

        def take(i: int, axes: Any, x: Any) -> Any:
            return _take(x, axes, index) if i in (group, -1) else optax.MaskedNode()

        taken = self._map(take, state)
        return taken.params, taken.opt_state

    def put(
        self, group: int, index: Any, state: TrainState, params: Any, opt_state: Any
    ) -> TrainState:
        """Puts back what ``take`` gave; with the group before the blocks what all share too."""
        replaced = (group, -1) if group == self.before else (group,)

        def put(i: int, axes: Any, x: Any, new: Any) -> Any:
            return put_layer(x, _of_arrays(axes, x), index, new) if i in replaced else x

        return self._map(put, state, TrainState(state.step, params, opt_state))

    def of_blocks(self, state: TrainState) -> TrainState:
        """Takes what belongs to the blocks, of all layers, and what all share."""
        return self._map(lambda i, _, x: x if i < self.after else optax.MaskedNode(), state)

    def put_blocks(self, state: TrainState, blocks: TrainState) -> TrainState:
        """Puts back what ``of_blocks`` gave."""
        return self._map(lambda i, _, x, new: new if i < self.after else x, state, blocks)

    def _map(self, fn: Callable[..., Any], state: TrainState, *rest: TrainState) -> TrainState:
        """Maps ``fn(group, axes, leaf, ...)`` over params and optimizer state."""
        return TrainState(
            state.step,
            jax.tree.map(fn, self.params, self.param_axes, state.params, *(x.params for x in rest)),
            jax.tree.map(
                fn, self.opt_state, self.state_axes, state.opt_state, *(x.opt_state for x in rest)
            ),
        )


def find_groups(model: Stages, tx: optax.GradientTransformation, state: TrainState) -> Groups:
    """Finds the groups of a model's params and of the state of an optimizer of single layers."""
    after = len(model.block)
    of_key = dict.fromkeys(model.after.keys, after) | dict.fromkeys(model.before.keys, after + 1)
    of_block = {key: i for i, stage in enumerate(model.block) for key in stage.keys}
    params = jax.eval_shape(decoded, state.params)
    groups = {
        key: {k: _fill(tree[k], of_block[k]) for k in tree}
        if key == BLOCKS
        else _fill(tree, of_key[key])
        for key, tree in params.items()
    }
    of_state = optax.tree_utils.tree_map_params(
        tx,
        lambda _, groups: groups,
        state.opt_state,
        groups,
        transform_non_params=lambda x: _fill(x, -1),
        is_leaf=lambda _: True,
    )
    depths = layer_depths(params, LAYERS)
    axes = layer_axes(tx, state.opt_state, depths)
    return Groups(groups, of_state, jax.tree.map(bool, depths), axes, after, after + 1)


def take_all(blocks: Any, index: jax.Array) -> Any:
    """Takes one layer of the params of all blocks."""
    return take_layer(blocks, _fill(blocks, True), index)


def _take(tree: Any, axes: Any, index: Any) -> Any:
    return take_layer(tree, _of_arrays(axes, tree), index)


def _of_arrays(axes: Any, tree: Any) -> Any:
    """Spreads what is known of an ``Int8Kernel`` over its arrays."""
    return _fill(tree, axes) if isinstance(axes, bool) else axes


def _fill(tree: Any, value: Any) -> Any:
    return jax.tree.map(lambda _: value, tree)
