"""Adam with both moments in 8 bits (Dettmers et al. 2022, arXiv:2110.02861)."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from galore_jax.quantization import (
    BLOCK_SIZE,
    Encoding,
    Quantized,
    block_scales,
    check_block_size,
    dequantize,
    dithering,
    quantize,
    quantized_zeros,
)
from galore_jax.sharding import zeros_beside


def scale_by_adam8bit(
    b1: float | jax.Array = 0.9,
    b2: float | jax.Array = 0.999,
    eps: float | jax.Array = 1e-8,
    block_size: int = BLOCK_SIZE,
    min_8bit_size: int = 4096,
    *,
    eps_root: float | jax.Array = 0.0,
    nesterov: bool = False,
) -> optax.GradientTransformation:
    r"""``optax.scale_by_adam`` with moments of one byte a value and four a block.

    Each update decodes both moments to float32, is Adam's with these, and encodes the new ones:
    the first by the signed dynamic map, the second, under its root, by the unsigned one. Two things
    differ from the paper, where small relative second moments round to zero beside a first moment
    that does not, and where changes smaller than half a code (``1 - b2`` is a thousandth, a code a
    hundredth) are lost, so that moments stick: the root, and dithered rounding
    (``galore_jax.quantization.dithering``, a function of the step count alone).

    Args:
      b1, b2, eps, eps_root, nesterov: see ``optax.scale_by_adam``.
      block_size: values that share a scale.
      min_8bit_size: leaves of fewer values keep float32 moments.

    Returns:
      A transformation with an ``optax.ScaleByAdamState``, whose ``mu`` and ``nu`` hold a
      ``Quantized`` for each leaf that is not small. Updates have the
      gradients' dtypes.

    Raises:
      TypeError, ValueError: sizes that are no ints in range.

    >>> import jax.numpy as jnp
    >>> state = scale_by_adam8bit().init({"kernel": jnp.ones((64, 512)), "bias": jnp.ones(512)})
    >>> state.mu["kernel"].codes.dtype, state.mu["kernel"].scales.shape, state.mu["bias"].dtype
    (dtype('int8'), (64, 2), dtype('float32'))
    """
    for name, value in (("block_size", block_size), ("min_8bit_size", min_8bit_size)):
        if isinstance(value, jax.Array):
            raise TypeError(
                f"{name} sets shapes: for optax.inject_hyperparams name it in static_args"
            )
    check_block_size(block_size)
    if not isinstance(min_8bit_size, int) or min_8bit_size < 0:
        raise ValueError(f"min_8bit_size must be an int of at least 0, got {min_8bit_size!r}")

    def zeros(params: Any, encoding: Encoding) -> Any:
        def of(leaf: Any) -> Any:
            axes, shape = range(jnp.ndim(leaf)), jnp.shape(leaf)
            if jnp.ndim(leaf) == 0 or jnp.size(leaf) < max(min_8bit_size, 1):
                return zeros_beside(leaf, axes, shape, jnp.float32)
            return quantized_zeros(leaf, axes, shape, encoding, block_size)

        return jax.tree.map(of, params)

    def init(params: optax.Params) -> optax.ScaleByAdamState:
        return optax.ScaleByAdamState(
            jnp.zeros([], jnp.int32), zeros(params, "dynamic"), zeros(params, "dynamic_root")
        )

    def update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.ScaleByAdamState]:
        del params
        count = optax.safe_increment(state.count)
        next_count = optax.safe_increment(count)

        def moments(gradient: jax.Array, old_mu: Any, old_nu: Any) -> tuple[Any, Any]:
            g = gradient.astype(jnp.float32)
            mu = b1 * _decoded(old_mu) + (1 - b1) * g
            return mu, b2 * _decoded(old_nu) + (1 - b2) * jnp.square(g)

        def of(gradient: jax.Array, old_mu: Any, old_nu: Any) -> tuple[Any, Any, Any]:
            scales = None, None
            if isinstance(old_mu, Quantized):
                mu, nu = moments(gradient, old_mu, old_nu)
                scales = _scales_as(old_mu, mu), _scales_as(old_nu, nu)
                # New moments are computed again after their scales are known: in float32 they
                # would be twice the leaf's size in memory.
                operands = scales, gradient, old_mu, old_nu
                scales, gradient, old_mu, old_nu = jax.lax.optimization_barrier(operands)
            g = gradient.astype(jnp.float32)
            mu, nu = moments(gradient, old_mu, old_nu)
            if nesterov:
                ahead = b1 * mu / _debias(b1, next_count) + (1 - b1) * g / _debias(b1, count)
            else:
                ahead = mu / _debias(b1, count)
            step = ahead / (jnp.sqrt(nu / _debias(b2, count) + eps_root) + eps)
            if isinstance(old_mu, Quantized):
                noise = dithering(g.shape, count)
                return (
                    step.astype(gradient.dtype),
                    _as(old_mu, mu, scales[0], 1 - noise),
                    _as(old_nu, nu, scales[1], noise),
                )
            return step.astype(gradient.dtype), mu.astype(jnp.float32), nu.astype(jnp.float32)

        leaves, treedef = jax.tree.flatten(updates)
        of_moments = treedef.flatten_up_to(state.mu), treedef.flatten_up_to(state.nu)
        new = [of(*each) for each in zip(leaves, *of_moments, strict=True)]
        steps, mu, nu = (treedef.unflatten([each[i] for each in new]) for i in range(3))
        return steps, optax.ScaleByAdamState(count, mu, nu)

    return optax.GradientTransformation(init, update)


def adamw8bit(
    learning_rate: optax.ScalarOrSchedule,
    b1: float | jax.Array = 0.9,
    b2: float | jax.Array = 0.999,
    eps: float | jax.Array = 1e-8,
    eps_root: float | jax.Array = 0.0,
    weight_decay: float | jax.Array = 1e-4,
    mask: Any | Callable[[optax.Params], Any] | None = None,
    *,
    block_size: int = BLOCK_SIZE,
    min_8bit_size: int = 4096,
    nesterov: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """``optax.adamw`` with 8-bit moments, see ``scale_by_adam8bit``.

    Args:
      learning_rate, b1, b2, eps, eps_root, weight_decay, mask, nesterov: see ``optax.adamw``.
      block_size, min_8bit_size: see ``scale_by_adam8bit``. For ``optax.inject_hyperparams``
        name both in ``static_args``.

    >>> import jax.numpy as jnp
    >>> params = {"kernel": jnp.ones((64, 512))}
    >>> tx = adamw8bit(0.1, weight_decay=0.0)
    >>> updates, _ = tx.update(params, tx.init(params), params)
    >>> round(updates["kernel"][0, 0].item(), 4)
    -0.1
    """
    return optax.chain(
        scale_by_adam8bit(
            b1, b2, eps, block_size, min_8bit_size, eps_root=eps_root, nesterov=nesterov
        ),
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )


def _debias(b: float | jax.Array, count: jax.typing.ArrayLike) -> jax.Array:
    return 1 - jnp.power(jnp.float32(b), count)


def _decoded(moment: Any) -> jax.Array:
    return dequantize(moment) if isinstance(moment, Quantized) else moment


def _scales_as(old: Quantized, value: jax.Array) -> jax.Array:
    return block_scales(value, old.encoding, block_size=old.block_size)


def _as(old: Quantized, value: jax.Array, scales: Any, noise: jax.Array) -> Quantized:
    return quantize(value, old.encoding, block_size=old.block_size, noise=noise, scales=scales)
