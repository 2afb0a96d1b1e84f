"""Optimizers with GaLore built in."""

from collections.abc import Callable, Sequence
from typing import Any

import optax

from galore_jax.bases import Basis
from galore_jax.projection import ProjType
from galore_jax.transform import galore


def galore_adamw(
    learning_rate: optax.ScalarOrSchedule,
    rank: int = 128,
    *,
    update_proj_gap: int = 200,
    scale: float = 0.25,
    proj_type: ProjType = "std",
    target_modules: str | Sequence[str] | None = None,
    basis: Basis = "svd",
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    mask: Any | Callable[[optax.Params], Any] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """``galore(optax.adamw(...))``: Adam on the projected gradients, decay on the whole weights.

    Against ``galore_torch.GaLoreAdamW``: ``eps`` is 1e-8 and added after the bias correction as in
    Optax (there 1e-6, and before); the weight is decayed as it was before the update (there after).

    Args:
      learning_rate: a float or an Optax schedule.
      rank, update_proj_gap, scale, proj_type, target_modules, basis: see :func:`galore`.
      b1, b2, eps, weight_decay, mask: see ``optax.adamw``.

    Returns:
      A gradient transformation with a :class:`galore_jax.GaLoreState`.

    Raises:
      TypeError, ValueError: see :func:`galore`.

    >>> import jax.numpy as jnp
    >>> from galore_jax import galore_adamw
    >>> state = galore_adamw(1e-2, rank=8).init({"kernel": jnp.ones((64, 256))})
    >>> state.projector["kernel"].shape
    (64, 8)
    """
    adamw = optax.adamw(learning_rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay, mask=mask)
    return galore(
        adamw,
        rank=rank,
        update_proj_gap=update_proj_gap,
        scale=scale,
        proj_type=proj_type,
        target_modules=target_modules,
        basis=basis,
    )
