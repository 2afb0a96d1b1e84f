"""LLaMA: a decoder-only transformer with its blocks stacked along a leading layer axis."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from galore_jax.int8_kernels import is_int8
from galore_jax.kernels import linear
from galore_jax.models.attention import Cache, causal_attention, rotary
from galore_jax.models.config import LlamaConfig
from galore_jax.models.layers import MLP, Embedding, Linear, RMSNorm, value_of
from galore_jax.models.leaf_tensors import check_shapes
from galore_jax.models.losses import cross_entropy
from galore_jax.models.stages import Stage, Stages

Params = dict[str, Any]  # Nested dicts of arrays.


class Predictions(NamedTuple):
    """Logits as two factors, whose product ``cross_entropy`` cuts.

    Attributes:
      hidden: the normalised output of the last block, (B, S, D).
      head: the head's kernel, (D, V).
    """

    hidden: jax.Array
    head: Any


class Attention(nnx.Module):
    """Causal self-attention with rotary positions and grouped key and value heads."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        width, head_size = config.hidden_size, config.head_size
        self.q_proj = Linear(config, width, config.num_heads * head_size, rngs=rngs)
        self.k_proj = Linear(config, width, config.kv_heads * head_size, rngs=rngs)
        self.v_proj = Linear(config, width, config.kv_heads * head_size, rngs=rngs)
        self.o_proj = Linear(config, config.num_heads * head_size, width, rngs=rngs)
        self.config = config

    def __call__(self, x: jax.Array, positions: jax.Array) -> jax.Array:
        """(B, S, D) to (B, S, D); ``positions`` is (S,) or (B, S)."""
        return self._attend(*self._project(x, positions))

    def extend(
        self, x: jax.Array, positions: jax.Array, cache: Cache, layer: jax.Array
    ) -> tuple[jax.Array, Cache]:
        """As a call, for rows (B, S, D) that follow those that the cache has."""
        query, key, value = self._project(x, positions)
        cache = cache.put(layer, positions[0], key, value)
        return self._attend(query, *cache.of(layer), positions), cache

    def _project(
        self, x: jax.Array, positions: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """(B, S, D) to queries (B, S, N, H), keys and values (B, S, K, H), with their positions."""
        config = self.config
        batch, length, _ = x.shape
        query = self.q_proj(x).reshape(batch, length, config.num_heads, config.head_size)
        key = self.k_proj(x).reshape(batch, length, config.kv_heads, config.head_size)
        value = self.v_proj(x).reshape(batch, length, config.kv_heads, config.head_size)
        query = rotary(query, positions, config.rope_theta, config.rope_scaling)
        key = rotary(key, positions, config.rope_theta, config.rope_scaling)
        return query, key, value

    def _attend(self, query: Any, key: Any, value: Any, positions: Any = None) -> jax.Array:
        """Queries (B, S, N, H), with keys and values (B, T, K, H), to (B, S, D)."""
        implementation = self.config.attention_implementation
        heads = causal_attention(query, key, value, implementation, positions)
        return self.o_proj(heads.reshape(*heads.shape[:2], -1))


class Block(nnx.Module):
    """One pre-norm transformer block."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        # Not attn_norm and mlp_norm: the patterns "attn" and "mlp" must select kernels alone.
        self.input_norm = RMSNorm(config)
        self.attn = Attention(config, rngs=rngs)
        self.post_attention_norm = RMSNorm(config)
        self.mlp = MLP(config, rngs=rngs)

    def __call__(self, x: jax.Array, positions: jax.Array) -> jax.Array:
        """(B, S, D) to (B, S, D); ``positions`` is (S,) or (B, S)."""
        return self.feed_forward(self.attend(x, positions))

    def attend(self, x: jax.Array, positions: jax.Array) -> jax.Array:
        """Runs the first half of the block."""
        return x + self.attn(self.input_norm(x), positions)

    def extend(
        self, x: jax.Array, positions: jax.Array, cache: Cache, layer: jax.Array
    ) -> tuple[jax.Array, Cache]:
        """As a call, for rows (B, S, D) that follow those that the cache has."""
        attended, cache = self.attn.extend(self.input_norm(x), positions, cache, layer)
        return self.feed_forward(x + attended), cache

    def feed_forward(self, x: jax.Array) -> jax.Array:
        """Runs the second half."""
        return x + self.mlp(self.post_attention_norm(x))


class Llama(nnx.Module):
    """A LLaMA language model (Touvron et al. 2023, arXiv:2302.13971).

    Parameters, by path: ``embed/embedding`` (V, D); under ``blocks``, each with a leading
    axis of L layers, ``input_norm/scale``, ``attn/{q,k,v,o}_proj/kernel`` (L, in, out),
    ``post_attention_norm/scale``, ``mlp/{gate,up,down}_proj/kernel``; ``final_norm/scale``;
    and ``lm_head/kernel`` (D, V) unless ``tie_embeddings``.

    >>> config = LlamaConfig(16, 24, num_layers=2, num_heads=2, vocab_size=32)
    >>> model = Llama(config, rngs=nnx.Rngs(0))
    >>> model.logits(jnp.zeros((1, 8), jnp.int32)).shape
    (1, 8, 32)
    """

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.embed = Embedding(config, rngs=rngs)
        keys = jax.random.split(rngs.params(), config.num_layers)
        # A loop, not jax.vmap: random bits for one layer at a time (3.7 GiB, not 53, for 7B).
        graphdef, stack = jax.lax.map(
            lambda key: nnx.split(Block(config, rngs=nnx.Rngs(key))), keys
        )
        self.blocks = nnx.merge(graphdef, stack)
        self.final_norm = RMSNorm(config)
        if not config.tie_embeddings:
            self.lm_head = Linear(config, config.hidden_size, config.vocab_size, rngs=rngs)

    @property
    def head(self) -> Any:
        """The head's kernel, (D, V)."""
        if self.config.tie_embeddings:
            return value_of(self.embed.embedding).T
        return value_of(self.lm_head.kernel)

    def hidden_states(self, tokens: jax.Array, positions: jax.Array | None = None) -> jax.Array:
        """Computes the last block's output, normalised.

        Args:
          tokens: ``(B, S)``, int32.
          positions: ``(S,)`` or ``(B, S)``, int32; None for 0 to S - 1.

        Returns:
          ``(B, S, D)`` in the compute dtype.
        """
        if positions is None:
            positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)
        graphdef, stack = nnx.split(self.blocks)

        def apply_block(x, layer):
            return nnx.merge(graphdef, layer)(x, positions), None

        # Writing every activation to the scan's stack costs more than computing norms, rotary
        # and softmax twice: keeping the linears' outputs alone is 1.1x as fast on a CPU.
        keep_linears = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
        policy = None if self.config.remat else keep_linears
        apply_block = jax.checkpoint(apply_block, prevent_cse=False, policy=policy)
        x, _ = jax.lax.scan(apply_block, self.embed(tokens), stack)
        return self.final_norm(x)

    def extend(self, tokens: jax.Array, cache: Cache, start: jax.Array) -> tuple[jax.Array, Cache]:
        """Computes ``hidden_states`` of tokens that follow those in a cache.

        Args:
          tokens: ``(B, S)``, int32.
          cache: has keys and values of the positions before ``start``; what it has after them does
            not matter.
          start: the position of the first of ``tokens``; the last one must have room in the cache.

        Returns:
          ``(B, S, D)`` in the compute dtype, and the cache with the keys and values of ``tokens``.
        """
        positions = start + jnp.arange(tokens.shape[1], dtype=jnp.int32)
        graphdef, stack = nnx.split(self.blocks)

        def apply_block(carry, layer):
            x, cache = carry
            params, index = layer
            return nnx.merge(graphdef, params).extend(x, positions, cache, index), None

        layers = stack, jnp.arange(self.config.num_layers, dtype=jnp.int32)
        (x, cache), _ = jax.lax.scan(apply_block, (self.embed(tokens), cache), layers)
        return self.final_norm(x), cache

    def logits(self, tokens: jax.Array) -> jax.Array:
        """Computes logits ``(B, S, V)``, float32, of the token after each of ``tokens`` (B, S)."""
        return linear(self.hidden_states(tokens), self.head, out_dtype=jnp.float32)

    def loss(self, tokens: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Sums the negative log-likelihood of ``targets``; see ``cross_entropy``.

        Args:
          tokens: ``(B, S)``, int32.
          targets: ``(B, S)``, int32, already shifted: ``targets[b, t]`` is the token that
            position t must predict. Negative targets are ignored.

        Returns:
          The sum over the targets not ignored, float32, in nats; and their number, int32.
        """
        hidden, chunk_tokens = self.hidden_states(tokens), self.config.loss_chunk_tokens
        return cross_entropy(hidden, self.head, targets, chunk_tokens=chunk_tokens)


def init_params(config: LlamaConfig, key: jax.Array) -> tuple[nnx.GraphDef, Params]:
    """Draws the parameters of a ``Llama``.

    Pure, so it can be jitted, and evaluated by ``jax.eval_shape`` without memory.

    Args:
      config: the model.
      key: a PRNG key.

    Returns:
      The static graph definition, and the parameters as nested dicts of arrays.

    >>> import functools
    >>> from galore_jax.models.presets import PRESETS
    >>> init = functools.partial(init_params, PRESETS["llama_7b"])
    >>> _, params = jax.eval_shape(init, jax.random.key(0))
    >>> params["blocks"]["attn"]["q_proj"]["kernel"].shape
    (32, 4096, 4096)
    """
    graphdef, state = nnx.split(Llama(config, rngs=nnx.Rngs(key)))
    return graphdef, nnx.to_pure_dict(state)


def check_params(config: LlamaConfig, params: Params, what: str = "the params") -> None:
    """Checks that params have the names and shapes of a model's.

    Args:
      config: the model.
      params: nested dicts of arrays.
      what: what to call them in the message.

    Raises:
      UserError: one that the model lacks, or that lacks, or of another shape.

    >>> config = LlamaConfig(16, 24, num_layers=2, num_heads=2, vocab_size=32)
    >>> _, params = init_params(config, jax.random.key(0))
    >>> check_params(config, params)
    """
    _, shapes = jax.eval_shape(functools.partial(init_params, config), jax.random.key(0))
    check_shapes(shapes, params, what)


def apply(graphdef: nnx.GraphDef, params: Params) -> Llama:
    """Makes the model with these parameters; free inside ``jax.jit`` and ``jax.grad``.

    >>> config = LlamaConfig(16, 24, num_layers=2, num_heads=2, vocab_size=32)
    >>> graphdef, params = init_params(config, jax.random.key(0))
    >>> tokens = jnp.zeros((1, 8), jnp.int32)
    >>> nll, count = jax.jit(lambda p: apply(graphdef, p).loss(tokens, tokens))(params)
    >>> nll.dtype, int(count)
    (dtype('float32'), 8)
    """
    return nnx.merge(graphdef, params)


def stages(config: LlamaConfig) -> Stages:
    """Cuts the model into embedding, blocks and head; with ``remat`` each block into its halves.

    >>> config = LlamaConfig(16, 24, num_layers=2, num_heads=2, vocab_size=32)
    >>> _, params = init_params(config, jax.random.key(0))
    >>> model, batch = stages(config), {"tokens": jnp.zeros((1, 8), jnp.int32)}
    >>> x = model.before.run(params, batch)
    >>> for index in range(config.num_layers):
    ...     layer = jax.tree.map(lambda leaf: leaf[index], params["blocks"])
    ...     for stage in model.block:
    ...         x = stage.run(layer, x)
    >>> whole = model.forward(params, batch)
    >>> jnp.allclose(model.after.run(params, x).hidden, whole.hidden, atol=1e-6).item()
    True
    """
    graphdef, _ = jax.eval_shape(functools.partial(init_params, config), jax.random.key(0))
    block, _ = jax.eval_shape(lambda: nnx.split(Block(config, rngs=nnx.Rngs(0))))

    def forward(params: Params, batch: Any) -> Predictions:
        model = apply(graphdef, params)
        return Predictions(model.hidden_states(batch["tokens"]), model.head)

    def embed_tokens(params: Params, batch: Any) -> jax.Array:
        return apply(graphdef, params).embed(batch["tokens"])

    def attend(layer: Params, x: jax.Array) -> jax.Array:
        positions = jnp.arange(x.shape[1], dtype=jnp.int32)
        return nnx.merge(block, layer).attend(x, positions)

    def feed_forward(layer: Params, x: jax.Array) -> jax.Array:
        return nnx.merge(block, layer).feed_forward(x)

    def predict(params: Params, x: jax.Array) -> Predictions:
        model = apply(graphdef, params)
        return Predictions(model.final_norm(x), model.head)

    first, second = ("attn", "input_norm"), ("mlp", "post_attention_norm")
    whole = Stage(first + second, lambda layer, x: feed_forward(layer, attend(layer, x)))
    halves = Stage(first, attend), Stage(second, feed_forward)
    return Stages(
        forward=forward,
        before=Stage(("embed",), embed_tokens),
        block=halves if config.remat else (whole,),
        after=Stage(("final_norm", "embed" if config.tie_embeddings else "lm_head"), predict),
    )


def count_params(params: Params) -> int:
    """Counts parameters; the leaves may be arrays or shapes.

    >>> count_params({"kernel": jnp.zeros((3, 4)), "scale": jax.ShapeDtypeStruct((4,), float)})
    16
    """
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params, is_leaf=is_int8))
