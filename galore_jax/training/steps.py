"""The pure functions of training: first state, one update, evaluation of one batch."""

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from galore_jax.memory.count import tree_bytes
from galore_jax.models import llama
from galore_jax.models.llama import LlamaConfig
from galore_jax.projected_grad import (
    as_gradients,
    project_gradients,
    projected_kernels,
    variables_of,
    with_coordinates,
)
from galore_jax.projection import ProjType, is_projected_gradient
from galore_jax.rounding import Rounding, apply_updates

RefreshFrom = Literal["batch", "micro_batch"]
# The leaves that are only ever multiplied by galore_jax.projected_grad.linear, a layer at a time.
BLOCK_KERNELS = r"^blocks/.*/kernel$"

NORMS = ("grad_norm", "projected_grad_norm")

Batch = dict[str, jax.Array]  # "tokens" and "targets", (sequences, seq_len) int32, targets shifted.


class TrainState(NamedTuple):
    """All that an update changes.

    Attributes:
      step: updates made, () int32.
      params: the model's weights, nested dicts of arrays.
      opt_state: the optimizer's state.
    """

    step: jax.Array
    params: Any
    opt_state: optax.OptState


def init_state(model: LlamaConfig, tx: optax.GradientTransformation, key: jax.Array) -> TrainState:
    """The state before the first update; free of memory under ``jax.eval_shape``."""
    _, params = llama.init_params(model, key)
    return TrainState(jnp.zeros([], jnp.int32), params, tx.init(params))


def graph_definition(model: LlamaConfig) -> Any:
    """The model's static part, for ``llama.apply``."""
    graphdef, _ = jax.eval_shape(functools.partial(llama.init_params, model), jax.random.key(0))
    return graphdef


class ProjectedMode(NamedTuple):
    """How gradients are taken that are born projected.

    Attributes:
      proj_type: GaLore's.
      refresh_from: where a new basis comes from: ``"batch"``, the full gradient of the whole batch,
        or ``"micro_batch"``, that of its first micro-batch, so that the full gradient is never
        added up in float32.
    """

    proj_type: ProjType
    refresh_from: RefreshFrom


def make_train_step(
    model: LlamaConfig,
    tx: optax.GradientTransformationExtraArgs,
    schedule: optax.Schedule,
    *,
    micro_batches: int,
    rounding: Rounding = "nearest",
    refresh: bool | None = None,
    projected: ProjectedMode | None = None,
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]:
    """One update: the mean loss over the targets of the whole batch, its gradient, the optimizer.

    The batch is cut into ``micro_batches`` equal parts, whose gradients add up in float32. Each
    target counts alike, whichever part it is in.

    Args:
      model: the model.
      tx: the optimizer.
      schedule: its learning rate, for the metrics.
      micro_batches: number of parts.
      rounding: of bfloat16 weights, see :func:`galore_jax.rounding.apply_updates`.
      refresh: for GaLore, whether this is a step that changes the basis.
      projected: for GaLore, to take projected gradients of the blocks' kernels where ``refresh`` is
        False; None for full ones always.

    Returns:
      A pure function of (state, batch) giving the new state and, all () float32 but ``tokens``:
      ``loss`` in nats a target, ``learning_rate``, ``tokens``, the int32 number of targets,
      ``grad_norm``, global and before clipping, where full gradients are there, and with
      ``projected`` the norm of what the optimizer sees of them, ``projected_grad_norm``.
      Meant for ``jax.jit`` with the state donated.
    """
    graphdef = graph_definition(model)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        tokens = jnp.sum(batch["targets"] >= 0, dtype=jnp.int32)
        per_target = 1.0 / jnp.maximum(tokens, 1).astype(jnp.float32)
        parts = jax.tree.map(lambda x: x.reshape(micro_batches, -1, *x.shape[1:]), batch)

        def part_of_mean(params: Any, part: Batch) -> jax.Array:
            nll, _ = llama.apply(graphdef, params).loss(part["tokens"], part["targets"])
            return nll * per_target

        def kernels(opt_state: optax.OptState) -> Any:
            assert projected is not None
            return projected_kernels(
                state.params, opt_state, proj_type=projected.proj_type, kernels=BLOCK_KERNELS
            )

        opt_state, norms = state.opt_state, {}
        of_optimizer = {} if refresh is None else {"refresh": refresh}
        if projected is None or (
            refresh and (projected.refresh_from == "batch" or micro_batches == 1)
        ):
            loss, grads = sum_over_parts(jax.value_and_grad(part_of_mean), state.params, parts)
            grads = _cast_like(state.params, grads)
            norms["grad_norm"] = gradient_norm(grads)
        else:
            first = ()
            if refresh:
                head = jax.tree.map(lambda x: x[0], parts)
                parts = jax.tree.map(lambda x: x[1:], parts)
                loss, grads = jax.value_and_grad(part_of_mean)(state.params, head)
                norms["grad_norm"] = gradient_norm(grads)
                _, opt_state = tx.update(grads, opt_state, state.params, value=loss, refresh="only")
                nodes = kernels(opt_state)
                first = loss, variables_of_gradients(project_gradients(nodes, grads))
            nodes = kernels(opt_state)

            def of_variables(variables: Any, part: Batch) -> jax.Array:
                return part_of_mean(with_coordinates(nodes, variables), part)

            loss, grads = sum_over_parts(
                jax.value_and_grad(of_variables), variables_of(nodes), parts, first
            )
            grads = as_gradients(nodes, _cast_like(variables_of(nodes), grads))
            norms["projected_grad_norm"] = gradient_norm(grads)
            of_optimizer = {"refresh": False}

        updates, opt_state = tx.update(grads, opt_state, state.params, value=loss, **of_optimizer)
        if projected is not None and "projected_grad_norm" not in norms:
            norms["projected_grad_norm"] = gradient_norm(
                project_gradients(kernels(opt_state), grads)
            )
        metrics = {
            "loss": loss,
            "learning_rate": jnp.asarray(schedule(state.step), jnp.float32),
            "tokens": tokens,
            **norms,
        }
        params = apply_updates(state.params, updates, state.step, rounding)
        return TrainState(state.step + 1, params, opt_state), metrics

    return train_step


def _cast_like(params: Any, grads: Any) -> Any:
    return jax.tree.map(lambda p, g: g.astype(p.dtype), params, grads)


def gradient_norm(grads: Any) -> jax.Array:
    """Of the whole tree, () float32."""
    return optax.tree.norm(jax.tree.map(lambda g: g.astype(jnp.float32), grads))


def variables_of_gradients(grads: Any) -> Any:
    """The arrays of gradients some of which are projected, without the nodes around them."""
    plain = lambda g: g.coordinates if is_projected_gradient(g) else g  # noqa: E731
    return jax.tree.map(plain, grads, is_leaf=is_projected_gradient)


def sum_over_parts(loss_and_grad, variables: Any, parts: Batch, first=()) -> tuple[Any, Any]:
    """Summed in float32, starting from the (loss, gradients) of ``first`` if there is one."""
    if not first and len(jax.tree.leaves(parts)[0]) == 1:
        return loss_and_grad(variables, jax.tree.map(lambda x: x[0], parts))

    def add(carry, part):
        return jax.tree.map(lambda total, x: total + x, carry, loss_and_grad(variables, part)), None

    start = first or (jnp.float32(0.0), jax.tree.map(jnp.zeros_like, variables))
    start = jax.tree.map(lambda x: x.astype(jnp.float32), start)
    (loss, grads), _ = jax.lax.scan(add, start, parts)
    return loss, grads


def gradient_bytes(gradients: Any, micro_batches: int) -> int:
    """Bytes of gradients of these shapes, with a float32 sum of them if there are micro-batches."""
    total = tree_bytes(gradients)
    if micro_batches > 1:
        total += 4 * sum(leaf.size for leaf in jax.tree.leaves(gradients))
    return total


def make_eval_step(
    model: LlamaConfig,
) -> Callable[[Any, Batch], tuple[jax.Array, jax.Array]]:
    """A pure function of (params, batch): summed loss in nats, and the number of targets."""
    graphdef = graph_definition(model)

    def eval_step(params: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
        return llama.apply(graphdef, params).loss(batch["tokens"], batch["targets"])

    return eval_step


def all_finite(state: TrainState) -> jax.Array:
    """Whether no weight and no moment is NaN or infinite, () bool."""
    leaves = [x for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.floating)]
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in leaves]).all()
