"""Causal attention with rotary positions, as functions of arrays."""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from galore_jax.models.config import AttentionImplementation, LlamaConfig, RopeScaling


def rotary(
    x: jax.Array, positions: jax.Array, theta: float, scaling: RopeScaling | None = None
) -> jax.Array:
    r"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864), in float32.

    Turns the pair $(x_i, x_{i + H/2})$ by the angle $p\,\theta^{-2i/H}$: the pairs
    are halves apart, as in Hugging Face checkpoints, not neighbours.

    Args:
      x: ``(B, S, heads, H)``, H even.
      positions: ``(S,)`` or ``(B, S)``, int32.
      theta: the base of the frequencies.
      scaling: of the low frequencies, for contexts longer than a model was first trained on.

    Returns:
      ``(B, S, heads, H)`` in the dtype of ``x``.
    """
    half = x.shape[-1] // 2
    frequencies = rotary_frequencies(half, theta, scaling)
    angles = positions[..., None, None].astype(jnp.float32) * frequencies
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    first, second = x[..., :half].astype(jnp.float32), x[..., half:].astype(jnp.float32)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)


def rotary_frequencies(half: int, theta: float, scaling: RopeScaling | None = None) -> jax.Array:
    r"""The angles by which one position turns the pairs of a head.

    The frequencies are $f_i = \theta^{-2i/H}$. With ``scaling``, those that turn fewer than
    ``low_freq_factor`` times within ``original_max_positions`` are divided by ``factor``, those
    that turn more than ``high_freq_factor`` times stay, and the ones between are interpolated
    (Llama 3.1, arXiv:2407.21783).

    Args:
      half: H / 2, the number of pairs.
      theta: the base of the frequencies.
      scaling: None for none.

    Returns:
      ``(H / 2,)`` float32, in radians.

    >>> [f"{frequency:.2f}" for frequency in rotary_frequencies(2, 1e4)]
    ['1.00', '0.01']
    """
    frequencies = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    if scaling is None:
        return frequencies
    turns = scaling.original_max_positions * frequencies / (2 * math.pi)
    width = scaling.high_freq_factor - scaling.low_freq_factor
    kept = jnp.clip((turns - scaling.low_freq_factor) / width, 0.0, 1.0)
    return frequencies * (kept + (1.0 - kept) / scaling.factor)


class Cache(NamedTuple):
    """Room for the keys and values of the first T positions, of all layers.

    Attributes:
      key: ``(L, B, T, K, H)``, turned by their positions.
      value: ``(L, B, T, K, H)``.
    """

    key: jax.Array
    value: jax.Array

    def put(self, layer: jax.Array, start: jax.Array, key: jax.Array, value: jax.Array) -> "Cache":
        """Writes a layer's keys and values ``(B, S, K, H)`` of the positions from ``start`` on."""
        place = (layer, 0, start, 0, 0)
        return Cache(
            jax.lax.dynamic_update_slice(self.key, key[None], place),
            jax.lax.dynamic_update_slice(self.value, value[None], place),
        )

    def of(self, layer: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns a layer's keys and values, each ``(B, T, K, H)``."""
        return self.key[layer], self.value[layer]


def empty_cache(config: LlamaConfig, batch: int, length: int) -> Cache:
    """Makes a cache for ``batch`` texts of ``length`` positions."""
    shape = (config.num_layers, batch, length, config.kv_heads, config.head_size)
    return Cache(jnp.zeros(shape, config.dtype), jnp.zeros(shape, config.dtype))


def causal_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    implementation: AttentionImplementation | None = None,
    positions: jax.Array | None = None,
) -> jax.Array:
    """Causal scaled dot-product attention, its softmax in float32.

    Args:
      query: ``(B, S, N, H)``.
      key: ``(B, T, K, H)``, of the positions 0 to T - 1; N is a multiple of K, and query head n
        reads head ``n // (N / K)``.
      value: ``(B, T, K, H)``.
      implementation: for ``jax.nn.dot_product_attention``. None does the same in the
        plain batched matrix products that XLA runs best on a CPU if the inputs are float32,
        and else leaves the choice to JAX.
      positions: ``(S,)``, those of the queries; None for all T.

    Returns:
      ``(B, S, N, H)``, in the dtype of ``query``.
    """
    if positions is None:
        allowed, positions = {"is_causal": True}, jnp.arange(query.shape[1])
    else:
        allowed = {"mask": _may_read(positions, key.shape[1])}
    from_jax = functools.partial(
        jax.nn.dot_product_attention, implementation=implementation, **allowed
    )
    plain = functools.partial(_plain_attention, positions=positions)
    if query.dtype == jnp.float16 and implementation != "cudnn":
        # JAX asks for products of float16 with float32 sums, which a CPU does not have.
        return jax.lax.platform_dependent(query, key, value, cpu=plain, default=from_jax)
    if implementation is not None or query.dtype != jnp.float32:
        return from_jax(query, key, value)
    return plain(query, key, value)


def _may_read(positions: jax.Array, keys: int) -> jax.Array:
    """Says which keys a query sees, ``(1, 1, S, T)`` bool: itself and those before it."""
    return (jnp.arange(keys) <= positions[:, None])[None, None]


def _plain_attention(
    query: jax.Array, key: jax.Array, value: jax.Array, positions: jax.Array
) -> jax.Array:
    batch, length, heads, size = query.shape
    keys, groups, dtype = *key.shape[1:3], query.dtype
    query, key, value = (x.astype(jnp.float32) for x in (query, key, value))
    # (B, K, N/K * S, H): the query heads of a group are more rows against the same keys.
    query = query.swapaxes(1, 2).reshape(batch, groups, -1, size) * size**-0.5
    key, value = key.swapaxes(1, 2), value.swapaxes(1, 2)
    scores = (query @ key.swapaxes(2, 3)).reshape(batch, heads, length, keys)
    scores = jnp.where(_may_read(positions, keys), scores, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1)
    read = weights.reshape(batch, groups, -1, keys) @ value
    return read.reshape(batch, heads, length, size).swapaxes(1, 2).astype(dtype)
