"""Updates one layer at a time: each as soon as its gradient is there, which then is gone.

As the reference's per-layer hooks (``torchrun_main.py`` of Zhao et al. 2024), without two bugs of
theirs: the optimizer takes one step a batch, not one a micro-batch, and nothing is clipped by
gradients that are gone.

The forward pass keeps each block's input. The backward pass goes from the head through the blocks
to the embedding; it computes a block again, takes its gradient, and writes the new weights and
optimizer state of that layer in the place of the old ones; with ``remat`` of one half of the block
after the other.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from galore_jax.models.stages import BLOCKS, KERNELS, Stages
from galore_jax.projected_grad import (
    as_gradients,
    project_gradients,
    projected_kernels,
    variables_of,
    with_coordinates,
)
from galore_jax.rounding import apply_updates
from galore_jax.selection import leaf_path
from galore_jax.training import pieces
from galore_jax.training.parts import at, put
from galore_jax.training.state_parts import StatePart, find_part
from galore_jax.training.step import Metrics, Mode, Step, TrainState, split_batch, sum_over_parts
from galore_jax.training.tasks import Batch, Task


def make_layerwise_step(
    model: Stages,
    task: Task,
    tx: optax.GradientTransformationExtraArgs,
    schedule: optax.Schedule,
    mode: Mode,
    *,
    refresh: bool,
) -> Step:
    """:func:`galore_jax.training.step.make_train_step` with one layer's gradient at a time.

    Args:
      model, task, schedule, mode, refresh: as there.
      tx: an optimizer that keeps the leaves apart, for a model with one layer (no leading axis
        under ``blocks``). The state is the one that the same optimizer has for stacked layers.
    """
    step = _LayerwiseStep(model, task, tx, mode, refresh)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        tokens, per_target, parts = split_batch(task, batch, mode.micro_batches)
        at_once = refresh and mode.projected and mode.refresh_from == "batch"
        if mode.side_by_side or mode.micro_batches == 1 or at_once:
            state, metrics, _ = step.walk(state, parts, per_target, full=step.is_full)
        else:
            state, metrics = step.add_up_and_walk(state, parts, per_target)
        learning_rate = jnp.asarray(schedule(state.step), jnp.float32)
        metrics = {**metrics, "learning_rate": learning_rate, "tokens": tokens}
        return state._replace(step=state.step + 1), metrics

    return train_step


@dataclasses.dataclass(frozen=True)
class _Group:
    """Weights that are updated together.

    Attributes:
      kept: their indices in the flat params.
      treedef: of the params.
      state: their part of the optimizer's state.
    """

    kept: tuple[int, ...]
    treedef: Any
    state: StatePart

    def tree(self, weights: Any) -> Any:
        """The params' tree with these weights and without the others."""
        by_index = dict(zip(self.kept, jax.tree.leaves(weights), strict=True))
        return self.treedef.unflatten(
            [by_index.get(i, optax.MaskedNode()) for i in range(self.treedef.num_leaves)]
        )


@dataclasses.dataclass(frozen=True)
class _LayerwiseStep:
    model: Stages
    task: Task
    tx: optax.GradientTransformationExtraArgs
    mode: Mode
    refresh: bool

    @property
    def is_full(self) -> bool:
        """Whether all of the step's gradients are full ones."""
        return self.refresh or not self.mode.projected

    def add_up_and_walk(
        self, state: TrainState, parts: Batch, per_target: jax.Array
    ) -> tuple[TrainState, Metrics]:
        """The projected gradients of all parts but the last add up; the last one's walk updates."""
        of = lambda a, b: jax.tree.map(lambda x: x[a:b], parts)  # noqa: E731
        last = parts["tokens"].shape[0] - 1
        metrics, sums, begin = {}, (), 0
        if self.refresh:
            state, metrics, sums = self.walk(
                state, of(0, 1), per_target, full=True, only_refresh=True
            )
            begin = 1
        if begin < last:
            nodes = self._kernels(state.params, state.opt_state)

            def loss(variables: Any, part: Batch) -> jax.Array:
                outputs = self.model.forward(with_coordinates(nodes, variables), part)
                return self.task.loss(outputs, part) * per_target

            sums = sum_over_parts(
                jax.value_and_grad(loss), variables_of(nodes), of(begin, last), sums
            )
        state, of_last, _ = self.walk(state, of(last, last + 1), per_target, sums, full=False)
        return state, {**metrics, **of_last}

    def walk(
        self,
        state: TrainState,
        parts: Batch,
        per_target: jax.Array,
        sums: Any = (),
        *,
        full: bool,
        only_refresh: bool = False,
    ) -> tuple[TrainState, Metrics, Any]:
        """Forward through all layers, and backward with what is to be done at each.

        Args:
          state: before.
          parts: micro-batches that are walked through side by side, (k, sequences, seq_len).
          per_target: factor on the summed loss.
          sums: (loss, gradients of :func:`variables_of`) of earlier micro-batches, float32.
          full: whether to take full gradients.
          only_refresh: whether to change the bases alone, and return the projected gradients.

        Returns:
          The new state, its step unchanged; loss and norms; and with ``only_refresh`` the loss and
          gradients, as ``sums``.
        """
        params, arrays = state.params, jax.tree.leaves(state.opt_state)
        *layers, head, tail = self._groups(state)
        earlier_loss, earlier = sums or (jnp.float32(0.0), None)
        x, inputs = pieces.forward(self.model, params, parts)
        loss, head_grads, dx = pieces.head_gradients(
            self.model, self.task, params, x, parts, per_target
        )
        loss = loss + earlier_loss
        visit = functools.partial(self._visit, state, loss, full, only_refresh)

        def visit_outer(group: _Group, grads: dict[str, Any]) -> "_Visited":
            of_params = {key: params[key] for key in grads}
            return visit(group, of_params, group.state.owned(arrays), _plus(grads, earlier))

        shared = set(self.model.before.keys) & set(self.model.after.keys)
        tied_grads = {key: head_grads.pop(key) for key in shared}
        of_head = visit_outer(head, head_grads)
        # The head's gradient is not to outlive its update. (Waiting for the new weights themselves
        # would keep them from being written over the old ones.)
        dx, _ = jax.lax.optimization_barrier((dx, of_head.owned))

        def layer_step(carry: Any, this: Any) -> tuple[Any, Any]:
            blocks, of_groups, dx, squares = carry
            index, x, before = this
            inputs, gradients = [x], {}
            for part in self.model.block[:-1]:
                inputs.append(pieces.run_stage(part, at(index, blocks), inputs[-1]))
            for i in reversed(range(len(layers))):
                part, group = self.model.block[i], layers[i]
                layer = at(index, blocks)
                nodes = {key: layer[key] for key in part.keys}
                if not full:
                    owned = at(index, of_groups[i])
                    of_model = self._kernels(group.tree(nodes), group.state.state(arrays, owned))
                    nodes = {key: of_model["blocks"][key] for key in part.keys}
                grads, dx = pieces.stage_gradients(part, layer, nodes, inputs[i], dx)
                grads = _plus(grads, before)
                # The copies of weights and state that the gradients took are gone before those for
                # the update come, and the latter before the next part.
                index, grads, dx = jax.lax.optimization_barrier((index, grads, dx))
                weights = at(index, {key: blocks[key] for key in part.keys})
                new = visit(group, weights, at(index, of_groups[i]), grads)
                blocks |= put(index, {key: blocks[key] for key in part.keys}, new.weights)
                of_groups[i] = put(index, of_groups[i], new.owned)
                squares, gradients = squares + new.squares, gradients | new.gradients
                dx, blocks, of_groups = jax.lax.optimization_barrier((dx, blocks, of_groups))
            return (blocks, of_groups, dx, squares), gradients

        of_groups = [group.state.owned(arrays) for group in layers]
        (blocks, of_groups, dx, squares), layer_grads = jax.lax.scan(
            layer_step,
            (params["blocks"], of_groups, dx, of_head.squares),
            (jnp.arange(len(inputs)), inputs, earlier and earlier["blocks"]),
            reverse=True,
        )
        tail_grads = pieces.input_gradients(self.model, params, parts, dx)
        tail_grads |= _plus(tied_grads, tail_grads)
        of_tail = visit_outer(tail, tail_grads)

        squares = squares + of_tail.squares
        metrics = {"loss": loss}
        if full:
            metrics["grad_norm"] = jnp.sqrt(squares[0])
        if self.mode.projected and not only_refresh:
            metrics["projected_grad_norm"] = jnp.sqrt(squares[1])
        gradients = ()
        if only_refresh:
            gradients = loss, {**of_head.gradients, "blocks": layer_grads, **of_tail.gradients}
        of_groups = (*of_groups, of_head.owned, of_tail.owned)
        for group, owned in zip((*layers, head, tail), of_groups, strict=True):
            arrays = group.state.replaced(arrays, owned)
        arrays = [of_tail.shared.get(i, x) for i, x in enumerate(arrays)]
        new_state = state._replace(
            params={**of_head.weights, "blocks": blocks, **of_tail.weights},
            opt_state=jax.tree.unflatten(jax.tree.structure(state.opt_state), arrays),
        )
        return new_state, metrics, gradients

    def _groups(self, state: TrainState) -> list[_Group]:
        """The weights of each part of the blocks, of the head with its norm, and the embedding."""
        paths = [leaf_path(path) for path, _ in jax.tree_util.tree_leaves_with_path(state.params)]

        def group(*prefixes: str) -> _Group:
            begin = tuple(f"{prefix}/" for prefix in prefixes)
            kept = tuple(i for i, path in enumerate(paths) if path.startswith(begin))
            part = find_part(state.opt_state, state.params, kept)
            return _Group(kept, jax.tree.structure(state.params), part)

        of_blocks = [[f"{BLOCKS}/{key}" for key in part.keys] for part in self.model.block]
        before = self.model.before.keys
        after = [key for key in self.model.after.keys if key not in before]
        return [group(*each) for each in (*of_blocks, after, before)]

    def _kernels(self, params: Any, opt_state: optax.OptState) -> Any:
        return projected_kernels(params, opt_state, proj_type=self.mode.proj_type, kernels=KERNELS)

    def _visit(
        self,
        before: TrainState,
        loss: jax.Array,
        full: bool,
        only_refresh: bool,
        group: _Group,
        weights: dict[str, Any],
        owned: Sequence[jax.Array],
        gradients: dict[str, Any],
    ) -> "_Visited":
        """One group's update: of one layer, or of weights outside the blocks."""
        arrays = jax.tree.leaves(before.opt_state)
        params, opt_state = group.tree(weights), group.state.state(arrays, owned)
        # The nodes whose gradients these are, and those for the bases after the update.
        nodes = params if full else self._kernels(params, opt_state)
        leaves, treedef = jax.tree.flatten(gradients)
        of_weights = zip(leaves, jax.tree.leaves(weights), strict=True)
        leaves = [gradient.astype(weight.dtype) for gradient, weight in of_weights]
        grads = as_gradients(nodes, group.tree(leaves))
        updates, opt_state = self.tx.update(
            grads,
            opt_state,
            params,
            value=loss,
            refresh="only" if only_refresh else full and self.refresh,
        )
        projected = grads
        if full and self.mode.projected:
            projected = project_gradients(self._kernels(params, opt_state), grads)
        if not only_refresh:
            params = apply_updates(params, updates, before.step, self.mode.rounding)
        new_owned, shared = group.state.split(opt_state)
        in_new_bases = {}
        if only_refresh:
            in_new_bases = treedef.unflatten(
                [gradient.astype(jnp.float32) for gradient in jax.tree.leaves(projected)]
            )
        return _Visited(
            jax.tree.unflatten(treedef, jax.tree.leaves(params)),
            new_owned,
            shared,
            jnp.stack([_sum_of_squares(grads), _sum_of_squares(projected)]),
            in_new_bases,
        )


class _Visited(NamedTuple):
    """What is new after a group's update.

    Attributes:
      weights: its weights, by their keys.
      owned: the arrays of the optimizer's state that it owns.
      shared: those that belong to no weight, by their positions in the flat state.
      squares: sums of the squares of its gradients, and of those as the optimizer sees them, (2,).
      gradients: those in the new bases, float32, where the bases alone were to change.
    """

    weights: dict[str, Any]
    owned: list[jax.Array]
    shared: dict[int, jax.Array]
    squares: jax.Array
    gradients: dict[str, Any]


def _plus(grads: dict[str, Any], others: dict[str, Any] | None) -> dict[str, Any]:
    if others is None:
        return grads
    return jax.tree.map(jnp.add, grads, {key: others[key] for key in grads})


def _sum_of_squares(tree: Any) -> jax.Array:
    return optax.tree.norm(jax.tree.map(lambda x: x.astype(jnp.float32), tree), squared=True)
