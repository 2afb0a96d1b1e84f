"""BERT and RoBERTa with a head for sentences, their blocks stacked along a leading layer axis."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from galore_jax.kernels import linear
from galore_jax.models.embedding import embed
from galore_jax.models.encoder_config import EncoderConfig
from galore_jax.models.layers import value_of
from galore_jax.models.stages import DROPOUT_KEY, Stage, Stages

Params = dict[str, Any]  # Nested dicts of arrays.
_HIDDEN = -1e30  # an attention score that leaves no probability, and no NaN where all are hidden


class Table(nnx.Module):
    """An embedding of ``rows`` rows; ids outside it give NaN rather than a wrong row."""

    def __init__(self, config: EncoderConfig, rows: int, *, rngs: nnx.Rngs):
        self.embedding = _normal(config, rngs, (rows, config.hidden_size))
        self.dtype = config.dtype

    def __call__(self, ids: jax.Array) -> jax.Array:
        """Rows (..., D) in the compute dtype for ids (...)."""
        return embed(value_of(self.embedding), ids, self.dtype)


class Dense(nnx.Module):
    """A kernel of shape ``(in, out)`` and a bias."""

    def __init__(self, config: EncoderConfig, in_size: int, out_size: int, *, rngs: nnx.Rngs):
        self.kernel = _normal(config, rngs, (in_size, out_size))
        self.bias = nnx.Param(jnp.zeros((out_size,), config.param_dtype))

    def __call__(self, x: jax.Array, out_dtype: Any = None) -> jax.Array:
        """(..., in) to (..., out)."""
        y = linear(x, value_of(self.kernel), out_dtype)
        return y + value_of(self.bias).astype(y.dtype)


class LayerNorm(nnx.Module):
    r"""$s\,(x - \bar x) / \sqrt{\operatorname{var}(x) + \epsilon} + b$, computed in float32."""

    def __init__(self, config: EncoderConfig):
        self.scale = nnx.Param(jnp.ones((config.hidden_size,), config.param_dtype))
        self.bias = nnx.Param(jnp.zeros((config.hidden_size,), config.param_dtype))
        self.eps = config.layer_norm_eps

    def __call__(self, x: jax.Array) -> jax.Array:
        """(..., D) to (..., D) in the dtype of ``x``."""
        wide = x.astype(jnp.float32)
        wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
        inverse = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.eps)
        scale, bias = (value_of(v).astype(jnp.float32) for v in (self.scale, self.bias))
        return (wide * inverse * scale + bias).astype(x.dtype)


class Embeddings(nnx.Module):
    """The sum of a token's, a position's and a token type's embedding, normalised."""

    def __init__(self, config: EncoderConfig, *, rngs: nnx.Rngs):
        self.word = Table(config, config.vocab_size, rngs=rngs)
        self.position = Table(config, config.position_rows, rngs=rngs)
        self.token_type = Table(config, config.type_vocab_size, rngs=rngs)
        self.norm = LayerNorm(config)
        self.config = config

    def __call__(self, tokens: jax.Array, token_types: jax.Array, key: Any) -> jax.Array:
        """Tokens and their types, (B, S) int32, to (B, S, D)."""
        if self.config.kind == "roberta":  # positions count what is no padding, and padding has one
            is_token = (tokens != self.config.pad_id).astype(jnp.int32)
            positions = jnp.cumsum(is_token, axis=1) * is_token + self.config.pad_id
        else:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        # As torch's tables with padding_idx have it, the padding's own rows take no gradient.
        is_padding = (tokens == self.config.pad_id)[..., None]
        word, position = self.word(tokens), self.position(positions)
        word = jnp.where(is_padding, jax.lax.stop_gradient(word), word)
        if self.config.kind == "roberta":
            position = jnp.where(is_padding, jax.lax.stop_gradient(position), position)
        x = word + self.token_type(token_types) + position
        return dropout(self.norm(x), self.config.hidden_dropout, key)


class SelfAttention(nnx.Module):
    """Attention of every token to every other that is no padding."""

    def __init__(self, config: EncoderConfig, *, rngs: nnx.Rngs):
        size = config.hidden_size
        self.q_proj = Dense(config, size, size, rngs=rngs)
        self.k_proj = Dense(config, size, size, rngs=rngs)
        self.v_proj = Dense(config, size, size, rngs=rngs)
        self.o_proj = Dense(config, size, size, rngs=rngs)
        self.config = config

    def __call__(self, x: jax.Array, mask: jax.Array, key: Any) -> jax.Array:
        """(B, S, D) to (B, S, D); ``mask`` is (B, S), positive where there is a token."""
        config = self.config
        shape = (*x.shape[:2], config.num_heads, config.head_size)
        query, k, v = (f(x).reshape(shape) for f in (self.q_proj, self.k_proj, self.v_proj))
        scores = jnp.einsum("bqnh,bknh->bnqk", query, k, preferred_element_type=jnp.float32)
        scores = jnp.where(mask[:, None, None, :] > 0, scores * config.head_size**-0.5, _HIDDEN)
        weights = dropout(jax.nn.softmax(scores), config.attention_dropout, key)
        heads = jnp.einsum("bnqk,bknh->bqnh", weights.astype(x.dtype), v)
        return self.o_proj(heads.reshape(x.shape))


class FeedForward(nnx.Module):
    """``down(gelu(up(x)))``, with the exact GELU."""

    def __init__(self, config: EncoderConfig, *, rngs: nnx.Rngs):
        self.up_proj = Dense(config, config.hidden_size, config.intermediate_size, rngs=rngs)
        self.down_proj = Dense(config, config.intermediate_size, config.hidden_size, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """(..., D) to (..., D)."""
        return self.down_proj(jax.nn.gelu(self.up_proj(x), approximate=False))


class Block(nnx.Module):
    """One post-norm transformer block."""

    def __init__(self, config: EncoderConfig, *, rngs: nnx.Rngs):
        # Not attn_norm and mlp_norm: the patterns "attn" and "mlp" are for its parts alone.
        self.attn = SelfAttention(config, rngs=rngs)
        self.attention_norm = LayerNorm(config)
        self.mlp = FeedForward(config, rngs=rngs)
        self.output_norm = LayerNorm(config)
        self.config = config

    def __call__(self, x: jax.Array, mask: jax.Array, key: Any) -> jax.Array:
        """(B, S, D) to (B, S, D); ``mask`` as for ``SelfAttention``."""
        keys = _split(key, 3)
        rate = self.config.hidden_dropout
        x = self.attention_norm(x + dropout(self.attn(x, mask, keys[0]), rate, keys[1]))
        return self.output_norm(x + dropout(self.mlp(x), rate, keys[2]))


class Head(nnx.Module):
    """``out(tanh(dense(first token)))``: BERT's pooler and classifier, RoBERTa's classifier."""

    def __init__(self, config: EncoderConfig, *, rngs: nnx.Rngs):
        self.dense = Dense(config, config.hidden_size, config.hidden_size, rngs=rngs)
        self.out = Dense(config, config.hidden_size, config.num_labels, rngs=rngs)
        self.config = config

    def __call__(self, hidden: jax.Array, key: Any) -> jax.Array:
        """(B, S, D) to logits (B, num_labels), float32."""
        first, second = _split(key, 2)
        rate = self.config.head_dropout
        x = hidden[:, 0]
        if self.config.kind == "roberta":
            x = dropout(x, rate, first)
        x = dropout(jnp.tanh(self.dense(x)), rate, second)
        return self.out(x, jnp.float32)


class Encoder(nnx.Module):
    """A BERT (Devlin et al. 2018, arXiv:1810.04805) or RoBERTa (Liu et al. 2019, 1907.11692).

    Parameters, by path: ``embed/{word,position,token_type}/embedding`` and
    ``embed/norm/{scale,bias}``; under ``blocks``, each with a leading axis of L layers,
    ``attn/{q,k,v,o}_proj/{kernel,bias}``, ``attention_norm/{scale,bias}``,
    ``mlp/{up,down}_proj/{kernel,bias}``, ``output_norm/{scale,bias}``; and
    ``head/{dense,out}/{kernel,bias}``.

    >>> config = EncoderConfig("bert", 16, 32, 2, 2, vocab_size=50, position_rows=64)
    >>> tokens = jnp.ones((3, 8), jnp.int32)
    >>> batch = {"tokens": tokens, "mask": tokens, "token_types": 0 * tokens}
    >>> Encoder(config, rngs=nnx.Rngs(0)).logits(batch).shape
    (3, 2)
    """

    def __init__(self, config: EncoderConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.embed = Embeddings(config, rngs=rngs)
        keys = jax.random.split(rngs.params(), config.num_layers)
        graphdef, stack = jax.lax.map(
            lambda key: nnx.split(Block(config, rngs=nnx.Rngs(key))), keys
        )
        self.blocks = nnx.merge(graphdef, stack)
        self.head = Head(config, rngs=rngs)

    def hidden_states(self, batch: Any) -> jax.Array:
        """Computes the last block's output.

        Args:
          batch: ``tokens``, ``mask`` and ``token_types``, each (B, S) int32, the mask 1 where there
            is a token and 0 at padding; and, to drop, a PRNG key as ``dropout_key``.

        Returns:
          ``(B, S, D)`` in the compute dtype.
        """
        keys = _split(batch.get(DROPOUT_KEY), 3)
        graphdef, stack = nnx.split(self.blocks)
        layer_keys = None if keys[1] is None else jax.random.split(keys[1], self.config.num_layers)

        def apply_block(x, layer):
            params, key = layer
            return nnx.merge(graphdef, params)(x, batch["mask"], key), None

        if self.config.remat:
            apply_block = jax.checkpoint(apply_block, prevent_cse=False)
        x = self.embed(batch["tokens"], batch["token_types"], keys[0])
        return jax.lax.scan(apply_block, x, (stack, layer_keys))[0]

    def logits(self, batch: Any) -> jax.Array:
        """Computes the head's outputs (B, num_labels), float32, for a batch as above."""
        return self.head(self.hidden_states(batch), _split(batch.get(DROPOUT_KEY), 3)[2])


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Sets a part of the entries to zero and scales the others up; without a key, does nothing.

    >>> dropout(jnp.ones(4), 0.5, None).tolist()
    [1.0, 1.0, 1.0, 1.0]
    """
    if key is None or rate == 0:
        return x
    # Sixteen random bits an entry, half of what jax.random.bernoulli takes.
    kept = jax.random.bits(key, x.shape, jnp.uint16) >= round(rate * 2**16)
    return jnp.where(kept, x / (1 - rate), 0).astype(x.dtype)


def init_params(config: EncoderConfig, key: jax.Array) -> tuple[nnx.GraphDef, Params]:
    """Draws the parameters of an ``Encoder``; pure, as ``galore_jax.models.llama.init_params``."""
    graphdef, state = nnx.split(Encoder(config, rngs=nnx.Rngs(key)))
    return graphdef, nnx.to_pure_dict(state)


def stages(config: EncoderConfig) -> Stages:
    """Gives the model as functions of its params; ``forward`` gives logits (B, num_labels).

    Its blocks cannot be taken one at a time: they read the mask of the batch.

    >>> config = EncoderConfig("bert", 16, 32, 2, 2, vocab_size=50, position_rows=64)
    >>> _, params = init_params(config, jax.random.key(0))
    >>> tokens = jnp.ones((3, 8), jnp.int32)
    >>> batch = {"tokens": tokens, "mask": tokens, "token_types": 0 * tokens}
    >>> stages(config).forward(params, batch).shape
    (3, 2)
    """
    graphdef, _ = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))

    def forward(params: Params, batch: Any) -> jax.Array:
        return nnx.merge(graphdef, params).logits(batch)

    def embed_tokens(params: Params, batch: Any) -> jax.Array:
        model = nnx.merge(graphdef, params)
        return model.embed(batch["tokens"], batch["token_types"], None)

    def predict(params: Params, x: jax.Array) -> jax.Array:
        return nnx.merge(graphdef, params).head(x, None)

    return Stages(forward, Stage(("embed",), embed_tokens), (), Stage(("head",), predict))


def _normal(config: EncoderConfig, rngs: nnx.Rngs, shape: tuple[int, ...]) -> nnx.Param:
    sample = config.init_std * jax.random.normal(rngs.params(), shape, jnp.float32)
    return nnx.Param(sample.astype(config.param_dtype))


def _split(key: jax.Array | None, count: int) -> Any:
    return (None,) * count if key is None else jax.random.split(key, count)
