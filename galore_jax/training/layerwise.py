"""Updates one layer at a time: each as soon as its gradient exists, which then is gone.

As the reference's per-layer hooks (``torchrun_main.py`` of Zhao et al. 2024), without two of their
bugs: the optimizer takes one step a batch, not one a micro-batch, and nothing is clipped by
gradients that are gone.

The forward pass keeps each block's input. The backward pass goes from the head through the blocks
to the embedding; it computes a block again, takes its gradient, and writes the new weights and
optimizer state of that layer in the place of the old ones; with ``remat`` of one half of the block
after the other.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from galore_jax.models.stages import BLOCKS, KERNELS, LAYERS, Stage, Stages
from galore_jax.per_layer import layer_axes, layer_depths, put_layer, take_layer
from galore_jax.projected_grad import gradient_variables, project_gradients, with_variables
from galore_jax.rounding import apply_updates
from galore_jax.training import backward
from galore_jax.training.step import (
    Metrics,
    Mode,
    Step,
    TrainState,
    cast_like,
    split_batch,
    sum_of_squares,
    sum_over_parts,
)
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
    """Makes :func:`galore_jax.training.step.make_train_step` with one layer's gradient at a time.

    Args:
      model, task, schedule, mode, refresh: as there.
      tx: an optimizer that keeps the leaves apart, for a model with one layer (no leading axis
        under ``blocks``). The state is the one that the same optimizer has for stacked layers.
    """
    step = _LayerwiseStep(model, task, tx, mode, refresh)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        tokens, per_target, parts = split_batch(task, batch, mode.micro_batches)
        from_batch = refresh and mode.projected and mode.refresh_from == "batch"
        if mode.side_by_side or mode.micro_batches == 1 or from_batch:
            full = refresh or not mode.projected
            state, metrics, _ = step.walk(state, parts, per_target, full=full)
        else:
            state, metrics = step.add_up_and_walk(state, parts, per_target)
        learning_rate = jnp.asarray(schedule(state.step), jnp.float32)
        metrics = {**metrics, "learning_rate": learning_rate, "tokens": tokens}
        return state._replace(step=state.step + 1), metrics

    return train_step


class _Updated(NamedTuple):
    """A group of weights after its update.

    Attributes:
      params, opt_state: the new ones.
      squares: the sums of the squares of its gradients, and of those as the optimizer sees them,
        float32 (2,).
      gradients: the latter.
    """

    params: Any
    opt_state: optax.OptState
    squares: jax.Array
    gradients: Any


@dataclasses.dataclass(frozen=True)
class _LayerwiseStep:
    """Groups of weights are updated one by one: the parts of a block, what is after, and before.

    A group's params and optimizer state are the whole trees with ``optax.MaskedNode()`` in the
    place of all other leaves, as ``optax.masked`` has it.
    """

    model: Stages
    task: Task
    tx: optax.GradientTransformationExtraArgs
    mode: Mode
    refresh: bool

    def add_up_and_walk(
        self, state: TrainState, parts: Batch, per_target: jax.Array
    ) -> tuple[TrainState, Metrics]:
        """Adds up the projected gradients of all micro-batches but the last, whose walk updates."""
        cut = lambda begin, end: jax.tree.map(lambda x: x[begin:end], parts)  # noqa: E731
        last = jax.tree.leaves(parts)[0].shape[0] - 1
        metrics, sums, begin = {}, (), 0
        if self.refresh:
            state, metrics, sums = self.walk(
                state, cut(0, 1), per_target, full=True, only_refresh=True
            )
            begin = 1
        if begin < last:
            variables = self._variables(state.params, state.opt_state)
            if sums:
                flat = jax.tree.leaves(sums[1])
                sums = sums[0], jax.tree.unflatten(jax.tree.structure(variables), flat)

            def loss(variables: Any, part: Batch) -> jax.Array:
                nodes = with_variables(state.params, state.opt_state, variables)
                return self.task.loss(self.model.forward(nodes, part), part) * per_target

            sums = sum_over_parts(jax.value_and_grad(loss), variables, cut(begin, last), sums)
        state, last_metrics, _ = self.walk(state, cut(last, last + 1), per_target, sums, full=False)
        return state, {**metrics, **last_metrics}

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
        """Goes forward through all layers, and backward with an update at each.

        Args:
          state: the state before.
          parts: micro-batches that go side by side, (k, sequences, seq_len).
          per_target: factor on the summed loss.
          sums: (loss, gradients) of earlier micro-batches, float32.
          full: whether to take full gradients.
          only_refresh: whether to make new projectors alone, and return the projected gradients.

        Returns:
          The new state, its step unchanged; loss and norms; and with ``only_refresh`` the loss and
          gradients, as ``sums``.
        """
        model, params = self.model, state.params
        stages, after, before = range(len(model.block)), len(model.block), len(model.block) + 1
        of_params, of_state = self._groups(state)
        opt_states = [_pick(i, of_state, state.opt_state) for i in (*stages, after, before)]
        depths = layer_depths(params, LAYERS)
        axes = [layer_axes(self.tx, opt_states[i], depths) for i in stages]

        x, inputs = backward.run_forward(model, params, parts)
        loss, after_grads, dx = backward.after_gradients(
            model, self.task, params, x, parts, per_target
        )
        earlier = None
        if sums:
            loss, earlier = loss + sums[0], sums[1]
        update = functools.partial(
            self._update, loss=loss, count=state.step, full=full, only_refresh=only_refresh
        )

        def update_outer(group: int, grads: dict[str, Any]) -> _Updated:
            grads = _pick(group, of_params, {**params, **grads})
            if earlier is not None:
                grads = _plus(grads, _pick(group, of_params, earlier))
            return update(_pick(group, of_params, params), opt_states[group], grads)

        updated_after = update_outer(after, after_grads)
        # The head's gradient is not to outlive its update. (Waiting for the new weights themselves
        # would keep them from being written over the old ones.)
        dx, _ = jax.lax.optimization_barrier((dx, updated_after.opt_state))

        def take(i: int, index: jax.Array, blocks: Any, opt_state: Any) -> tuple[Any, Any]:
            weights = _pick(i, of_params, {**params, BLOCKS: _layer(blocks, index)})
            return weights, take_layer(opt_state, axes[i], index)

        def layer_step(carry: Any, this: Any) -> tuple[Any, Any]:
            blocks, opt_states, dx, squares = carry
            index, x, earlier = this
            stage_inputs, gradients = [x], {}
            for stage in model.block[:-1]:
                x = backward.run_stage(stage, _layer(blocks, index), x)
                stage_inputs.append(x)
            for i in reversed(stages):
                stage, layer = model.block[i], _layer(blocks, index)
                weights, opt_state = take(i, index, blocks, opt_states[i])
                run, variables = self._run_and_variables(stage, layer, weights, opt_state, full)
                grads, dx = backward.stage_gradients(run, variables, stage_inputs[i], dx)
                if earlier is not None:
                    grads = _plus(grads, {key: earlier[key] for key in stage.keys})
                # The copies of weights and state that the gradients took are gone before those for
                # the update come, and the latter before the next part.
                index, grads, dx = jax.lax.optimization_barrier((index, grads, dx))
                new = update(*take(i, index, blocks, opt_states[i]), grads)
                blocks |= {
                    key: _put_layer(blocks[key], index, new.params[BLOCKS][key])
                    for key in stage.keys
                }
                opt_states[i] = put_layer(opt_states[i], axes[i], index, new.opt_state)
                squares += new.squares
                if only_refresh:
                    gradients |= {key: new.gradients[BLOCKS][key] for key in stage.keys}
                dx, blocks, opt_states = jax.lax.optimization_barrier((dx, blocks, opt_states))
            return (blocks, opt_states, dx, squares), gradients

        (blocks, block_states, dx, squares), block_grads = jax.lax.scan(
            layer_step,
            (params[BLOCKS], opt_states[:after], dx, updated_after.squares),
            (jnp.arange(len(inputs)), inputs, earlier and earlier[BLOCKS]),
            reverse=True,
        )
        before_grads = backward.before_gradients(model, params, parts, dx)
        tied = before_grads.keys() & after_grads.keys()
        before_grads |= {key: _plus(before_grads[key], after_grads[key]) for key in tied}
        updated_before = update_outer(before, before_grads)

        squares += updated_before.squares
        metrics = {"loss": loss}
        if full:
            metrics["grad_norm"] = jnp.sqrt(squares[0])
        if self.mode.projected and not only_refresh:
            metrics["projected_grad_norm"] = jnp.sqrt(squares[1])

        def joined(of_after: Any, of_blocks: Any, of_before: Any) -> Any:
            keys = {key: of_after[key] for key in model.after.keys} | {BLOCKS: of_blocks}
            return keys | {key: of_before[key] for key in model.before.keys}

        gradients = ()
        if only_refresh:
            grads = joined(updated_after.gradients, block_grads, updated_before.gradients)
            gradients = loss, jax.tree.map(lambda x: x.astype(jnp.float32), grads)
        new_states = (*block_states, updated_after.opt_state, updated_before.opt_state)
        new_state = state._replace(
            params=joined(updated_after.params, blocks, updated_before.params),
            opt_state=jax.tree.map(lambda group, *xs: xs[group], of_state, *new_states),
        )
        return new_state, metrics, gradients

    def _groups(self, state: TrainState) -> tuple[Any, Any]:
        """The index of each weight's group, and of each one's part of the state; -1 where shared.

        The parts of a block come first, then what is after the blocks, then what is before them.
        """
        stages = self.model.block
        of_key = dict.fromkeys(self.model.after.keys, len(stages))
        of_key |= dict.fromkeys(self.model.before.keys, len(stages) + 1)
        of_block = {key: i for i, stage in enumerate(stages) for key in stage.keys}
        groups = {
            key: {k: _fill(tree[k], of_block[k]) for k in tree}
            if key == BLOCKS
            else _fill(tree, of_key[key])
            for key, tree in state.params.items()
        }
        of_state = optax.tree_utils.tree_map_params(
            self.tx,
            lambda _, groups: groups,
            state.opt_state,
            groups,
            transform_non_params=lambda x: _fill(x, -1),
            is_leaf=lambda _: True,
        )
        return groups, of_state

    def _run_and_variables(
        self, stage: Stage, layer: Any, weights: Any, opt_state: optax.OptState, full: bool
    ) -> tuple[Callable[[Any, jax.Array], jax.Array], Any]:
        """A part of a block as a function of (variables, x), and the variables."""
        variables, nodes = weights, lambda variables: variables
        if not full:
            variables = self._variables(weights, opt_state)
            nodes = functools.partial(with_variables, weights, opt_state)

        def run(variables: Any, x: jax.Array) -> jax.Array:
            ours = nodes(variables)[BLOCKS]
            return stage.run({**layer, **{key: ours[key] for key in stage.keys}}, x)

        return run, variables

    def _variables(self, params: Any, opt_state: optax.OptState) -> Any:
        return gradient_variables(params, opt_state, proj_type=self.mode.proj_type, kernels=KERNELS)

    def _update(
        self,
        params: Any,
        opt_state: optax.OptState,
        grads: Any,
        *,
        loss: jax.Array,
        count: jax.Array,
        full: bool,
        only_refresh: bool,
    ) -> _Updated:
        """Updates one group: of one layer, or of weights outside the blocks."""
        grads = cast_like(params if full else self._variables(params, opt_state), grads)
        if only_refresh:
            opt_state = self.tx.refresh(grads, opt_state, params)  # pyright: ignore
        else:
            refresh = full and self.refresh
            updates, opt_state = self.tx.update(
                grads, opt_state, params, value=loss, refresh=refresh
            )
            params = apply_updates(params, updates, count, self.mode.rounding)
        projected = grads
        if full and self.mode.projected:
            projected = project_gradients(
                grads, opt_state, proj_type=self.mode.proj_type, kernels=KERNELS
            )
        squares = jnp.stack([sum_of_squares(grads), sum_of_squares(projected)])
        return _Updated(params, opt_state, squares, projected)


def _pick(group: int, groups: Any, tree: Any) -> Any:
    """A group's leaves of a tree, and those that all share."""
    masked = optax.MaskedNode()
    return jax.tree.map(lambda i, x: x if i in (group, -1) else masked, groups, tree)


def _fill(tree: Any, value: int) -> Any:
    return jax.tree.map(lambda _: value, tree)


def _layer(blocks: Any, index: jax.Array) -> Any:
    return take_layer(blocks, jax.tree.map(lambda _: True, blocks), index)


def _put_layer(blocks: Any, index: jax.Array, layer: Any) -> Any:
    return put_layer(blocks, jax.tree.map(lambda _: True, blocks), index, layer)


def _plus(grads: Any, others: Any) -> Any:
    """Adds gradients of the same leaves, whatever shape the nodes around them are noted with."""
    sums = [a + b for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(others), strict=True)]
    return jax.tree.unflatten(jax.tree.structure(grads), sums)
