"""GaLore as an Optax gradient transformation around any Optax optimizer."""

import difflib
import functools
import math
import numbers
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from galore_jax.bases import BASES, Basis, find_basis
from galore_jax.chaining import bare_galore
from galore_jax.low_rank import LowRank
from galore_jax.matrices import Rank, check_int, check_rank, find_matrices
from galore_jax.projection import PROJ_TYPES, ProjType
from galore_jax.selection import compiled_patterns


def galore(
    optimizer: optax.GradientTransformation | None = None,
    *,
    rank: Rank = 128,
    update_proj_gap: int = 200,
    scale: float = 0.25,
    proj_type: ProjType = "std",
    target_modules: str | Sequence[str] | None = None,
    weight_dimension_numbers: Any = None,
    stacked_modules: str | Sequence[str] | None = None,
    basis: Basis = "svd",
    power_iterations: int = 2,
    transport: bool = False,
    projector_dtype: jax.typing.DTypeLike | None = None,
    projector_bits: Literal[8, 4] | None = None,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Trains whole matrices while the optimizer sees, and keeps, only low-rank projections.

    For each selected matrix W with gradient G (Zhao et al. 2024, Algorithm 2), at updates
    0, T, 2T, ... (``T = update_proj_gap``) the basis P becomes the top ``rank`` singular vectors of
    G, by default on the smaller side, computed in float32; between them it is constant. Then

    .. math::
      R = P^\top G, \qquad N = \mathrm{optimizer}(R), \qquad \Delta W = \mathrm{scale} \cdot P N

    (the other sides: :mod:`galore_jax.projection`). Moments are neither reset nor rotated when the
    basis changes, as published, unless ``transport`` is asked for. Leaves that are not selected go
    to the same optimizer unchanged. A gradient with a NaN or an infinity at a refresh leaves that
    matrix's basis as it was.

    An optimizer that reads params sees ``P^T W``. Decoupled weight decay is nevertheless that of
    the whole weight, ``-lr * weight_decay * W``, and is not multiplied by ``scale``. Copies of the
    weights in an optimizer's state (schedule_free, prodigy, dog) follow the basis: such an
    optimizer trains V in ``W = W_outside + scale * P V``.

    Args:
      optimizer: any Optax optimizer, its learning rate included. None gives a bare ``galore`` for
        :func:`galore_jax.chain`, which wraps all that follows it there. In ``optax.chain`` a bare
        one cannot shrink the state of its successors: it only emits ``scale * P P^T G``, and warns.
      rank: rank of the projection, at least 1; a smaller matrix takes ``min(rank, m, n)``. Or a
        function of a leaf's path and the leaf; None from it leaves the leaf alone.
      update_proj_gap: updates between two changes of basis, at least 1.
      scale: factor on the updates of projected leaves (the paper's alpha), greater than 0.
      proj_type: ``"std"`` (the smaller side), ``"reverse_std"`` (the larger), ``"left"``,
        ``"right"`` or ``"full"`` (both), see :func:`galore_jax.projection.projected_side`.
      target_modules: which leaves are projected, see :func:`galore_jax.selection.is_projected`.
      weight_dimension_numbers: which axes of a leaf are its matrix, see
        :func:`galore_jax.matrices.find_matrices`.
      stacked_modules: regular expressions on the paths of leaves whose first axis indexes layers
        (as for ``jax.lax.scan``): the optimizer takes them a layer at a time, those that are not
        projected too, see :func:`galore_jax.stacks.per_layer`.
      basis: how the basis is computed: ``"svd"``, ``"eigh"``, ``"subspace_iteration"``,
        ``"randomized"`` or ``"random"``, see :mod:`galore_jax.bases`.
      power_iterations: rounds of the iterated bases at a refresh, at least 1.
      transport: whether first moments (arrays named ``mu``, ``trace`` or ``ema``) follow the basis
        at a refresh: ``M <- (P_new^T P_old) M``. Warns where there are none.
      projector_dtype: dtype of the stored bases; None takes each leaf's.
      projector_bits: 8 or 4 to store them as block-wise integers instead, with a float32 scale for
        every 256 values, see :mod:`galore_jax.quantization`; products with them are in float32.
      seed: of the bases' random parts.

    Returns:
      A gradient transformation with a :class:`GaLoreState`. Its ``update`` takes ``refresh``, a
      bool or a traced () bool that overrides the schedule for that call (a Python bool compiles
      without the other case), or ``"only"`` to change the bases and nothing else; other extra
      arguments are passed on to the optimizer. With ``refresh=False`` gradients may come
      projected, from :func:`galore_jax.projected_value_and_grad`.

    Raises:
      TypeError: an argument of the wrong type.
      ValueError: an argument out of its range; by ``init``, ``target_modules`` that select nothing,
        or an optimizer whose state is a function of the weights' values other than a copy.

    References:
      Zhao et al., GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection, 2024,
      https://arxiv.org/abs/2403.03507

    >>> import jax, jax.numpy as jnp, optax
    >>> from galore_jax import galore
    >>> params = {"kernel": jnp.ones((64, 256)), "bias": jnp.zeros(256)}
    >>> tx = galore(optax.adamw(1e-3), rank=8)
    >>> state = tx.init(params)
    >>> state.projector["kernel"].shape, state.inner_state[0].mu["kernel"].shape
    ((64, 8), (8, 256))
    >>> updates, state = tx.update(jax.tree.map(jnp.ones_like, params), state, params)
    >>> updates["kernel"].shape
    (64, 256)
    """
    if not callable(rank):
        check_rank(rank)
    _check_arguments(
        optimizer, update_proj_gap, scale, proj_type, basis, power_iterations, transport, seed
    )
    if projector_dtype is not None:
        _check_dtype(projector_dtype)
    if projector_bits is not None:
        if projector_bits not in (8, 4) or isinstance(projector_bits, bool | float):
            raise ValueError(f"projector_bits must be 8, 4 or None, got {projector_bits!r}")
        if projector_dtype is not None:
            raise ValueError(
                f"projector_bits={projector_bits} and projector_dtype={projector_dtype} exclude "
                "each other: give one"
            )
    if target_modules is not None:
        compiled_patterns(target_modules)
    if stacked_modules is not None:
        compiled_patterns(stacked_modules, "stacked_modules")

    find = functools.partial(
        find_matrices,
        rank=rank,
        proj_type=proj_type,
        target_modules=target_modules,
        weight_dimension_numbers=weight_dimension_numbers,
    )
    new_basis = functools.partial(find_basis, basis, power_iterations=power_iterations)

    def wrap(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
        low_rank = LowRank(
            optax.with_extra_args_support(inner),
            find_matrices=find,
            find_basis=new_basis,
            stacked_modules=stacked_modules,
            update_proj_gap=update_proj_gap,
            scale=scale,
            transport=transport,
            projector_dtype=projector_dtype,
            projector_bits=projector_bits,
            seed=seed,
        )
        return optax.GradientTransformationExtraArgs(low_rank.init, low_rank.update)

    return wrap(optimizer) if optimizer is not None else bare_galore(wrap)


def _check_arguments(
    optimizer, update_proj_gap, scale, proj_type, basis, power_iterations, transport, seed
) -> None:
    if optimizer is not None and not isinstance(optimizer, optax.GradientTransformation):
        raise TypeError(
            f"optimizer must be an optax.GradientTransformation, got {type(optimizer).__name__}; "
            "for a rank write galore(rank=...)"
        )
    for name, value, least in (
        ("update_proj_gap", update_proj_gap, 1),
        ("power_iterations", power_iterations, 1),
        ("seed", seed, 0),
    ):
        if not isinstance(value, jax.Array):  # as optax.inject_hyperparams passes it
            check_int(name, value, least)
    if not isinstance(scale, jax.Array):
        if not isinstance(scale, numbers.Real) or isinstance(scale, bool):
            raise TypeError(f"scale must be a number greater than 0, got {scale!r}")
        if not 0 < float(scale) < math.inf:
            raise ValueError(f"scale must be a number greater than 0, got {scale!r}")
    if not isinstance(transport, bool):
        raise TypeError(f"transport must be a bool, got {transport!r}")
    for name, value, choices in (("proj_type", proj_type, PROJ_TYPES), ("basis", basis, BASES)):
        if value not in choices:
            near = difflib.get_close_matches(str(value), choices, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}{hint}")


def _check_dtype(projector_dtype: Any) -> None:
    allowed = f"projector_dtype must be a float dtype or None, got {projector_dtype!r}"
    try:
        is_float = jnp.issubdtype(jnp.dtype(projector_dtype), jnp.floating)
    except TypeError as error:
        raise TypeError(allowed) from error
    if not is_float:
        raise ValueError(allowed)
