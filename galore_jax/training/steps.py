"""The pure functions of training: first state, one update, evaluation of one batch."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from galore_jax.memory import tree_bytes
from galore_jax.models import llama
from galore_jax.models.llama import LlamaConfig
from galore_jax.rounding import Rounding, apply_updates

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


def make_train_step(
    model: LlamaConfig,
    tx: optax.GradientTransformationExtraArgs,
    schedule: optax.Schedule,
    *,
    micro_batches: int,
    rounding: Rounding = "nearest",
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]:
    """One update: the mean loss over the targets of the whole batch, its gradient, the optimizer.

    The batch is cut into ``micro_batches`` equal parts, whose gradients add up in float32. Each
    target counts alike, whichever part it is in. ``rounding`` is that of bfloat16 weights, see
    :func:`galore_jax.rounding.apply_updates`.

    Returns:
      A pure function of (state, batch) giving the new state and, all () float32 but ``tokens``:
      ``loss`` in nats a target, ``learning_rate``, ``grad_norm`` (global, before clipping), and
      ``tokens``, the int32 number of targets. Meant for ``jax.jit`` with the state donated.
    """
    graphdef = graph_definition(model)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        tokens = jnp.sum(batch["targets"] >= 0, dtype=jnp.int32)
        per_target = 1.0 / jnp.maximum(tokens, 1).astype(jnp.float32)

        def part_of_mean(params: Any, part: Batch) -> jax.Array:
            nll, _ = llama.apply(graphdef, params).loss(part["tokens"], part["targets"])
            return nll * per_target

        loss_and_grad = jax.value_and_grad(part_of_mean)
        if micro_batches == 1:
            loss, grads = loss_and_grad(state.params, batch)
        else:
            parts = jax.tree.map(lambda x: x.reshape(micro_batches, -1, *x.shape[1:]), batch)
            loss, grads = _sum_over_parts(loss_and_grad, state.params, parts)

        updates, opt_state = tx.update(grads, state.opt_state, state.params, value=loss)
        metrics = {
            "loss": loss,
            "learning_rate": jnp.asarray(schedule(state.step), jnp.float32),
            "grad_norm": optax.tree.norm(jax.tree.map(lambda g: g.astype(jnp.float32), grads)),
            "tokens": tokens,
        }
        params = apply_updates(state.params, updates, state.step, rounding)
        return TrainState(state.step + 1, params, opt_state), metrics

    return train_step


def _sum_over_parts(loss_and_grad, params: Any, parts: Batch) -> tuple[jax.Array, Any]:
    def add(carry, part):
        loss, grads = loss_and_grad(params, part)
        return jax.tree.map(lambda total, x: total + x, carry, (loss, grads)), None

    zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)
    (loss, grads), _ = jax.lax.scan(add, (jnp.float32(0.0), zeros), parts)
    return loss, jax.tree.map(lambda g, p: g.astype(p.dtype), grads, params)


def gradient_bytes(params: Any, micro_batches: int) -> int:
    """Bytes of the gradients: as the weights, and a float32 sum if there are micro-batches."""
    total = tree_bytes(params)
    if micro_batches > 1:
        total += 4 * sum(leaf.size for leaf in jax.tree.leaves(params))
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
