"""Updates one layer at a time: each as soon as its gradient is there, which then is gone.

As the reference's per-layer hooks (``torchrun_main.py`` of Zhao et al. 2024), without two bugs of
theirs: the optimizer takes one step a batch, not one a micro-batch, and nothing is clipped by
gradients that are gone.

The forward pass keeps each block's input. The backward pass goes from the head through the blocks
to the embedding; it computes a block again, takes its gradient, and writes the new weights and
optimizer state of that layer in the place of the old ones.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

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
from galore_jax.training import steps
from galore_jax.training.parts import assembled, at, joined, over_parts, put
from galore_jax.training.state_parts import StatePart, find_part
from galore_jax.training.steps import Batch, ProjectedMode, TrainState

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

    def tree(self, leaves: Sequence[Any]) -> Any:
        """The params' tree with these weights and without the others."""
        by_index = dict(zip(self.kept, leaves, strict=True))
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
    def graphdef(self) -> Any:
        return steps.graph_definition(self.model)

    @functools.cached_property
    def block(self) -> Any:
        return llama.block_graphdef(self.model)

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
                applied = llama.apply(self.graphdef, with_coordinates(nodes, variables))
                nll, _ = applied.loss(part["tokens"], part["targets"])
                return nll * per_target

            sums = steps.sum_over_parts(
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
        layers, head, tail = self._groups(state)
        earlier_loss, earlier = sums or (jnp.float32(0.0), None)
        add_earlier = lambda grads, key: (  # noqa: E731
            grads if earlier is None else jax.tree.map(jnp.add, grads, earlier[key])
        )
        x, inputs = self._forward(params, parts["tokens"])
        loss, head_grads, dx = self._head(params, x, parts["targets"], per_target)
        loss = loss + earlier_loss
        visit = functools.partial(self._visit, state, loss, full, only_refresh)

        def visit_outer(group: _Group, grads: dict[str, Any]) -> "_Visited":
            grads = {key: add_earlier(of_key, key) for key, of_key in grads.items()}
            of_params = {key: params[key] for key in grads}
            return visit(
                group,
                jax.tree.leaves(of_params),
                group.state.owned(arrays),
                jax.tree.leaves(grads),
            )

        tied_grads = {"embed": head_grads.pop("embed")} if self.model.tie_embeddings else {}
        of_head = visit_outer(head, head_grads)
        # The head's gradient is not to outlive its update. (Waiting for the new weights themselves
        # would keep them from being written over the old ones.)
        dx, _ = jax.lax.optimization_barrier((dx, of_head.owned))

        def layer_step(carry: Any, this: Any) -> tuple[Any, Any]:
            weights, owned, dx, squares = carry
            index, x, before = this
            its_weights, its_state = at(index, weights), at(index, owned)
            tree = layers.tree(its_weights)
            if not full:
                tree = self._kernels(tree, layers.state.state(arrays, its_state))
            grads, dx = self._layer(tree["blocks"], x, dx)
            if before is not None:
                grads = jax.tree.map(jnp.add, grads, before)
            new = visit(layers, its_weights, its_state, jax.tree.leaves(grads))
            carry = (
                put(index, weights, new.weights),
                put(index, owned, new.owned),
                dx,
                squares + new.squares,
            )
            return carry, new.gradients

        blocks = jax.tree.leaves(params["blocks"])
        (blocks, owned, dx, squares), layer_grads = jax.lax.scan(
            layer_step,
            (blocks, layers.state.owned(arrays), dx, of_head.squares),
            (jnp.arange(len(inputs)), inputs, earlier and earlier["blocks"]),
            reverse=True,
        )
        tail_grads = {"embed": self._embedding(params, parts["tokens"], dx)}
        if tied_grads:
            tail_grads = jax.tree.map(jnp.add, tail_grads, tied_grads)
        of_tail = visit_outer(tail, tail_grads)

        squares = squares + of_tail.squares
        metrics = {"loss": loss}
        if full:
            metrics["grad_norm"] = jnp.sqrt(squares[0])
        if self.projected is not None and not only_refresh:
            metrics["projected_grad_norm"] = jnp.sqrt(squares[1])
        gradients = ()
        if only_refresh:
            outer = (head.kept, of_head.gradients), (tail.kept, of_tail.gradients)
            gradients = loss, assembled(layers.treedef, (layers.kept, layer_grads), *outer)
        for group, of_group in ((layers, owned), (head, of_head.owned), (tail, of_tail.owned)):
            arrays = group.state.replaced(arrays, of_group)
        arrays = [of_tail.shared.get(i, x) for i, x in enumerate(arrays)]
        outer = (head.kept, of_head.weights), (tail.kept, of_tail.weights)
        new_state = state._replace(
            params=assembled(layers.treedef, (layers.kept, blocks), *outer),
            opt_state=jax.tree.unflatten(jax.tree.structure(state.opt_state), arrays),
        )
        return new_state, metrics, gradients

    def _groups(self, state: TrainState) -> tuple[_Group, _Group, _Group]:
        """The blocks' weights, those of the head with the final norm, and the embedding."""
        paths = [leaf_path(path) for path, _ in jax.tree_util.tree_leaves_with_path(state.params)]

        def group(*keys: str) -> _Group:
            kept = tuple(i for i, path in enumerate(paths) if path.split("/")[0] in keys)
            part = find_part(state.opt_state, state.params, kept)
            return _Group(kept, jax.tree.structure(state.params), part)

        return group("blocks"), group("final_norm", "lm_head"), group("embed")

    def _kernels(self, params: Any, opt_state: optax.OptState) -> Any:
        assert self.projected is not None
        return projected_kernels(
            params, opt_state, proj_type=self.projected.proj_type, kernels=steps.BLOCK_KERNELS
        )

    def _visit(
        self,
        before: TrainState,
        loss: jax.Array,
        full: bool,
        only_refresh: bool,
        group: _Group,
        weights: Sequence[jax.Array],
        owned: Sequence[jax.Array],
        gradients: Sequence[jax.Array],
    ) -> "_Visited":
        """One group's update: of one layer, or of weights outside the blocks."""
        arrays = jax.tree.leaves(before.opt_state)
        params, opt_state = group.tree(weights), group.state.state(arrays, owned)
        # The nodes whose gradients these are, and those for the bases after the update.
        nodes = params if full else self._kernels(params, opt_state)
        gradients = [g.astype(w.dtype) for g, w in zip(gradients, weights, strict=True)]
        grads = as_gradients(nodes, group.tree(gradients))
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
        return _Visited(
            jax.tree.leaves(params),
            new_owned,
            shared,
            jnp.stack([_sum_of_squares(grads), _sum_of_squares(projected)]),
            [g.astype(jnp.float32) for g in jax.tree.leaves(projected)] if only_refresh else [],
        )

    def _block(self, layer: Any, x: jax.Array) -> jax.Array:
        positions = jnp.arange(x.shape[1], dtype=jnp.int32)

        def attend(layer: Any, x: jax.Array) -> jax.Array:
            return nnx.merge(self.block, layer).attend(x, positions)

        def feed_forward(layer: Any, x: jax.Array) -> jax.Array:
            return nnx.merge(self.block, layer).feed_forward(x)

        if self.model.remat:  # the backward pass keeps one half's activations at a time
            attend, feed_forward = jax.checkpoint(attend), jax.checkpoint(feed_forward)
        return feed_forward(layer, attend(layer, x))

    def _forward(self, params: Any, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The last block's output, (k, B, S, D), and the input of each, (L, k, B, S, D)."""

        def forward(x: jax.Array, layer: Any) -> tuple[jax.Array, jax.Array]:
            return jax.lax.map(functools.partial(self._block, layer), x), x

        model = llama.apply(self.graphdef, params)
        return jax.lax.scan(forward, jax.lax.map(model.embed, tokens), params["blocks"])

    def _head(
        self, params: Any, x: jax.Array, targets: jax.Array, per_target: jax.Array
    ) -> tuple[jax.Array, dict[str, Any], jax.Array]:
        """The loss, the gradients of the weights behind the blocks, and that of the input."""
        keys = ("final_norm", "embed" if self.model.tie_embeddings else "lm_head")

        def loss(weights: Any, x: jax.Array) -> jax.Array:
            model = llama.apply(self.graphdef, {**params, **weights})
            return model.nll(model.final_norm(x), joined(targets))[0] * per_target

        weights = {key: params[key] for key in keys}
        value, (grads, dx) = jax.value_and_grad(loss, argnums=(0, 1))(weights, joined(x))
        return value, grads, dx.reshape(x.shape)

    def _layer(self, layer: Any, x: jax.Array, dx: jax.Array) -> tuple[Any, jax.Array]:
        """A block's gradients with respect to its variables and to its input."""

        def of_part(part: Any) -> tuple[Any, jax.Array]:
            x, dx = part
            run = lambda variables, x: self._block(  # noqa: E731
                with_coordinates(layer, variables), x
            )
            return jax.vjp(run, variables_of(layer), x)[1](dx)

        return over_parts(of_part, (x, dx))

    def _embedding(self, params: Any, tokens: jax.Array, dx: jax.Array) -> Any:
        def run(weights: Any) -> jax.Array:
            return llama.apply(self.graphdef, {**params, "embed": weights}).embed(joined(tokens))

        return jax.vjp(run, params["embed"])[1](joined(dx))[0]


class _Visited(NamedTuple):
    """What is new after a group's update.

    Attributes:
      weights: its weights.
      owned: the arrays of the optimizer's state that it owns.
      shared: those that belong to no weight, by their positions in the flat state.
      squares: sums of the squares of its gradients, and of those as the optimizer sees them, (2,).
      gradients: those in the new bases, float32, where the bases alone were to change.
    """

    weights: list[jax.Array]
    owned: list[jax.Array]
    shared: dict[int, jax.Array]
    squares: jax.Array
    gradients: list[jax.Array]


def _sum_of_squares(tree: Any) -> jax.Array:
    return optax.tree.norm(jax.tree.map(lambda x: x.astype(jnp.float32), tree), squared=True)
