"""The model in the pieces that layerwise updates walk through, each with its derivative.

Arrays that go through the blocks are (k, B, S, D): k micro-batches side by side.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from galore_jax.models import llama
from galore_jax.models.llama import LlamaConfig
from galore_jax.projected_grad import variables_of, with_coordinates
from galore_jax.training import steps
from galore_jax.training.parts import joined, over_parts


@dataclasses.dataclass(frozen=True)
class BlockPart:
    """A part of a block whose weights are updated together.

    Attributes:
      keys: of its weights in a layer's params, sorted.
      run: a function of (layer, x), the part itself; of the layer it reads these keys alone.
    """

    keys: tuple[str, ...]
    run: Callable[[Any, jax.Array], jax.Array]

    def over_parts(self, layer: Any, x: jax.Array) -> jax.Array:
        """(k, B, S, D) to (k, B, S, D)."""
        return jax.lax.map(functools.partial(self.run, layer), x)

    def gradients(
        self, layer: Any, nodes: dict[str, Any], x: jax.Array, dx: jax.Array
    ) -> tuple[dict[str, Any], jax.Array]:
        """Gradients with respect to its weights, summed over the micro-batches, and to its input.

        Args:
          layer: the block's params.
          nodes: those of this part, or what :func:`galore_jax.projected_grad.projected_kernels`
            has in their place.
          x: its input.
          dx: the gradient with respect to its output.
        """

        def of_part(part: Any) -> tuple[Any, jax.Array]:
            x, dx = part
            run = lambda variables, x: self.run(  # noqa: E731
                {**layer, **with_coordinates(nodes, variables)}, x
            )
            return jax.vjp(run, variables_of(nodes), x)[1](dx)

        return over_parts(of_part, (x, dx))


@dataclasses.dataclass(frozen=True)
class Pieces:
    """A model's embedding, blocks and head."""

    model: LlamaConfig

    @functools.cached_property
    def graphdef(self) -> Any:
        """The whole model's."""
        return steps.graph_definition(self.model)

    @functools.cached_property
    def block_parts(self) -> tuple[BlockPart, ...]:
        """In the order of the forward pass: a block's halves with ``remat``, else the block.

        What is computed again for the second half's sake is then computed once more for the first,
        which ``remat`` does anyhow.
        """
        block = llama.block_graphdef(self.model)

        def attend(layer: Any, x: jax.Array) -> jax.Array:
            positions = jnp.arange(x.shape[1], dtype=jnp.int32)
            return nnx.merge(block, layer).attend(x, positions)

        def feed_forward(layer: Any, x: jax.Array) -> jax.Array:
            return nnx.merge(block, layer).feed_forward(x)

        def whole(layer: Any, x: jax.Array) -> jax.Array:
            return feed_forward(layer, attend(layer, x))

        first = BlockPart(("attn", "input_norm"), attend)
        second = BlockPart(("mlp", "post_attention_norm"), feed_forward)
        if self.model.remat:
            return first, second
        return (BlockPart(tuple(sorted(first.keys + second.keys)), whole),)

    def forward(self, params: Any, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The last block's output, (k, B, S, D), and the input of each, (L, k, B, S, D)."""

        def forward(x: jax.Array, layer: Any) -> tuple[jax.Array, jax.Array]:
            return functools.reduce(
                lambda x, part: part.over_parts(layer, x), self.block_parts, x
            ), x

        model = llama.apply(self.graphdef, params)
        return jax.lax.scan(forward, jax.lax.map(model.embed, tokens), params["blocks"])

    def head(
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

    def embedding(self, params: Any, tokens: jax.Array, dx: jax.Array) -> Any:
        """The embedding's gradient."""

        def run(weights: Any) -> jax.Array:
            return llama.apply(self.graphdef, {**params, "embed": weights}).embed(joined(tokens))

        return jax.vjp(run, params["embed"])[1](joined(dx))[0]
