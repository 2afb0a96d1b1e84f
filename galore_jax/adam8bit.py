"""Adam with both moments in 8 bits (Dettmers et al. 2022, arXiv:2110.02861)."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from galore_jax.blocks import BLOCK_SIZE, check_block_size, in_blocks, out_of_blocks
from galore_jax.encodings import Encoding, block_scales, encode_blocks
from galore_jax.quantization import (
    FirstMoment,
    Quantized,
    dequantize_in_blocks,
    quantized_zeros,
    ratio_to_root,
)
from galore_jax.rounding import dithering
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

    Each update decodes both moments to float32, is Adam's with these, and encodes the new ones.
    Three things differ from the paper, in which small second moments round to zero beside a first
    moment that does not, and changes smaller than half a code are lost, so that moments stick
    (``1 - b2`` is a thousandth, a code a hundredth):

    - The second moment is encoded under its root, and the codes of a block reach down to its
      smallest root (``galore_jax.encodings``, ``adaptive_root``). None becomes zero.
    - The first moment is encoded as its ratio to that root, which an update of Adam is: however
      many decades the values of a block differ by, their ratios are alike.
    - Rounding is dithered, by ``galore_jax.rounding.dithering``, a function of the step count
      alone.

    Args:
      b1, b2, eps, eps_root, nesterov: see ``optax.scale_by_adam``.
      block_size: values that share a scale.
      min_8bit_size: leaves of fewer values keep float32 moments.

    Returns:
      A transformation with an ``optax.ScaleByAdamState``, whose ``mu`` and ``nu`` hold a
      ``Quantized`` for each leaf that is not small (a first moment is decoded by
      ``dequantize(FirstMoment(mu, nu))``). Updates have the gradients' dtypes.

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
        def leaf_zeros(leaf: Any) -> Any:
            axes, shape = range(jnp.ndim(leaf)), jnp.shape(leaf)
            if jnp.ndim(leaf) == 0 or jnp.size(leaf) < max(min_8bit_size, 1):
                return zeros_beside(leaf, axes, shape, jnp.float32)
            return quantized_zeros(leaf, axes, shape, encoding, block_size)

        return jax.tree.map(leaf_zeros, params)

    def init(params: optax.Params) -> optax.ScaleByAdamState:
        return optax.ScaleByAdamState(
            jnp.zeros([], jnp.int32), zeros(params, "ratio"), zeros(params, "adaptive_root")
        )

    def update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.ScaleByAdamState]:
        del params
        count = optax.safe_increment(state.count)
        next_count = optax.safe_increment(count)

        def moments(g: jax.Array, old_mu: Any, old_nu: Any) -> tuple[jax.Array, jax.Array]:
            return b1 * old_mu + (1 - b1) * g, b2 * old_nu + (1 - b2) * jnp.square(g)

        def direction(g: jax.Array, mu: jax.Array, nu: jax.Array) -> jax.Array:
            if nesterov:
                ahead = b1 * mu / _debias(b1, next_count) + (1 - b1) * g / _debias(b1, count)
            else:
                ahead = mu / _debias(b1, count)
            return ahead / (jnp.sqrt(nu / _debias(b2, count) + eps_root) + eps)

        def update_quantized(
            gradient: jax.Array, old_mu: Quantized, old_nu: Quantized
        ) -> tuple[jax.Array, Quantized, Quantized]:
            # In the shape of blocks XLA makes one loop of it all, and keeps no float32 moment.
            size = old_mu.block_size

            def new_moments(gradient: jax.Array, mu: Quantized, nu: Quantized) -> Any:
                g = in_blocks(gradient.astype(jnp.float32), size)
                return g, *moments(
                    g, dequantize_in_blocks(FirstMoment(mu, nu)), dequantize_in_blocks(nu)
                )

            # New moments are computed again for each scale, and after both are known.
            _, _, nu = new_moments(gradient, old_mu, old_nu)
            operands = block_scales(nu, "adaptive_root"), gradient, old_mu, old_nu
            nu_scales, gradient, old_mu, old_nu = jax.lax.optimization_barrier(operands)
            _, mu, nu = new_moments(gradient, old_mu, old_nu)
            scales = block_scales(ratio_to_root(mu, nu), "ratio"), nu_scales
            operands = scales, gradient, old_mu, old_nu
            scales, gradient, old_mu, old_nu = jax.lax.optimization_barrier(operands)
            g, mu, nu = new_moments(gradient, old_mu, old_nu)
            noise = in_blocks(dithering(gradient.shape, count), size)

            def quantized(old: Quantized, blocks: jax.Array, scales: jax.Array) -> Quantized:
                codes = encode_blocks(blocks, old.encoding, scales, noise)
                codes = out_of_blocks(codes, gradient.shape)
                return old._replace(codes=codes, scales=scales.reshape(old.scales.shape))

            step = out_of_blocks(direction(g, mu, nu), gradient.shape).astype(gradient.dtype)
            mu = quantized(old_mu, ratio_to_root(mu, nu), scales[0])
            return step, mu, quantized(old_nu, nu, scales[1])

        def update_leaf(gradient: jax.Array, old_mu: Any, old_nu: Any) -> tuple[Any, Any, Any]:
            if isinstance(old_mu, Quantized):
                return update_quantized(gradient, old_mu, old_nu)
            g = gradient.astype(jnp.float32)
            mu, nu = (x.astype(jnp.float32) for x in moments(g, old_mu, old_nu))
            return direction(g, mu, nu).astype(gradient.dtype), mu, nu

        leaves, treedef = jax.tree.flatten(updates)
        old = treedef.flatten_up_to(state.mu), treedef.flatten_up_to(state.nu)
        new = [update_leaf(*each) for each in zip(leaves, *old, strict=True)]
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
