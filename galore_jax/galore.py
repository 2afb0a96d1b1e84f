"""GaLore as an Optax gradient transformation around any Optax optimizer."""

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer
from jax.sharding import AxisType, NamedSharding

from galore_jax.chaining import bare_galore
from galore_jax.options import CheckedOptions
from galore_jax.per_layer import layer_depths, over_stacks
from galore_jax.projection import (
    ProjType,
    dense,
    is_projected_gradient,
    split_first_moments,
    warn_without_first_moments,
)
from galore_jax.projectors import ProjectorMethod, refresh_leaves
from galore_jax.sharding import in_auto_mode, zeros_beside
from galore_jax.weight_copies import find_copies
from galore_jax.weight_decay import bring_back, update_and_decay
from galore_jax.weights import (
    MatrixSpec,
    Patterns,
    Rank,
    check_fit,
    low_rank_gradient,
    matrix_specs,
    on_matrices,
)


class GaLoreState(NamedTuple):
    """State of ``galore_jax.galore``.

    Attributes:
      count: number of updates so far, () int32.
      projector: the params' tree; P of each projected leaf in ``projector_dtype``, or as a
        ``Quantized`` with ``projector_bits``
        (shapes: ``galore_jax.projection``), ``optax.MaskedNode()`` for the other leaves.
      inner_state: state of the wrapped optimizer, built on low-rank proxies of the projected
        leaves (the shape of R, the leaf's dtype).
    """

    count: jax.typing.ArrayLike  # pyright: ignore[reportIncompatibleMethodOverride]
    projector: Any
    inner_state: optax.OptState


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
    rank: Rank = 128,
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
        function of a leaf's path and the leaf; None from it leaves the leaf alone.
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

    Returns:
      A ``GaLore`` transformation with a ``GaLoreState``. Its ``update`` takes
      ``refresh``, a bool or a traced () bool that overrides the schedule for that call (a Python
      bool compiles without the other case); other extra arguments are passed on to the optimizer.
      The first update always needs a refresh: with a traced False it makes one, with a Python
      False it raises, or gives NaN where the state is traced. With ``refresh=False`` gradients may
      come projected, from ``galore_jax.projected_value_and_grad``.

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
    )
    wrap = functools.partial(_wrap, options=options)
    return wrap(optimizer) if optimizer is not None else bare_galore(wrap)


def _wrap(optimizer: optax.GradientTransformation, options: CheckedOptions) -> GaLore:
    optimizer = optax.with_extra_args_support(optimizer)
    find_specs = functools.partial(
        matrix_specs,
        rank=options.rank,
        proj_type=options.proj_type,
        target_modules=options.target_modules,
        weight_dimension_numbers=options.weight_dimension_numbers,
        stacked_modules=options.stacked_modules,
    )

    def per_matrix(low: Any, specs: Any) -> optax.GradientTransformationExtraArgs:
        depth = lambda depth, spec: depth if spec is None else len(spec.stack)  # noqa: E731
        depths = jax.tree.map(depth, layer_depths(low, options.stacked_modules), specs)
        return over_stacks(optimizer, depths)

    def init(params: optax.Params) -> GaLoreState:
        specs = find_specs(params)
        proxies = on_matrices(
            lambda spec, x: zeros_beside(x, spec.axes, spec.low_shape, x.dtype), specs, params
        )
        projectors = jax.tree.map(options.no_projector, params, specs)
        inner = per_matrix(proxies, specs)
        find_copies(optimizer.init, proxies, specs)  # raises where the state could not follow
        inner_state = inner.init(proxies)
        if options.rotate_moments and jax.tree.leaves(projectors):
            warn_without_first_moments(inner_state)
        return GaLoreState(jnp.zeros([], jnp.int32), projectors, inner_state)

    def new_projectors(due: Any, gradients: Any, state: Any, specs: Any) -> tuple[Any, Any]:
        """P <- the top singular vectors of G where it is due; first moments turn with it."""
        moments, put = [], lambda _: state.inner_state
        if options.rotate_moments:
            moments, put = split_first_moments(state.inner_state)

        def refresh_all(before: tuple[Any, list[Any]]) -> tuple[Any, list[Any]]:
            # No key is made, and no random number drawn, where the projectors stay.
            key = jax.random.fold_in(jax.random.key(options.seed), state.count)
            how = options.projector, key, options.power_iterations
            return refresh_leaves(*how, gradients, specs, *before)

        before = state.projector, moments
        if isinstance(due, bool):
            projectors, moments = refresh_all(before) if due else before
        else:
            projectors, moments = jax.lax.cond(due, refresh_all, lambda same: same, before)
        return projectors, put(moments)

    def refresh(gradients: Any, state: Any, params: Any = None) -> GaLoreState:
        specs = find_specs(gradients, must_match=False)
        check_fit(specs, gradients, state.projector)
        _is_due(jnp.bool_(True), options.update_proj_gap, gradients, state)
        stored, inner_state = new_projectors(True, gradients, state, specs)
        low = on_matrices(low_rank_gradient, specs, gradients, dense(stored))
        inner, both = per_matrix(low, specs), (dense(state.projector), dense(stored))
        if copies := find_copies(optimizer.init, low, specs):
            _, inner_state = copies.follow(
                inner.init, inner_state, params, both, specs, options.scale, state.count
            )
        return GaLoreState(state.count, stored, inner_state)

    def update(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        *,
        refresh: bool | jax.Array | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, GaLoreState]:
        specs = find_specs(updates, must_match=False)
        check_fit(specs, updates, state.projector)
        due = _is_due(refresh, options.update_proj_gap, updates, state)

        # P, at updates 0, T, 2T, ... new from G
        stored, inner_state = new_projectors(due, updates, state, specs)
        projectors = dense(stored)

        # R = P^T G
        low = on_matrices(low_rank_gradient, specs, updates, projectors)

        # N = optimizer(R), which sees P^T W
        inner = per_matrix(low, specs)
        copies = find_copies(optimizer.init, low, specs)
        low_params = params
        if copies:
            both = (dense(state.projector), projectors)
            low_params, inner_state = copies.follow(
                inner.init, inner_state, params, both, specs, options.scale, state.count
            )
        elif params is not None:
            low_params = on_matrices(low_rank_gradient, specs, params, projectors)
        steps, decay, inner_state = update_and_decay(
            inner, low, inner_state, low_params, specs, tuple(copies.copies), **extra_args
        )

        # W <- W + scale * P N
        scale_if_set = functools.partial(_scale_if_set, options.scale, due)
        scale = on_matrices(scale_if_set, specs, steps, stored)
        weights = (low, updates) if params is None else (low_params, params)
        new = on_matrices(bring_back, specs, steps, scale, projectors, decay, *weights)
        return new, GaLoreState(optax.safe_increment(state.count), stored, inner_state)

    def update_on_any_mesh(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, GaLoreState]:
        if not _on_explicit_mesh((updates, state, params)):
            return update(updates, state, params, **extra_args)
        some_projected = any(map(is_projected_gradient, _leaves(updates)))
        like = (params if some_projected else updates, state)
        return in_auto_mode(update, (updates, state, params), extra_args, like=like)

    def refresh_on_any_mesh(gradients: Any, state: Any, params: Any = None) -> GaLoreState:
        if not _on_explicit_mesh((gradients, state, params)):
            return refresh(gradients, state, params)
        return in_auto_mode(refresh, (gradients, state, params), {}, like=state)

    transformation = GaLore(init, update_on_any_mesh)
    transformation.refresh = refresh_on_any_mesh
    return transformation


_NEEDS_FULL = (
    "a new projector needs the full gradients, and these are projected: give full ones with "
    "refresh=True, projected ones with refresh=False"
)


def _is_due(refresh: Any, update_proj_gap: Any, updates: Any, state: Any) -> Any:
    """Whether this update refreshes: a bool where that is known, else a traced one."""
    if refresh is not None and (jnp.shape(refresh) != () or jnp.result_type(refresh) != jnp.bool_):
        raise TypeError(f"refresh must be a bool, a () bool array or None, got {refresh!r}")
    due = state.count % update_proj_gap == 0 if refresh is None else refresh
    if isinstance(due, Tracer) and refresh is not None:
        due |= state.count == 0
    due = due if isinstance(due, Tracer) else bool(due)
    if any(map(is_projected_gradient, _leaves(updates))) and due is not False:
        raise ValueError(_NEEDS_FULL)
    if due is False and not isinstance(state.count, Tracer) and state.count == 0:
        arrays = jax.tree.leaves(state.projector)
        if arrays and not any(jnp.any(x != 0) for x in arrays):
            raise ValueError(
                "refresh=False on a new state, which has no projector yet: the first update "
                "(update 0, 0 % update_proj_gap == 0) needs refresh=True and full gradients"
            )
    return due


def _scale_if_set(scale: Any, due: Any, spec: MatrixSpec, step: jax.Array, stored: Any) -> Any:
    """The factor on a leaf's update: NaN, which no one overlooks, where it has no projector yet."""
    del spec, step
    if due is True:
        return scale
    is_set = functools.reduce(
        jnp.logical_or, [(x != 0).any((-2, -1), keepdims=True) for x in jax.tree.leaves(stored)]
    )
    return jnp.where(is_set, scale, jnp.nan)


def _leaves(updates: optax.Updates) -> list[Any]:
    return jax.tree.leaves(updates, is_leaf=is_projected_gradient)


def _on_explicit_mesh(tree: Any) -> bool:
    shardings = (getattr(jax.typeof(x), "sharding", None) for x in jax.tree.leaves(tree))
    meshes = (sharding.mesh for sharding in shardings if isinstance(sharding, NamedSharding))
    return any(AxisType.Explicit in mesh.axis_types for mesh in meshes if not mesh.empty)
