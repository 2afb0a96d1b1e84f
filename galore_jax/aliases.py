"""Aliases: optimizers with GaLore built in."""

import functools
import inspect
import numbers
from collections.abc import Callable
from typing import Any, Literal, TypeVar, Unpack

import jax
import optax

from galore_jax.adam8bit import adamw8bit
from galore_jax.blocks import BLOCK_SIZE
from galore_jax.errors import check_int
from galore_jax.galore import galore, wrap_optimizer
from galore_jax.galore_torch import decay_weights, scale_by_galore_torch_adam
from galore_jax.muon import low_rank_muon
from galore_jax.options import CheckedOptions, GaLoreOptions
from galore_jax.weights import Rank

Alias = TypeVar("Alias", bound=Callable[..., Any])


def _with_options_spelled_out(alias: Alias, **defaults: Any) -> Alias:
    """Lists ``**galore_options`` in the signature, as ``optax.inject_hyperparams`` reads it."""
    own, options = inspect.signature(alias), inspect.signature(galore).parameters
    kept = [p for p in own.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    listed = [
        options[name].replace(default=defaults.get(name, options[name].default))
        for name in GaLoreOptions.__annotations__
    ]
    alias.__signature__ = own.replace(parameters=[*kept, *listed])  # pyright: ignore
    return alias


@_with_options_spelled_out
def galore_adamw(
    learning_rate: optax.ScalarOrSchedule,
    rank: Rank = 128,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    mask: Any | Callable[[optax.Params], Any] | None = None,
    galore_torch_order: bool = False,
    **galore_options: Unpack[GaLoreOptions],
) -> optax.GradientTransformationExtraArgs:
    r"""Runs Adam on the projected gradients, and decay on the whole weights.

    This is ``galore(optax.adamw(...))``.

    ``galore_torch.GaLoreAdamW`` has other defaults, and another order:

    | | here, as in Optax | galore_torch |
    |---|---|---|
    | ``eps`` | 1e-8 | 1e-6 |
    | ``eps`` is added | after the bias correction | before it |
    | the weight that is decayed | as before the update | as after it |

    Args:
      learning_rate: a float or an Optax schedule.
      rank: see ``galore_jax.galore``.
      b1, b2, eps, weight_decay, mask: see ``optax.adamw``.
      galore_torch_order: whether ``eps`` and the decay go where ``galore_torch`` has them.
      galore_options: see ``galore_jax.options.GaLoreOptions``.

    Returns:
      A gradient transformation with a ``galore_jax.GaLoreState``; in ``galore_torch_order``
      with a ``weight_decay`` the first link of a chain.

    Raises:
      TypeError, ValueError: see ``galore``.

    >>> import jax.numpy as jnp
    >>> from galore_jax import galore_adamw
    >>> state = galore_adamw(1e-2, rank=8).init({"kernel": jnp.ones((64, 256))})
    >>> state.projector["kernel"].shape
    (64, 8)
    """
    if galore_torch_order:
        inner = optax.chain(
            scale_by_galore_torch_adam(b1, b2, eps), optax.scale_by_learning_rate(learning_rate)
        )
    else:
        inner = optax.adamw(
            learning_rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay, mask=mask
        )
    tx = galore(
        inner,
        rank=rank,
        **galore_options,
    )
    if galore_torch_order and (isinstance(weight_decay, jax.Array) or weight_decay):
        return optax.chain(tx, decay_weights(learning_rate, weight_decay, mask, after_update=True))
    return tx


@_with_options_spelled_out
def galore_adamw8bit(
    learning_rate: optax.ScalarOrSchedule,
    rank: Rank = 128,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    mask: Any | Callable[[optax.Params], Any] | None = None,
    block_size: int = BLOCK_SIZE,
    min_8bit_size: int = 4096,
    **galore_options: Unpack[GaLoreOptions],
) -> optax.GradientTransformationExtraArgs:
    """Runs 8-bit Adam on the projected gradients: the paper's 7B on 24 GB.

    This is ``galore(adamw8bit(...))``.

    Args:
      learning_rate: a float or an Optax schedule.
      rank: see ``galore_jax.galore``.
      b1, b2, eps, weight_decay, mask, block_size, min_8bit_size: see
        ``galore_jax.adam8bit.adamw8bit``.
      galore_options: see ``galore_jax.options.GaLoreOptions``.

    Returns:
      A gradient transformation with a ``galore_jax.GaLoreState``.

    Raises:
      TypeError, ValueError: see ``galore`` and ``galore_jax.adam8bit.scale_by_adam8bit``.

    >>> import jax.numpy as jnp
    >>> from galore_jax import galore_adamw8bit
    >>> tx = galore_adamw8bit(1e-2, rank=16, projector_bits=4)
    >>> state = tx.init({"kernel": jnp.ones((64, 256))})
    >>> state.inner_state[0].mu["kernel"].codes.shape, state.projector["kernel"].codes.dtype
    ((16, 256), dtype(int4))
    """
    inner = adamw8bit(
        learning_rate,
        b1=b1,
        b2=b2,
        eps=eps,
        weight_decay=weight_decay,
        mask=mask,
        block_size=block_size,
        min_8bit_size=min_8bit_size,
    )
    return galore(
        inner,
        rank=rank,
        **galore_options,
    )


@_with_options_spelled_out
def galore_adafactor(
    learning_rate: optax.ScalarOrSchedule,
    rank: Rank = 128,
    *,
    b1: float | None = None,
    decay_rate: float = 0.8,
    eps: float = 1e-30,
    clipping_threshold: float | None = 1.0,
    min_dim_size_to_factor: int = 1,
    weight_decay: float = 0.0,
    mask: Any | Callable[[optax.Params], Any] | None = None,
    galore_torch_order: bool = False,
    **galore_options: Unpack[GaLoreOptions],
) -> optax.GradientTransformationExtraArgs:
    """Runs Adafactor on the projected gradients, with an absolute learning rate.

    As the reference trains with its ``GaLoreAdafactor``: ``scale_parameter=False``,
    ``relative_step=False``, ``warmup_init=False``. Against ``optax.adafactor``: every matrix is
    factored, whatever its size (there from 128 on); the learning rate is not multiplied by the
    weights' scale; ``weight_decay`` is times the learning rate.

    Args:
      learning_rate: a float or an Optax schedule.
      rank: see ``galore_jax.galore``.
      b1: of a momentum on the updates (the reference's ``beta1``); None has none.
      decay_rate: the second moment's at update t is ``1 - t**-decay_rate`` (the reference
        writes -0.8).
      eps: added to the squared gradient (the reference's ``eps[0]``).
      clipping_threshold: of each leaf's root mean square (the reference's ``clip_threshold``).
      min_dim_size_to_factor: a leaf whose second largest axis is smaller keeps a full second
        moment.
      weight_decay, mask: decoupled, see ``optax.adamw``.
      galore_torch_order: whether the decay is a link of its own, on the weight as before the update
        as in ``galore_torch``; False gives the same up to rounding.
      galore_options: see ``galore_jax.options.GaLoreOptions``.

    Returns:
      A gradient transformation with a ``galore_jax.GaLoreState``; in ``galore_torch_order``
      with a ``weight_decay`` the first link of a chain.

    Raises:
      TypeError, ValueError: see ``galore``.

    References:
      Shazeer and Stern, Adafactor, 2018, https://arxiv.org/abs/1804.04235

    >>> import jax.numpy as jnp
    >>> from galore_jax import galore_adafactor
    >>> state = galore_adafactor(1e-2, rank=8).init({"kernel": jnp.ones((64, 256))})
    >>> state.inner_state[0].v_row["kernel"].shape, state.inner_state[0].v_col["kernel"].shape
    ((8,), (256,))
    """
    links = [
        optax.scale_by_factored_rms(
            decay_rate=decay_rate, min_dim_size_to_factor=min_dim_size_to_factor, epsilon=eps
        )
    ]
    if clipping_threshold is not None:
        links.append(optax.clip_by_block_rms(clipping_threshold))
    links.append(optax.scale_by_learning_rate(learning_rate))
    if b1 is not None:
        links.append(optax.ema(b1, debias=False))
    decays = isinstance(weight_decay, jax.Array) or weight_decay
    if decays and not galore_torch_order:
        links.append(decay_weights(learning_rate, weight_decay, mask))
    tx = galore(
        optax.chain(*links),
        rank=rank,
        **galore_options,
    )
    if decays and galore_torch_order:
        return optax.chain(tx, decay_weights(learning_rate, weight_decay, mask))
    return tx


_MUON_DEFAULTS: GaLoreOptions = {"scale": 1.0, "rotate_moments": True}


@functools.partial(_with_options_spelled_out, **_MUON_DEFAULTS)
def galore_muon(
    learning_rate: optax.ScalarOrSchedule,
    rank: Rank = 128,
    *,
    adam_learning_rate: optax.ScalarOrSchedule | None = None,
    beta: float = 0.95,
    rounds: int = 5,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    mask: Any | Callable[[optax.Params], Any] | None = None,
    bits: Literal[8] | None = None,
    most_growth: float | None = None,
    **galore_options: Unpack[GaLoreOptions],
) -> optax.GradientTransformationExtraArgs:
    r"""Runs orthogonalised momentum on projected gradients, Nesterov's Adam on all other leaves.

    A projected m x n matrix has one moment, of the shape of R: its state is ``m r + n r`` numbers,
    where Adam's in GaLore is ``m r + 2 n r``, and Muon's ``m n``. Its update is

    $$\Delta W = -\eta \, \sqrt{\max(1, n / m)} \, P \, \mathrm{orth}(M)$$

    with the momentum M, which turns with the projector at a refresh. The mathematics, and what it
    comes from: ``galore_jax.muon``.

    Args:
      learning_rate: of the projected matrices, a float or an Optax schedule. The largest singular
        value of an update is about this times the factor for shapes, whatever the rank.
      rank: see ``galore_jax.galore``.
      adam_learning_rate: of all other leaves; None for the same.
      beta: decay of the momentum.
      rounds: of the orthogonalisation, see ``galore_jax.muon.orthogonalize``.
      b1, b2, eps: Adam's, see ``optax.nadamw``: as in ``optax.contrib.muon``, its momentum is
        Nesterov's.
      weight_decay, mask: of all leaves, times the learning rate of each, see ``optax.adamw``.
      bits: 8 to keep the momentum, and Adam's moments, in 8 bits.
      most_growth: of the norm of each gradient, a matrix's low-rank one, see
        ``galore_jax.norm_growth``; None for any.
      galore_options: see ``galore_jax.options.GaLoreOptions``. Two defaults are others here:
        ``scale`` is 1 and ``rotate_moments`` True.

    Returns:
      A gradient transformation with a ``galore_jax.GaLoreState``.

    Raises:
      TypeError, ValueError: see ``galore``; ``beta`` outside [0, 1), ``rounds`` below 1, other
        ``bits``.

    References:
      Refael et al., SUMO: Subspace-Aware Moment-Orthogonalization, 2025,
      https://arxiv.org/abs/2505.24749

    >>> import jax, jax.numpy as jnp
    >>> from galore_jax import galore_muon
    >>> tx = galore_muon(0.02, rank=8, adam_learning_rate=1e-3)
    >>> params = {"kernel": jnp.zeros((64, 256)), "bias": jnp.zeros(256)}
    >>> state = tx.init(params)
    >>> sum(x.size for x in jax.tree.leaves(state) if x.ndim == 2) == 64 * 8 + 8 * 256
    True
    >>> grads = {"kernel": jax.random.normal(jax.random.key(0), (64, 256)), "bias": jnp.ones(256)}
    >>> updates, state = tx.update(grads, state, params)
    >>> jnp.linalg.matrix_rank(updates["kernel"]).item()
    8
    """
    is_share = isinstance(beta, numbers.Real) and 0 <= beta < 1
    if not is_share and not isinstance(beta, jax.Array):
        raise ValueError(f"beta must be at least 0 and less than 1, got {beta!r}")
    traced = "; for optax.inject_hyperparams name it in static_args"
    check_int("rounds", rounds, 1, hint=traced if isinstance(rounds, jax.Array) else "")
    for name in set(galore_options) - set(GaLoreOptions.__annotations__):
        raise TypeError(f"galore_muon() got an unexpected keyword argument {name!r}")
    if bits not in (None, 8) or isinstance(bits, float):
        raise ValueError(f"bits must be 8 or None, got {bits!r}")
    make = functools.partial(
        low_rank_muon,
        learning_rate=learning_rate,
        adam_learning_rate=learning_rate if adam_learning_rate is None else adam_learning_rate,
        beta=beta,
        rounds=rounds,
        b1=b1,
        b2=b2,
        eps=eps,
        weight_decay=weight_decay,
        mask=mask,
        bits=bits,
        most_growth=most_growth,
    )
    options: GaLoreOptions = {**_MUON_DEFAULTS, **galore_options}
    return wrap_optimizer(make, CheckedOptions(rank, **options))
