"""Clipping by the growth of each leaf's own norm, which needs no other leaf."""

import math
import numbers
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from galore_jax.projection import in_float32, norm_over

_LEAST = 1e-6  # of the norm before: what is smaller is no norm to grow from


class NormGrowthState(NamedTuple):
    """State of ``clip_by_norm_growth``.

    Attributes:
      norm: for each leaf the norm of its last gradient after clipping, () float32; 0 for none.
    """

    norm: Any


def clip_by_norm_growth(most: float = 1.01) -> optax.GradientTransformation:
    r"""Lets the norm of each gradient grow by a factor at most, from one update to the next.

    $$G_t \leftarrow G_t \cdot \min\left(1, \frac{\mathrm{most} \cdot g_{t-1}}{\lVert G_t \rVert}
    \right), \qquad g_t = \lVert G_t \rVert \text{ after that}$$

    It is the norm-growth limiter of Fira (Chen et al. 2024, equation 8), of whole gradients. Each
    leaf is clipped for itself, so that it goes where ``optax.clip_by_global_norm`` cannot: inside
    ``galore``, where it sees low-rank gradients, and with layerwise updates. A gradient below a
    millionth of the norm before (a zero, say), or whose norm is not finite, passes, and leaves that
    norm as it was.

    Args:
      most: the factor, greater than 1.

    Returns:
      A transformation with a ``NormGrowthState``.

    Raises:
      TypeError, ValueError: a factor that is no number greater than 1.

    References:
      Chen et al., Fira, 2024, https://arxiv.org/abs/2410.01623

    >>> import jax.numpy as jnp
    >>> tx = clip_by_norm_growth(1.5)
    >>> state = tx.init({"w": jnp.zeros(2)})
    >>> for gradient in ([3.0, 4.0], [30.0, 40.0]):
    ...     updates, state = tx.update({"w": jnp.array(gradient)}, state)
    >>> updates["w"].tolist()
    [4.5, 6.0]
    """
    if not isinstance(most, jax.Array):
        if not isinstance(most, numbers.Real) or isinstance(most, bool):
            raise TypeError(f"most must be a number greater than 1, got {most!r}")
        if not 1 < float(most) < math.inf:
            raise ValueError(f"most must be a number greater than 1, got {most!r}")

    def init(params: optax.Params) -> NormGrowthState:
        return NormGrowthState(jax.tree.map(lambda _: jnp.zeros([], jnp.float32), params))

    def update(
        updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.OptState]:
        del params
        assert isinstance(state, NormGrowthState)
        norms = jax.tree.map(norm_over, updates)

        def factor(norm: jax.Array, before: jax.Array) -> jax.Array:
            is_spike = (before > 0) & jnp.isfinite(norm) & (norm > most * before)
            return jnp.where(is_spike, most * before / jnp.where(is_spike, norm, 1), 1)

        factors = jax.tree.map(factor, norms, state.norm)
        clipped = jax.tree.map(lambda g, f: (in_float32(g) * f).astype(g.dtype), updates, factors)

        def next_norm(norm: jax.Array, factor: jax.Array, before: jax.Array) -> jax.Array:
            counts = (norm > _LEAST * before) & jnp.isfinite(norm)
            return jnp.where(counts, norm * factor, before).astype(before.dtype)

        after = jax.tree.map(next_norm, norms, factors, state.norm)
        return clipped, NormGrowthState(after)

    return optax.GradientTransformation(init, update)
