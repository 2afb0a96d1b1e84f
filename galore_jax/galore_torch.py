"""Adam and weight decay in the order of ``galore_torch``, the authors' implementation."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax


def scale_by_galore_torch_adam(
    b1: float | jax.Array = 0.9,
    b2: float | jax.Array = 0.999,
    eps: float | jax.Array = 1e-6,
) -> optax.GradientTransformation:
    r"""Adam with ``eps`` added before the bias correction (``galore_torch/adamw.py``).

    $$u_t = \frac{\sqrt{1 - b_2^t}}{1 - b_1^t} \cdot \frac{m_t}{\sqrt{v_t} + \mathrm{eps}}$$

    where ``optax.scale_by_adam`` adds it after. Moments have the shape and dtype of the params.

    >>> import jax.numpy as jnp
    >>> tx = scale_by_galore_torch_adam(eps=1.0)
    >>> updates, _ = tx.update(jnp.ones(()), tx.init(jnp.ones(())))
    >>> round(float(updates), 4)  # sqrt(0.001) / (sqrt(0.001) + 1)
    0.0307
    """

    def init(params: optax.Params) -> optax.ScaleByAdamState:
        zeros = optax.tree.zeros_like
        return optax.ScaleByAdamState(jnp.zeros([], jnp.int32), zeros(params), zeros(params))

    def update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.ScaleByAdamState]:
        del params
        count = optax.safe_increment(state.count)
        moment = lambda b, m, g: (b * m + (1 - b) * g).astype(m.dtype)  # noqa: E731
        mu = jax.tree.map(lambda m, g: moment(b1, m, g), state.mu, updates)
        nu = jax.tree.map(lambda v, g: moment(b2, v, g * g), state.nu, updates)
        # 1 - b**t without its cancellation: in float32 1 - 0.999 is off by 5e-5.
        correction = lambda b: -jnp.expm1(count * _log(b))  # noqa: E731
        factor = jnp.sqrt(correction(b2)) / correction(b1)
        scaled = lambda m, v: (factor * m / (jnp.sqrt(v) + eps)).astype(m.dtype)  # noqa: E731
        return jax.tree.map(scaled, mu, nu), optax.ScaleByAdamState(count, mu, nu)

    return optax.GradientTransformation(init, update)


def _log(b: float | jax.Array) -> float | jax.Array:
    if isinstance(b, jax.Array):
        return jnp.log(b)
    return math.log(b) if b else -math.inf


def decay_weights(
    learning_rate: optax.ScalarOrSchedule,
    weight_decay: jax.typing.ArrayLike,
    mask: Any | Callable[[optax.Params], Any] | None = None,
    *,
    after_update: bool = False,
) -> optax.GradientTransformation:
    """Adds ``-lr * weight_decay * W`` to finished updates, as a last link of a chain.

    Args:
      learning_rate: a float or an Optax schedule.
      weight_decay: decoupled, times the learning rate.
      mask: which leaves, as ``optax.masked`` takes it; None is all.
      after_update: whether W is the weight as it will be after the update, as in ``galore_torch``,
        and not as it was before it.

    >>> import jax.numpy as jnp
    >>> tx = decay_weights(0.5, 0.1, after_update=True)
    >>> updates, _ = tx.update(jnp.float32(-1.0), tx.init(jnp.float32(3.0)), jnp.float32(3.0))
    >>> round(float(updates), 4)
    -1.1
    """

    def init(params: optax.Params) -> optax.ScaleByScheduleState:
        del params
        return optax.ScaleByScheduleState(jnp.zeros([], jnp.int32))

    def update(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
    ) -> tuple[optax.Updates, optax.ScaleByScheduleState]:
        if params is None:
            raise ValueError("weight decay needs the params: tx.update(grads, state, params)")
        lr = learning_rate(state.count) if callable(learning_rate) else learning_rate

        def decayed(update: jax.Array, weight: jax.Array) -> jax.Array:
            weight = weight + update if after_update else weight
            return (update - lr * weight_decay * weight).astype(update.dtype)

        new_state = optax.ScaleByScheduleState(optax.safe_increment(state.count))
        return jax.tree.map(decayed, updates, params), new_state

    tx = optax.GradientTransformation(init, update)
    return tx if mask is None else optax.masked(tx, mask)
