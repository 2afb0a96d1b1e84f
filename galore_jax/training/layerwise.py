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
from typing import Any

import jax
import jax.numpy as jnp
import optax

from galore_jax.int8_kernels import decoded, float_variables, with_float_variables
from galore_jax.models.stages import BLOCKS, Stages
from galore_jax.projected_grad import with_variables
from galore_jax.rounding import apply_updates
from galore_jax.training import backward
from galore_jax.training.groups import Groups, find_groups, take_all
from galore_jax.training.step import (
    Metrics,
    Mode,
    Step,
    TrainState,
    cast_like,
    count_refreshes,
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
    """Makes ``galore_jax.training.step.make_train_step`` with one layer's gradient at a time.

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
        metrics |= count_refreshes(state.opt_state, state.step, mode.update_proj_gap)
        return state._replace(step=state.step + 1), metrics

    return train_step


@dataclasses.dataclass(frozen=True)
class _LayerwiseStep:
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
            variables = self.mode.variables(state.params, state.opt_state)
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
        model, groups = self.model, find_groups(self.model, self.tx, state)
        x, inputs = backward.run_forward(model, state.params, parts)
        loss, after_grads, dx = backward.after_gradients(
            model, self.task, state.params, x, parts, per_target
        )
        earlier: Any = None
        if sums:
            loss, earlier = loss + sums[0], sums[1]
        update = functools.partial(
            self._update, groups, loss=loss, full=full, only_refresh=only_refresh
        )

        def update_outer(group: int, grads: dict[str, Any], state: TrainState) -> Any:
            grads = groups.pick(group, {**state.params, **grads})
            if earlier is not None:
                grads = _plus(grads, groups.pick(group, earlier))
            return update(group, None, grads, state)

        state, after_squares, projected_after = update_outer(groups.after, after_grads, state)
        # The head's gradient is not to outlive its update. (Waiting for the new weights themselves
        # would keep them from being written over the old ones.)
        dx, _ = jax.lax.optimization_barrier((dx, state.opt_state))

        def layer_step(carry: Any, this: Any) -> tuple[Any, Any]:
            state, dx, squares = carry
            index, x, earlier = this
            stage_inputs, projected = [x], {}
            for stage in model.block[:-1]:
                x = backward.run_stage(stage, take_all(state.params[BLOCKS], index), x)
                stage_inputs.append(x)
            for group in reversed(range(len(model.block))):
                keys = model.block[group].keys
                grads, dx = self._gradients(
                    groups, group, index, state, stage_inputs[group], dx, full
                )
                if earlier is not None:
                    grads = _plus(grads, {key: earlier[key] for key in keys})
                # The copies of weights and state that the gradients took are gone before those for
                # the update come, and the latter before the next part.
                index, grads, dx = jax.lax.optimization_barrier((index, grads, dx))
                state, more, grads = update(group, index, grads, state)
                squares += more
                if only_refresh:
                    projected |= {key: grads[BLOCKS][key] for key in keys}
                dx, state = jax.lax.optimization_barrier((dx, state))
            return (state, dx, squares), projected

        # Without the other weights: in the carry their gradients would be kept beside them.
        (blocks, dx, squares), projected_blocks = jax.lax.scan(
            layer_step,
            (groups.of_blocks(state), dx, after_squares),
            (jnp.arange(len(inputs)), inputs, earlier and earlier[BLOCKS]),
            reverse=True,
        )
        state = groups.put_blocks(state, blocks)
        before_grads = backward.before_gradients(model, state.params, parts, dx)
        for key in before_grads.keys() & after_grads.keys():  # tied weights
            before_grads[key] = _plus(before_grads[key], after_grads[key])
        state, more, projected = update_outer(groups.before, before_grads, state)

        squares += more
        metrics = {"loss": loss}
        if full:
            metrics["grad_norm"] = jnp.sqrt(squares[0])
        if self.mode.projected and not only_refresh:
            metrics["projected_grad_norm"] = jnp.sqrt(squares[1])
        if not only_refresh:
            return state, metrics, ()
        projected |= {
            key: projected_after[key] for key in model.after.keys if key not in before_grads
        }
        projected[BLOCKS] = projected_blocks
        return state, metrics, (loss, jax.tree.map(lambda x: x.astype(jnp.float32), projected))

    def _gradients(
        self,
        groups: Groups,
        group: int,
        index: jax.Array,
        state: TrainState,
        x: jax.Array,
        dx: jax.Array,
        full: bool,
    ) -> tuple[Any, jax.Array]:
        """Differentiates a part of a layer by its weights or variables, and by its input."""
        stage, layer = self.model.block[group], take_all(state.params[BLOCKS], index)
        weights, opt_state = groups.take(group, index, state)
        variables = self._variables(weights, opt_state, full)

        def run(variables: Any, x: jax.Array) -> jax.Array:
            if full:
                nodes = with_float_variables(weights, variables)
            else:
                nodes = with_variables(weights, opt_state, variables)
            return stage.run({**layer, **{key: nodes[BLOCKS][key] for key in stage.keys}}, x)

        return backward.stage_gradients(run, variables, x, dx)

    def _variables(self, weights: Any, opt_state: optax.OptState, full: bool) -> Any:
        """Makes what a group's gradients are taken by."""
        return float_variables(weights) if full else self.mode.variables(weights, opt_state)

    def _update(
        self,
        groups: Groups,
        group: int,
        index: jax.Array | None,
        grads: Any,
        state: TrainState,
        *,
        loss: jax.Array,
        full: bool,
        only_refresh: bool,
    ) -> tuple[TrainState, jax.Array, Any]:
        """Updates one group: of one layer, or of weights outside the blocks.

        Returns:
          The new state; the sums of the squares of its gradients, and of those as the optimizer
          sees them, float32 (2,); and the latter.
        """
        params, opt_state = groups.take(group, index, state)
        grads = cast_like(self._variables(params, opt_state, full), grads)
        if only_refresh:
            opt_state = self.tx.refresh(grads, opt_state, decoded(params))  # pyright: ignore
        else:
            updates, opt_state = self.tx.update(
                grads, opt_state, decoded(params), value=loss, refresh=full and self.refresh
            )
            layer = 0 if index is None else index
            params = apply_updates(params, updates, state.step, self.mode.rounding, layer=layer)
        projected = grads
        if full and self.mode.projected:
            projected = self.mode.project(grads, opt_state)
        squares = jnp.stack([sum_of_squares(grads), sum_of_squares(projected)])
        return groups.put(group, index, state, params, opt_state), squares, projected


def _plus(grads: Any, others: Any) -> Any:
    """Adds gradients of the same leaves, whatever shape the nodes around them are noted with."""
    pairs = zip(jax.tree.leaves(grads), jax.tree.leaves(others), strict=True)
    return jax.tree.unflatten(jax.tree.structure(grads), [a + b for a, b in pairs])
