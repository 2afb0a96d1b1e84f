"""GaLore as an Optax gradient transformation around any Optax optimizer."""

import functools
import warnings
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer
from jax.sharding import AxisType, NamedSharding

from galore_jax.chaining import bare_galore
from galore_jax.lazy_refresh import no_times
from galore_jax.options import CheckedOptions
from galore_jax.plan import Plan, planner
from galore_jax.projection import (
    MatrixSpec,
    ProjType,
    dense,
    is_projected_gradient,
    on_matrices,
)
from galore_jax.projectors import ProjectorMethod
from galore_jax.recovery import Recovery, no_norm, recovered
from galore_jax.refresh import first_moments, refresh_projectors
from galore_jax.sharding import in_auto_mode, zeros_beside
from galore_jax.weight_copies import seen_weight
from galore_jax.weight_decay import bring_back, update_and_decay, without_decay
from galore_jax.weights import DEFAULT_RANK, Patterns, Rank


class GaLoreState(NamedTuple):
    """State of ``galore_jax.galore``.

    Attributes:
      count: number of updates so far, () int32.
      projector: the params' tree; P of each projected leaf in ``projector_dtype``, or as a
        ``Quantized`` with ``projector_bits``
        (shapes: ``galore_jax.projection``), ``optax.MaskedNode()`` for the other leaves.
      inner_state: state of the wrapped optimizer, built on low-rank proxies of the projected
        leaves (the shape of R, the leaf's dtype).
      recovered_norm: with ``recovery`` the params' tree; for each projected matrix the norm that
        limits the next one, () float32 or that of a stack, see ``galore_jax.recovery``. Else ().
      refresh_times: with ``lazy_refresh`` the params' tree; a
        ``galore_jax.lazy_refresh.RefreshTimes`` for each projected leaf. Else ().
    """

    count: jax.typing.ArrayLike  # pyright: ignore[reportIncompatibleMethodOverride]
    projector: Any
    inner_state: optax.OptState
    recovered_norm: Any = ()
    refresh_times: Any = ()


class GaLore(optax.GradientTransformationExtraArgs):
    """The transformation that ``galore`` returns: ``init``, ``update`` and one function more.

    Attributes:
      refresh: a function of (gradients, state, params=None) that returns the state with new
        projectors, and what follows them, and makes no update.
    """

    refresh: Callable[..., GaLoreState]


def galore(
    optimizer: optax.GradientTransformation | None = None,
    *,
    rank: Rank = DEFAULT_RANK,
    update_proj_gap: int = 200,
    scale: float = 0.25,
    proj_type: ProjType = "std",
    target_modules: Patterns | None = None,
    weight_dimension_numbers: Any = None,
    stacked_modules: Patterns | None = None,
    projector: ProjectorMethod = "svd",
    power_iterations: int = 2,
    rotate_moments: bool = False,
    projector_dtype: jax.typing.DTypeLike | None = None,
    projector_bits: Literal[8, 4] | None = None,
    seed: int = 0,
    recovery: Recovery | None = None,
    lazy_refresh: float | None = None,
) -> GaLore:
    r"""Trains whole matrices while the optimizer sees, and keeps, only low-rank projections.

    For each selected matrix W with gradient G (Zhao et al. 2024, Algorithm 2), at updates
    0, T, 2T, ... (``T = update_proj_gap``) the projector P becomes the top ``rank`` singular
    vectors of G, by default on the smaller side, in float32; between them it is constant. Then

    $$R = P^\top G, \qquad N = \mathrm{optimizer}(R), \qquad \Delta W = \mathrm{scale} \cdot P N$$

    (the other sides: ``galore_jax.projection``). Moments are neither reset nor rotated at a
    refresh, as published, unless ``rotate_moments`` is set. Leaves that are not selected go to the
    same optimizer unchanged. A gradient that is zero, or has a NaN or an infinity, at a refresh
    leaves that matrix's projector as it was.

    An optimizer that reads params sees ``P^T W``. Decoupled weight decay is nevertheless that of
    the whole weight, ``-lr * weight_decay * W``, and is not multiplied by ``scale``. Copies of the
    weights in an optimizer's state (schedule_free, prodigy, dog) follow the projector, see
    ``galore_jax.weight_copies``.

    Args:
      optimizer: any Optax optimizer, its learning rate included. None gives a bare ``galore`` for
        ``galore_jax.chain``, which wraps all that follows it there. In ``optax.chain`` a bare
        one cannot shrink the state of its successors: it only emits ``scale * P P^T G``, and warns.
      rank: rank of the projection, at least 1; a smaller matrix takes ``min(rank, m, n)``. Or a
        table of ranks by regular expressions on paths, ``{"q_proj|k_proj": 32, "": 64}``, see
        ``galore_jax.weights.rank_by_pattern``; or a function of a leaf's path and the leaf. None
        from either leaves the leaf alone.
      update_proj_gap: updates between two refreshes, at least 1.
      scale: factor on the updates of projected leaves (the paper's alpha), greater than 0.
      proj_type: ``"std"`` (the smaller side), ``"reverse_std"`` (the larger), ``"left"``,
        ``"right"`` or ``"full"`` (both), see ``galore_jax.projection.projected_side``.
      target_modules: which leaves are projected, see ``galore_jax.weights.projection_mask``.
      weight_dimension_numbers: which axes of a leaf are its matrix, see
        ``galore_jax.weights.matrix_specs``.
      stacked_modules: regular expressions on the paths of leaves whose first axis indexes layers
        (as for ``jax.lax.scan``): the optimizer takes them a layer at a time, those that are not
        projected too, see ``galore_jax.per_layer.per_layer``.
      projector: how P is computed: ``"svd"``, ``"eigh"``, ``"subspace_iteration"``,
        ``"randomized"`` or ``"random"``, see ``galore_jax.projectors``.
      power_iterations: rounds of the iterated methods at a refresh, at least 1.
      rotate_moments: whether first moments (fields ``mu``, ``trace`` or ``ema``) turn with the
        projector at a refresh: ``M <- (P_new^T P_old) M``. Warns where there are none.
      projector_dtype: dtype of the stored projectors; None takes each leaf's.
      projector_bits: 8 or 4 to store them as block-wise integers instead, with a float32 scale for
        every 256 values, see ``galore_jax.quantization``; products with them are in float32.
      seed: seed of the projectors' random parts.
      recovery: ``"column"`` or ``"matrix"`` adds the gradient outside the subspace to the update,
        scaled by columns or by matrices as the optimizer scales what is inside (Fira), see
        ``galore_jax.recovery``. It needs full gradients at each update, and keeps one number a
        matrix.
      lazy_refresh: None, or an overlap of two successive bases from 0 to 1: each matrix waits
        twice as long for its next projector while its own is at least that, see
        ``galore_jax.lazy_refresh``. Q-GaLore's threshold is 0.4.

    Returns:
      A ``GaLore`` transformation with a ``GaLoreState``. Its ``update`` takes
      ``refresh``, a bool or a traced () bool that overrides the schedule for that call (a Python
      bool compiles without the other case); other extra arguments are passed on to the optimizer.
      The first update always needs a refresh: with a traced False it makes one, with a Python
      False it raises, or gives NaN where the state is traced. With ``refresh=False`` gradients may
      come projected, from ``galore_jax.projected_value_and_grad``.

    Raises:
      TypeError: an argument of the wrong type.
      ValueError: an argument out of its range; by ``init``, ``target_modules`` or a pattern of
        ``rank`` that select nothing, or an optimizer whose state is a function of the weights'
        values other than a copy.

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
    if optimizer is not None and not isinstance(optimizer, optax.GradientTransformation):
        raise TypeError(
            f"optimizer must be an optax.GradientTransformation, got {type(optimizer).__name__}; "
            "for a rank write galore(rank=...)"
        )
    options = CheckedOptions(
        rank=rank,
        update_proj_gap=update_proj_gap,
        scale=scale,
        proj_type=proj_type,
        target_modules=target_modules,
        weight_dimension_numbers=weight_dimension_numbers,
        stacked_modules=stacked_modules,
        projector=projector,
        power_iterations=power_iterations,
        rotate_moments=rotate_moments,
        projector_dtype=projector_dtype,
        projector_bits=projector_bits,
        seed=seed,
        recovery=recovery,
        lazy_refresh=lazy_refresh,
    )
    if optimizer is None:
        return bare_galore(lambda inner: wrap_optimizer(lambda _: inner, options))
    return wrap_optimizer(lambda _: optimizer, options)


def wrap_optimizer(
    make_optimizer: Callable[[Mapping[Any, MatrixSpec]], optax.GradientTransformation],
    options: CheckedOptions,
) -> GaLore:
    """Makes a ``galore`` of an optimizer that may depend on how leaves are projected.

    Args:
      make_optimizer: a function of the projected leaves, by their key paths.
      options: GaLore's.

    Returns:
      As ``galore``.
    """
    plan_of = planner(make_optimizer, options)

    def init(params: optax.Params) -> GaLoreState:
        plan = plan_of(params)
        options.check_patterns(params, plan.specs)
        proxies = on_matrices(
            lambda spec, x: zeros_beside(x, spec.axes, spec.low_shape, x.dtype), plan.specs, params
        )
        projectors = jax.tree.map(options.no_projector, params, plan.specs)
        inner_state = plan.optimizer.init(proxies)
        turns = not options.rotate_moments or first_moments(inner_state)
        if not turns and jax.tree.leaves(projectors):
            warnings.warn(_NOTHING_TURNS, stacklevel=2)
        norms, times = (), ()
        if options.recovery is not None:
            norms = jax.tree.map(no_norm, params, plan.specs)
        if options.lazy_refresh is not None:
            if plan.copies:
                raise ValueError(_NO_LAZY_COPIES)
            times = jax.tree.map(no_times, params, plan.specs)
        return GaLoreState(jnp.zeros([], jnp.int32), projectors, inner_state, norms, times)

    def new_projectors(
        plan: Plan, due: bool | jax.Array, gradients: Any, state: Any, params: Any
    ) -> tuple[Any, optax.OptState, Any]:
        """P from G where that is due; first moments and copies of weights follow it."""
        stored, inner_state, times = refresh_projectors(options, due, gradients, plan.specs, state)
        if plan.copies:
            inner_state = plan.copies.follow(
                due,
                plan.optimizer.init,
                inner_state,
                params,
                (dense(state.projector), dense(stored)),
                plan.specs,
                options.scale,
                state.count,
            )
        return stored, inner_state, times

    def refresh(gradients: Any, state: Any, params: Any = None) -> GaLoreState:
        plan = plan_of(gradients)
        plan.check_fit(True, gradients, state)
        stored, inner_state, times = new_projectors(plan, True, gradients, state, params)
        return GaLoreState(state.count, stored, inner_state, state.recovered_norm, times)

    def update(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        *,
        refresh: bool | jax.Array | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, GaLoreState]:
        due = _is_due(refresh, options.update_proj_gap, state)
        plan = plan_of(updates)
        plan.check_fit(due, updates, state)

        # P, at updates 0, T, 2T, ... new from G
        stored, inner_state, times = new_projectors(plan, due, updates, state, params)
        projectors = dense(stored)

        # R = P^T G
        low = on_matrices(MatrixSpec.to_low_rank, plan.specs, updates, projectors)

        # N = optimizer(R), which sees P^T W
        see = (
            functools.partial(seen_weight, options.scale) if plan.copies else MatrixSpec.to_low_rank
        )
        low_params = None if params is None else on_matrices(see, plan.specs, params, projectors)
        copies = plan.copies.copies if plan.copies else ()
        steps, decay, inner_state = update_and_decay(
            plan.optimizer, low, inner_state, low_params, plan.specs, copies, **extra_args
        )

        # S, from what of G is outside the subspace
        weights = (low, updates) if params is None else (low_params, params)
        outside, norms = jax.tree.map(lambda _: None, steps), state.recovered_norm
        if options.recovery is not None:
            pure = on_matrices(without_decay, plan.specs, steps, decay, weights[0])
            outside, norms = recovered(
                options.recovery, plan.specs, updates, projectors, low, pure, norms
            )

        # W <- W + scale * (P N + S)
        back = functools.partial(bring_back, options.scale, due)
        new = on_matrices(back, plan.specs, steps, projectors, decay, outside, *weights)
        count = optax.safe_increment(state.count)
        return new, GaLoreState(count, stored, inner_state, norms, times)

    def update_on_any_mesh(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, GaLoreState]:
        if not _on_explicit_mesh((updates, state, params)):
            return update(updates, state, params, **extra_args)
        leaves = jax.tree.leaves(updates, is_leaf=is_projected_gradient)
        like = params if any(map(is_projected_gradient, leaves)) else updates
        return in_auto_mode(update, (updates, state, params), extra_args, like=(like, state))

    def refresh_on_any_mesh(gradients: Any, state: Any, params: Any = None) -> GaLoreState:
        if not _on_explicit_mesh((gradients, state, params)):
            return refresh(gradients, state, params)
        return in_auto_mode(refresh, (gradients, state, params), {}, like=state)

    transformation = GaLore(init, update_on_any_mesh)
    transformation.refresh = refresh_on_any_mesh
    return transformation


_NOTHING_TURNS = (
    "rotate_moments=True does nothing here: the optimizer's state has no first moment named mu, "
    "trace or ema that can turn"
)

_NO_LAZY_COPIES = (
    "lazy_refresh cannot be used with an optimizer that keeps copies of the weights in its state "
    "(schedule_free, prodigy, dog), which follow all projectors at once"
)


def _is_due(refresh: Any, update_proj_gap: Any, state: Any) -> Any:
    """Whether this update refreshes: a bool where that is known, else a traced one."""
    if refresh is not None and (jnp.shape(refresh) != () or jnp.result_type(refresh) != jnp.bool_):
        raise TypeError(f"refresh must be a bool, a () bool array or None, got {refresh!r}")
    due = state.count % update_proj_gap == 0 if refresh is None else refresh
    if isinstance(due, Tracer) and refresh is not None:
        due |= state.count == 0
    return due if isinstance(due, Tracer) else bool(due)


def _on_explicit_mesh(tree: Any) -> bool:
    for array in jax.tree.leaves(tree):
        sharding = getattr(jax.typeof(array), "sharding", None)
        mesh = sharding.mesh if isinstance(sharding, NamedSharding) else None
        if mesh is not None and not mesh.empty and AxisType.Explicit in mesh.axis_types:
            return True
    return False
