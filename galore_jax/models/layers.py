"""The layers of a LLaMA that know nothing of positions."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from galore_jax.int8_kernels import Per, encode
from galore_jax.kernels import Frozen, linear
from galore_jax.models.config import LlamaConfig
from galore_jax.models.embedding import embed


def _normal(
    config: LlamaConfig, rngs: nnx.Rngs, shape: tuple[int, ...], per: Per = "column"
) -> nnx.Param:
    # Drawn in float32: JAX's bfloat16 normals have few distinct values and no tails.
    sample = config.init_std * jax.random.normal(rngs.params(), shape, jnp.float32)
    if config.param_dtype == jnp.int8:
        return nnx.Param(encode(sample, per, dtype=config.float_dtype))
    return nnx.Param(sample.astype(config.param_dtype))


def value_of(variable: nnx.Variable) -> Any:
    """Returns the array of a variable, or what stands in for it."""
    # Flax 0.12 deprecates `.value`; 0.11 has nothing else that also gives a pytree.
    value = variable.get_value() if hasattr(nnx.Variable, "get_value") else variable.value
    return jax.lax.stop_gradient(value.array) if isinstance(value, Frozen) else value


class Embedding(nnx.Module):
    """A table of ``vocab_size`` rows; ids outside it give NaN rather than a wrong row."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        self.embedding = _normal(config, rngs, (config.vocab_size, config.hidden_size), "row")
        self.dtype = config.dtype

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Rows (..., D) in the compute dtype for ids (...)."""
        return embed(value_of(self.embedding), tokens, self.dtype)


class Linear(nnx.Module):
    """A kernel of shape ``(in, out)`` and no bias."""

    def __init__(self, config: LlamaConfig, in_size: int, out_size: int, *, rngs: nnx.Rngs):
        self.kernel = _normal(config, rngs, (in_size, out_size))

    def __call__(self, x: jax.Array) -> jax.Array:
        """(..., in) to (..., out)."""
        return linear(x, value_of(self.kernel))


class RMSNorm(nnx.Module):
    r"""$s\, x / \sqrt{\operatorname{mean}(x^2) + \epsilon}$, computed in float32.

    Root-mean-square norm (Zhang and Sennrich 2019, arXiv:1910.07467).
    """

    def __init__(self, config: LlamaConfig):
        self.scale = nnx.Param(jnp.ones((config.hidden_size,), config.float_dtype))
        self.eps = config.rms_norm_eps

    def __call__(self, x: jax.Array) -> jax.Array:
        """(..., D) to (..., D) in the dtype of ``x``."""
        wide = x.astype(jnp.float32)
        inverse = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.eps)
        return (wide * inverse * value_of(self.scale).astype(jnp.float32)).astype(x.dtype)


class MLP(nnx.Module):
    """SwiGLU: ``down(silu(gate(x)) * up(x))`` (Shazeer 2020, arXiv:2002.05202)."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        width, inner = config.hidden_size, config.intermediate_size
        self.gate_proj = Linear(config, width, inner, rngs=rngs)
        self.up_proj = Linear(config, width, inner, rngs=rngs)
        self.down_proj = Linear(config, inner, width, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """(..., D) to (..., D)."""
        return self.down_proj(jax.nn.silu(self.gate_proj(x)) * self.up_proj(x))
