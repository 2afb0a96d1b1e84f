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
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from galore_jax.models import llama
from galore_jax.models.llama import LlamaConfig
from galore_jax.projected_grad import (
    as_gradients,
    project_gradients,
    projected_kernels,
    variables_of,
    with_coordinates,
)
from galore_jax.rounding import Rounding, apply_updates
from galore_jax.selection import leaf_path
from galore_jax.training.parts import at, put
from galore_jax.training.pieces import Pieces
from galore_jax.training.state_parts import StatePart, find_part
from galore_jax.training.steps import (
    BLOCK_KERNELS,
    Batch,
    ProjectedMode,
    TrainState,
    sum_over_parts,
)

Metrics = dict[str, jax.Array]


def make_layerwise_step(
    model: LlamaConfig,
    tx: optax.GradientTransformationExtraArgs,
    schedule: optax.Schedule,
    *,
    micro_batches: int,
    rounding: Rounding = "nearest",
    refresh: bool | None = None,
    projected: ProjectedMode | None = None,
    side_by_side: bool = True,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """:func:`galore_jax.training.steps.make_train_step` with one layer's gradient at a time.

    Args:
      model, schedule, rounding, refresh, projected: as there.
      tx: an optimizer that keeps the leaves apart, for a model with one layer (no leading axis
        under ``blocks``). The state is the one that the same optimizer has for stacked layers.
      micro_batches: number of parts of a batch.
      side_by_side: whether all parts go through a layer before the next one's turn, which keeps
        the blocks' inputs of the whole batch. Otherwise, with ``projected`` alone, one part goes
        through all layers after the other: that keeps the float32 sums of all projected gradients
        (and the blocks' inputs of the whole batch where a new basis is to come from that).

    Raises:
      ValueError: full gradients of parts one after the other.
    """
    if not side_by_side and projected is None:
        raise ValueError("micro-batches one after the other need projected gradients")
    step = _LayerwiseStep(model, tx, rounding, refresh, projected)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        tokens = jnp.sum(batch["targets"] >= 0, dtype=jnp.int32)
        per_target = 1.0 / jnp.maximum(tokens, 1).astype(jnp.float32)
        parts = jax.tree.map(lambda x: x.reshape(micro_batches, -1, *x.shape[1:]), batch)
        at_once = refresh and projected is not None and projected.refresh_from == "batch"
        if side_by_side or micro_batches == 1 or at_once:
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
    model: LlamaConfig
    tx: optax.GradientTransformationExtraArgs
    rounding: Rounding
    refresh: bool | None
    projected: ProjectedMode | None

    @property
    def is_full(self) -> bool:
        """Whether all of the step's gradients are full ones."""
        return self.projected is None or bool(self.refresh)

    @functools.cached_property
    def pieces(self) -> Pieces:
        return Pieces(self.model)

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
                applied = llama.apply(self.pieces.graphdef, with_coordinates(nodes, variables))
                nll, _ = applied.loss(part["tokens"], part["targets"])
                return nll * per_target

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
        x, inputs = self.pieces.forward(params, parts["tokens"])
        loss, head_grads, dx = self.pieces.head(params, x, parts["targets"], per_target)
        loss = loss + earlier_loss
        visit = functools.partial(self._visit, state, loss, full, only_refresh)

        def visit_outer(group: _Group, grads: dict[str, Any]) -> "_Visited":
            of_params = {key: params[key] for key in grads}
            return visit(group, of_params, group.state.owned(arrays), _plus(grads, earlier))

        tied_grads = {"embed": head_grads.pop("embed")} if self.model.tie_embeddings else None
        of_head = visit_outer(head, head_grads)
        # The head's gradient is not to outlive its update. (Waiting for the new weights themselves
        # would keep them from being written over the old ones.)
        dx, _ = jax.lax.optimization_barrier((dx, of_head.owned))

        def layer_step(carry: Any, this: Any) -> tuple[Any, Any]:
            blocks, of_groups, dx, squares = carry
            index, x, before = this
            inputs, gradients = [x], {}
            for part in self.pieces.block_parts[:-1]:
                inputs.append(part.over_parts(at(index, blocks), inputs[-1]))
            for i in reversed(range(len(layers))):
                part, group = self.pieces.block_parts[i], layers[i]
                layer = at(index, blocks)
                nodes = {key: layer[key] for key in part.keys}
                if not full:
                    owned = at(index, of_groups[i])
                    of_model = self._kernels(group.tree(nodes), group.state.state(arrays, owned))
                    nodes = {key: of_model["blocks"][key] for key in part.keys}
                grads, dx = part.gradients(layer, nodes, inputs[i], dx)
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
        tail_grads = {"embed": self.pieces.embedding(params, parts["tokens"], dx)}
        of_tail = visit_outer(tail, _plus(tail_grads, tied_grads))

        squares = squares + of_tail.squares
        metrics = {"loss": loss}
        if full:
            metrics["grad_norm"] = jnp.sqrt(squares[0])
        if self.projected is not None and not only_refresh:
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

        of_blocks = [[f"blocks/{key}" for key in part.keys] for part in self.pieces.block_parts]
        return [group(*each) for each in (*of_blocks, ("final_norm", "lm_head"), ("embed",))]

    def _kernels(self, params: Any, opt_state: optax.OptState) -> Any:
        assert self.projected is not None
        return projected_kernels(
            params, opt_state, proj_type=self.projected.proj_type, kernels=BLOCK_KERNELS
        )

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
        extra: dict[str, Any] = {"value": loss}
        if self.refresh is not None:
            extra["refresh"] = "only" if only_refresh else full and self.refresh
        updates, opt_state = self.tx.update(grads, opt_state, params, **extra)
        projected = grads
        if full and self.projected is not None:
            projected = project_gradients(self._kernels(params, opt_state), grads)
        if not only_refresh:
            params = apply_updates(params, updates, before.step, self.rounding)
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
