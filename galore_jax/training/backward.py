"""A model's forward and backward pass a stage at a time, for layerwise updates.

Arrays that go through the blocks are (k, B, S, D): k micro-batches side by side.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from galore_jax.int8_kernels import float_variables, with_float_variables
from galore_jax.models.stages import BLOCKS, Stage, Stages
from galore_jax.training.tasks import Batch, Task


def run_stage(stage: Stage, layer: Any, x: jax.Array) -> jax.Array:
    """Runs a part of a block on each micro-batch."""
    return jax.lax.map(functools.partial(stage.run, layer), x)


def run_forward(model: Stages, params: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Returns the last block's output, and the input of each block, (L, k, B, S, D)."""

    def run_block(x: jax.Array, layer: Any) -> tuple[jax.Array, jax.Array]:
        return functools.reduce(lambda x, stage: run_stage(stage, layer, x), model.block, x), x

    x = jax.lax.map(functools.partial(model.before.run, params), batch)
    return jax.lax.scan(run_block, x, params[BLOCKS])


def stage_gradients(
    run: Callable[[Any, jax.Array], jax.Array], variables: Any, x: jax.Array, dx: jax.Array
) -> tuple[Any, jax.Array]:
    """Differentiates a part of a block.

    Args:
      run: a function of (variables, a micro-batch's input).
      variables: what the derivative is taken with respect to.
      x: the input.
      dx: the gradient with respect to the output.

    Returns:
      The gradients with respect to the variables, summed over the micro-batches (in float32 if
      there are several), and with respect to the input.
    """

    def gradients(part: Any) -> tuple[Any, jax.Array]:
        x, dx = part
        return jax.vjp(run, variables, x)[1](dx)

    if len(x) == 1:
        total, dx = gradients((x[0], dx[0]))
        return total, dx[None]

    def add(total: Any, part: Any) -> tuple[Any, jax.Array]:
        grads, dx = gradients(part)
        return jax.tree.map(jnp.add, total, grads), dx

    shapes, _ = jax.eval_shape(gradients, (x[0], dx[0]))
    # Zeros that XLA does not know for zeros, see galore_jax.models.losses.
    zero = jax.lax.optimization_barrier(jnp.float32(0.0))
    return jax.lax.scan(add, jax.tree.map(lambda s: jnp.full(s.shape, zero), shapes), (x, dx))


def after_gradients(
    model: Stages, task: Task, params: Any, x: jax.Array, batch: Batch, per_target: jax.Array
) -> tuple[jax.Array, dict[str, Any], jax.Array]:
    """Returns the mean loss, its gradients by the weights after the blocks, and by ``x``."""
    weights = {key: params[key] for key in model.after.keys}

    def loss(variables: Any, x: jax.Array) -> jax.Array:
        outputs = model.after.run({**params, **with_float_variables(weights, variables)}, x)
        return task.loss(outputs, jax.tree.map(_joined, batch)) * per_target

    variables = float_variables(weights)
    value, (grads, dx) = jax.value_and_grad(loss, argnums=(0, 1))(variables, _joined(x))
    return value, grads, dx.reshape(x.shape)


def before_gradients(model: Stages, params: Any, batch: Batch, dx: jax.Array) -> dict[str, Any]:
    """Returns the gradients by the weights before the blocks."""
    weights = {key: params[key] for key in model.before.keys}

    def run(variables: Any) -> jax.Array:
        nodes = {**params, **with_float_variables(weights, variables)}
        return model.before.run(nodes, jax.tree.map(_joined, batch))

    return jax.vjp(run, float_variables(weights))[1](_joined(dx))[0]


def _joined(parts: jax.Array) -> jax.Array:
    """Micro-batches side by side, (k, B, ...), as one batch (k B, ...)."""
    return parts.reshape(-1, *parts.shape[2:])
