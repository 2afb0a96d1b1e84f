"""The stages of a model that layerwise updates walk through, each with its derivative.

Arrays that go through the blocks are (k, B, S, D): k micro-batches side by side.
"""

import functools
from typing import Any

import jax

from galore_jax.models.stages import BLOCKS, Stage, Stages
from galore_jax.projected_grad import variables_of, with_coordinates
from galore_jax.training.parts import joined, over_parts
from galore_jax.training.tasks import Batch, Task


def run_stage(stage: Stage, layer: Any, x: jax.Array) -> jax.Array:
    """Runs a part of a block on each micro-batch, (k, B, S, D) to (k, B, S, D)."""
    return jax.lax.map(functools.partial(stage.run, layer), x)


def stage_gradients(
    stage: Stage, layer: Any, nodes: dict[str, Any], x: jax.Array, dx: jax.Array
) -> tuple[dict[str, Any], jax.Array]:
    """Gradients with respect to a part's weights, summed over micro-batches, and to its input.

    Args:
      stage: the part of a block.
      layer: the block's params.
      nodes: those of this part, or what :func:`galore_jax.projected_grad.projected_kernels`
        has in their place.
      x: its input.
      dx: the gradient with respect to its output.
    """

    def of_part(part: Any) -> tuple[Any, jax.Array]:
        x, dx = part
        run = lambda variables, x: stage.run(  # noqa: E731
            {**layer, **with_coordinates(nodes, variables)}, x
        )
        return jax.vjp(run, variables_of(nodes), x)[1](dx)

    return over_parts(of_part, (x, dx))


def forward(model: Stages, params: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """The last block's output, (k, B, S, D), and the input of each, (L, k, B, S, D)."""

    def block(x: jax.Array, layer: Any) -> tuple[jax.Array, jax.Array]:
        return functools.reduce(lambda x, part: run_stage(part, layer, x), model.block, x), x

    x = jax.lax.map(functools.partial(model.before.run, params), batch)
    return jax.lax.scan(block, x, params[BLOCKS])


def head_gradients(
    model: Stages, task: Task, params: Any, x: jax.Array, batch: Batch, per_target: jax.Array
) -> tuple[jax.Array, dict[str, Any], jax.Array]:
    """The loss, the gradients of the weights behind the blocks, and that of the input."""

    def loss(weights: Any, x: jax.Array) -> jax.Array:
        outputs = model.after.run({**params, **weights}, x)
        return task.loss(outputs, jax.tree.map(joined, batch)) * per_target

    weights = {key: params[key] for key in model.after.keys}
    value, (grads, dx) = jax.value_and_grad(loss, argnums=(0, 1))(weights, joined(x))
    return value, grads, dx.reshape(x.shape)


def input_gradients(model: Stages, params: Any, batch: Batch, dx: jax.Array) -> dict[str, Any]:
    """The gradients of the weights before the blocks."""

    def run(weights: Any) -> jax.Array:
        return model.before.run({**params, **weights}, jax.tree.map(joined, batch))

    weights = {key: params[key] for key in model.before.keys}
    return jax.vjp(run, weights)[1](joined(dx))[0]
