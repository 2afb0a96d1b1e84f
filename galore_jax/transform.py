"""GaLore as an Optax gradient transformation around any Optax optimizer."""

import numbers
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.extend.core import Var

from galore_jax import projection
from galore_jax.decay import update_and_decay
from galore_jax.selection import compiled_patterns, is_projected

ProjType = Literal["std"]
Basis = Literal["svd"]


class GaLoreState(NamedTuple):
    """State of :func:`galore`.

    Attributes:
      count: number of updates so far, () int32.
      projector: the params' tree; the basis of each projected leaf in the leaf's dtype
        (shapes: :mod:`galore_jax.projection`), ``optax.MaskedNode()`` for the other leaves.
      inner_state: state of the wrapped optimizer, built on low-rank stand-ins for the projected
        leaves (the projected gradient's shape, the leaf's dtype).
    """

    count: jax.typing.ArrayLike  # pyright: ignore[reportIncompatibleMethodOverride]
    projector: Any
    inner_state: optax.OptState


def galore(
    optimizer: optax.GradientTransformation | None = None,
    *,
    rank: int = 128,
    update_proj_gap: int = 200,
    scale: float = 0.25,
    proj_type: ProjType = "std",
    target_modules: str | Sequence[str] | None = None,
    basis: Basis = "svd",
) -> optax.GradientTransformationExtraArgs:
    r"""Trains whole matrices while the optimizer sees, and keeps, only low-rank projections.

    For each selected matrix W with gradient G (Zhao et al. 2024, Algorithm 2), at updates
    0, T, 2T, ... (``T = update_proj_gap``) the basis P becomes the top ``rank`` singular vectors of
    G on the smaller side, computed in float32; between them it is constant. Then

    .. math::
      R = P^\top G, \qquad N = \mathrm{optimizer}(R), \qquad \Delta W = \mathrm{scale} \cdot P N

    (``R = G P``, ``N P^T`` where the right side is the smaller). Moments are neither reset nor
    rotated when the basis changes, as published. Leaves that are not selected go to the same
    optimizer unchanged. A gradient with a NaN or an infinity at a refresh leaves that matrix's
    basis as it was.

    An optimizer that reads params sees ``P^T W``. Decoupled weight decay is nevertheless that of
    the whole weight, ``-lr * weight_decay * W``, and is not multiplied by ``scale``.

    Args:
      optimizer: any Optax optimizer, its learning rate included. None gives a bare ``galore`` for
        :func:`galore_jax.chain`, which wraps all that follows it there. In ``optax.chain`` a bare
        one cannot shrink the state of its successors: it only emits ``scale * P P^T G``, and warns.
      rank: rank of the projection, at least 1; a smaller matrix takes ``min(rank, m, n)``.
      update_proj_gap: updates between two changes of basis, at least 1.
      scale: factor on the updates of projected leaves (the paper's alpha).
      proj_type: which side is projected. ``"std"``: the smaller one.
      target_modules: which leaves are projected, see :func:`is_projected`.
      basis: how the basis is computed. ``"svd"``: exactly.

    Returns:
      A gradient transformation with a :class:`GaLoreState`; extra arguments of ``update`` are
      passed on to the optimizer.

    Raises:
      TypeError: an argument of the wrong type.
      ValueError: an argument out of its range; by ``init``, ``target_modules`` that select nothing,
        or an optimizer that keeps the weights' values in its state.

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
    _check_arguments(optimizer, rank, update_proj_gap, scale, proj_type, basis)

    if target_modules is not None:
        compiled_patterns(target_modules)

    def wrap(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
        return _wrap(inner, rank, update_proj_gap, scale, target_modules)

    return wrap(optimizer) if optimizer is not None else _bare(wrap)


def chain(*transforms: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """``optax.chain`` that understands a bare ``galore(rank=...)``: it wraps all that follows it.

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
    bare = [(i, tx) for i, tx in enumerate(transforms) if isinstance(tx, _BareGaLore)]
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


class _BareGaLore(optax.GradientTransformationExtraArgs):
    """A ``galore`` still without its optimizer."""

    wrap: Callable[[optax.GradientTransformation], optax.GradientTransformationExtraArgs]


def _bare(
    wrap: Callable[[optax.GradientTransformation], optax.GradientTransformationExtraArgs],
) -> _BareGaLore:
    alone = wrap(optax.identity())
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

    bare = _BareGaLore(init, alone.update)
    bare.wrap = wrap
    return bare


def _wrap(
    inner: optax.GradientTransformation,
    rank: int,
    update_proj_gap: int,
    scale: float,
    target_modules: str | Sequence[str] | None,
) -> optax.GradientTransformationExtraArgs:
    inner = optax.with_extra_args_support(inner)

    def init(params: optax.Params) -> GaLoreState:
        mask = is_projected(params, target_modules)

        def projector(selected: bool, leaf: jax.Array) -> Any:
            if not selected:
                return optax.MaskedNode()
            side = projection.std_side(leaf.shape)
            return jnp.zeros(projection.projector_shape(leaf.shape, rank, side), leaf.dtype)

        def stand_in(selected: bool, leaf: jax.Array) -> jax.Array:
            if not selected:
                return leaf
            side = projection.std_side(leaf.shape)
            return jnp.zeros(projection.projected_shape(leaf.shape, rank, side), leaf.dtype)

        stand_ins = jax.tree.map(stand_in, mask, params)
        if _state_holds_weights(inner, stand_ins, mask):
            raise ValueError(
                "the optimizer's state is made from the values of the weights, whose projection is "
                "not known before the first gradient (schedule_free, prodigy and dog are such); "
                "put that wrapper around galore(...), or take another optimizer"
            )
        return GaLoreState(
            count=jnp.zeros([], jnp.int32),
            projector=jax.tree.map(projector, mask, params),
            inner_state=inner.init(stand_ins),
        )

    def update(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, GaLoreState]:
        projector = jax.lax.cond(
            state.count % update_proj_gap == 0,
            lambda old: _map_projected(_refreshed, old, updates),
            lambda old: old,
            state.projector,
        )
        low_updates = _map_projected(_project, projector, updates, others=updates)
        if params is None:
            low_params = decay = _map_projected(lambda p: None, projector)
            inner_updates, inner_state = inner.update(
                low_updates, state.inner_state, None, **extra_args
            )
        else:
            low_params = _map_projected(_project, projector, params, others=params)
            inner_updates, decay, inner_state = update_and_decay(
                inner,
                low_updates,
                state.inner_state,
                low_params,
                _map_projected(
                    lambda p: True, projector, others=jax.tree.map(lambda _: False, updates)
                ),
                extra_args,
            )

        def bring_back(p, update, gradient, c, low_weight, weight):
            if c is None:
                return (scale * _project_back(p, update, gradient)).astype(update.dtype)
            # The inner update holds c P^T W; the decay is to be c W, free of scale.
            gradient_part = scale * _project_back(p, update - c * low_weight, gradient)
            return (gradient_part + c * weight).astype(update.dtype)

        full = _map_projected(
            bring_back,
            projector,
            inner_updates,
            updates,
            decay,
            low_params,
            low_params if params is None else params,
            others=inner_updates,
        )
        count = optax.safe_increment(state.count)
        return full, GaLoreState(count, projector, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def _state_holds_weights(
    inner: optax.GradientTransformation, stand_ins: optax.Params, selected: Any
) -> bool:
    """Whether ``inner.init`` depends on the values, not only the shapes, of the selected leaves."""
    leaves, treedef = jax.tree.flatten(stand_ins)
    chosen = [i for i, wanted in enumerate(jax.tree.leaves(selected)) if wanted]

    def init(of_chosen: list[jax.Array]) -> optax.OptState:
        seen = list(leaves)
        for i, leaf in zip(chosen, of_chosen, strict=True):
            seen[i] = leaf
        return inner.init(treedef.unflatten(seen))

    jaxpr = jax.make_jaxpr(init)([leaves[i] for i in chosen]).jaxpr
    reached = set(jaxpr.invars)
    for equation in jaxpr.eqns:
        if any(isinstance(v, Var) and v in reached for v in equation.invars):
            reached.update(equation.outvars)
    return any(isinstance(v, Var) and v in reached for v in jaxpr.outvars)


def _map_projected(fn: Callable[..., Any], projector: Any, *trees: Any, others: Any = None) -> Any:
    """``fn(P, *leaves)`` on projected leaves, elsewhere the leaf of ``others`` (or MaskedNode)."""
    is_masked = lambda node: isinstance(node, optax.MaskedNode)  # noqa: E731
    if others is None:
        others = projector

    def on_leaf(p: Any, other: Any, *leaves: Any) -> Any:
        return other if is_masked(p) else fn(p, *leaves)

    return jax.tree.map(on_leaf, projector, others, *trees, is_leaf=is_masked)


def _refreshed(old: jax.Array, gradient: jax.Array) -> jax.Array:
    new = projection.svd_basis(gradient, old.shape[-1], projection.std_side(gradient.shape))
    finite = jnp.isfinite(gradient).all(axis=(-2, -1), keepdims=True)
    return jnp.where(finite, new.astype(old.dtype), old)


def _project(projector: jax.Array, matrix: jax.Array) -> jax.Array:
    return projection.project(matrix, projector, projection.std_side(matrix.shape))


def _project_back(projector: jax.Array, coordinates: jax.Array, like: jax.Array) -> jax.Array:
    return projection.project_back(coordinates, projector, projection.std_side(like.shape))


def _check_arguments(optimizer, rank, update_proj_gap, scale, proj_type, basis) -> None:
    if optimizer is not None and not isinstance(optimizer, optax.GradientTransformation):
        raise TypeError(
            f"optimizer must be an optax.GradientTransformation, got {type(optimizer).__name__}; "
            "for a rank write galore(rank=...)"
        )
    for name, value in (("rank", rank), ("update_proj_gap", update_proj_gap)):
        if not isinstance(value, numbers.Integral) or isinstance(value, bool):
            raise TypeError(f"{name} must be an int of at least 1, got {value!r}")
        if value < 1:
            raise ValueError(f"{name} must be an int of at least 1, got {value}")
    # An array is what optax.inject_hyperparams passes.
    if not isinstance(scale, numbers.Real | jax.Array) or isinstance(scale, bool):
        raise TypeError(f"scale must be a number, got {scale!r}")
    if proj_type != "std":
        raise ValueError(f"proj_type must be 'std', got {proj_type!r}")
    if basis != "svd":
        raise ValueError(f"basis must be 'svd', got {basis!r}")
