"""A bare ``galore(rank=...)``, and the ``chain`` that gives it what follows."""

import warnings
from collections.abc import Callable
from typing import Any

import optax

Wrap = Callable[[optax.GradientTransformation], optax.GradientTransformationExtraArgs]


class BareGaLore(optax.GradientTransformationExtraArgs):
    """A ``galore`` still without its optimizer.

    Attributes:
      wrap: a function that gives it one.
      refresh: see ``galore_jax.galore.GaLore``.
    """

    wrap: Wrap
    refresh: Callable[..., Any]


def bare_galore(wrap: Wrap) -> Any:
    """Makes a ``galore`` without an optimizer, which warns once in Optax's own ``chain``."""
    alone: Any = wrap(optax.identity())
    warned = False

    def init(params: optax.Params) -> optax.OptState:
        nonlocal warned
        if not warned:
            warned = True
            warnings.warn(
                "galore(rank=...) in optax.chain projects the gradient but cannot shrink the "
                "optimizer's state; to save the memory write galore(optax.adamw(...), rank=...) "
                "or galore_jax.chain(galore(rank=...), optax.adamw(...))",
                stacklevel=3,
            )
        return alone.init(params)

    bare = BareGaLore(init, alone.update)
    bare.wrap, bare.refresh = wrap, alone.refresh
    return bare


def chain(*transforms: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Chains like ``optax.chain``, save that a bare ``galore(rank=...)`` wraps all that follows it.

    Args:
      *transforms: gradient transformations, at most one of them a bare ``galore``.

    Returns:
      ``optax.chain`` of those before it and of ``galore(optax.chain(those after it), ...)``.

    Raises:
      ValueError: a bare ``galore`` with nothing after it, or two of them.

    >>> import jax.numpy as jnp, optax
    >>> from galore_jax import chain, galore
    >>> tx = chain(optax.clip_by_global_norm(1.0), galore(rank=8), optax.adamw(1e-3))
    >>> _, state = tx.init({"kernel": jnp.ones((64, 256))})
    >>> state.inner_state[0][0].mu["kernel"].shape
    (8, 256)
    """
    bare = [(i, tx) for i, tx in enumerate(transforms) if isinstance(tx, BareGaLore)]
    if not bare:
        return optax.chain(*transforms)
    at, galore_without_optimizer = bare[0]
    if len(bare) > 1:
        raise ValueError("chain takes one bare galore(rank=...): it wraps all that follows it")
    if at == len(transforms) - 1:
        raise ValueError(
            "a bare galore(rank=...) at the end of a chain wraps nothing: put the optimizer after "
            "it, as in chain(galore(rank=128), optax.adamw(1e-3))"
        )
    wrapped = galore_without_optimizer.wrap(optax.chain(*transforms[at + 1 :]))
    return optax.chain(*transforms[:at], wrapped)
