"""The state of GaLore and one update of it: new bases, project, optimize, bring back."""

import dataclasses
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from galore_jax import projection
from galore_jax.decay import update_and_decay
from galore_jax.inner_state import find_first_moments, find_weights
from galore_jax.matrices import Matrix
from galore_jax.projection import Projector, is_projected_gradient
from galore_jax.quantization import (
    dequantize_tree,
    is_quantized,
    quantized_zeros,
)
from galore_jax.refresh import (
    Leaves,
    Projectors,
    Refresh,
    check_not_due,
    is_only,
    refreshed_if,
    replaced,
    where,
)
from galore_jax.sharding import in_auto_mode, zeros_beside
from galore_jax.stacks import layer_stacks, per_matrix


class GaLoreState(NamedTuple):
    """State of :func:`galore_jax.galore`.

    Attributes:
      count: number of updates so far, () int32.
      projector: the params' tree; the basis of each projected leaf in ``projector_dtype``, or as a
        :class:`~galore_jax.quantization.Quantized` with ``projector_bits``
        (shapes: :mod:`galore_jax.projection`), ``optax.MaskedNode()`` for the other leaves.
      inner_state: state of the wrapped optimizer, built on low-rank stand-ins for the projected
        leaves (the coordinates' shape, the leaf's dtype).
    """

    count: jax.typing.ArrayLike  # pyright: ignore[reportIncompatibleMethodOverride]
    projector: Any
    inner_state: optax.OptState


@dataclasses.dataclass(frozen=True)
class LowRank:
    """An optimizer on projected leaves: ``init`` and ``update`` of a gradient transformation.

    Attributes:
      optimizer: the one that sees the projected leaves.
      find_matrices: how each leaf of a tree is projected, in the order of the leaves.
      find_basis: :func:`galore_jax.bases.find_basis`, its basis chosen.
      stacked_modules, update_proj_gap, scale, transport, projector_dtype, projector_bits, seed: see
        :func:`galore_jax.galore`.
    """

    optimizer: optax.GradientTransformationExtraArgs
    find_matrices: Callable[..., list[Matrix | None]]
    find_basis: Callable[..., Projector]
    stacked_modules: str | Sequence[str] | None
    update_proj_gap: Any
    scale: Any
    transport: bool
    projector_dtype: jax.typing.DTypeLike | None
    projector_bits: Literal[8, 4] | None
    seed: Any

    def init(self, params: optax.Params) -> GaLoreState:
        """The state before the first update."""
        leaves, treedef = jax.tree.flatten(params)
        projectors: list[Any] = [optax.MaskedNode()] * len(leaves)
        stand_ins = list(leaves)
        matrices = self._matrices(params, must_match=True)
        for i, matrix in matrices.items():
            dtype = self.projector_dtype or leaves[i].dtype
            projectors[i] = _empty_projector(leaves[i], matrix, dtype, self.projector_bits)
            stand_ins[i] = zeros_beside(leaves[i], matrix.axes, matrix.low_shape, leaves[i].dtype)
        low_params = treedef.unflatten(stand_ins)
        optimizer = self._of_each_matrix(params, matrices)
        find_weights(optimizer.init, low_params, matrices)
        inner_state = optimizer.init(low_params)
        moments = find_first_moments(inner_state, low_params, matrices)
        if self.transport and matrices and not moments:
            warnings.warn(
                "transport=True does nothing here: the optimizer's state has no first moment "
                "named mu, trace or ema",
                stacklevel=2,
            )
        return GaLoreState(jnp.zeros([], jnp.int32), treedef.unflatten(projectors), inner_state)

    def update(
        self,
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        *,
        refresh: Refresh = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, GaLoreState]:
        """The updates in the full shapes, and the new state.

        With ``refresh="only"`` the given updates, and a state of which the bases and what follows
        them are new.
        """
        more, treedef = jax.tree.flatten((refresh, extra_args))
        arrays = {i: x for i, x in enumerate(more) if isinstance(x, jax.Array)}

        def on_operands(operands: Any) -> tuple[optax.Updates, GaLoreState]:
            updates, state, params, arrays = operands
            when, extra_args = treedef.unflatten(replaced(more, arrays))
            return self._update(updates, state, params, when, extra_args)

        operands = updates, state, params, arrays
        some_projected = any(map(is_projected_gradient, _gradient_leaves(updates)))
        in_full = params if some_projected and not is_only(refresh) else updates
        return in_auto_mode(on_operands, operands, like=(in_full, state))

    def _update(
        self,
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None,
        refresh: Refresh,
        extra_args: dict[str, Any],
    ) -> tuple[optax.Updates, GaLoreState]:
        leaves, treedef = jax.tree.flatten(updates, is_leaf=is_projected_gradient)
        of_params = None if params is None else treedef.flatten_up_to(params)
        matrices = self._matrices(treedef.unflatten([_shape_of(leaf) for leaf in leaves]))
        projected = _coordinates(leaves, matrices)
        if projected and refresh is not False:
            check_not_due(refresh, state.count, self.update_proj_gap)
            refresh = False
        gradients = _as_matrices(
            leaves, {i: matrix for i, matrix in matrices.items() if i not in projected}
        )
        weights = {} if of_params is None else _as_matrices(of_params, matrices)
        stored = treedef.flatten_up_to(state.projector)
        kept = _checked(stored, matrices)
        shapes = treedef.unflatten(
            replaced(
                leaves,
                {
                    i: jax.ShapeDtypeStruct(m.low_shape, leaves[i].dtype)
                    for i, m in matrices.items()
                },
            )
        )
        optimizer = self._of_each_matrix(shapes, matrices)
        held = find_weights(optimizer.init, shapes, matrices)
        if held and of_params is None:
            raise ValueError("the optimizer keeps copies of the weights: update needs the params")
        # An optimizer that keeps copies of the weights trains V in W = W_outside + scale * P V.
        unit = self.scale if held else 1

        moments = {}
        if self.transport:
            moments = find_first_moments(state.inner_state, shapes, matrices)

        def new_basis(*arguments: Any, **more: Any) -> Projector:
            # No key is made, and no random number drawn, where the basis stays.
            key = jax.random.fold_in(jax.random.key(self.seed), state.count)
            return self.find_basis(*arguments, key=key, **more)

        kept, inner_state = refreshed_if(
            state.count % self.update_proj_gap == 0
            if refresh is None
            else is_only(refresh) or refresh,
            new_basis,
            kept,
            state.inner_state,
            gradients,
            {i: (w / unit).astype(w.dtype) for i, w in weights.items()} if held else {},
            matrices,
            held.copies,
            moments,
        )
        if is_only(refresh):
            bases = treedef.unflatten(replaced(stored, kept))
            return updates, GaLoreState(state.count, bases, inner_state)
        projectors = {i: dequantize_tree(projector) for i, projector in kept.items()}

        low_gradients = {**projected, **_low(gradients, projectors, matrices)}
        low_updates = treedef.unflatten(replaced(leaves, low_gradients))
        low_weights: Leaves = {}
        decay: list[jax.Array | None] = [None] * len(matrices)
        if of_params is None:
            inner_updates, inner_state = optimizer.update(
                low_updates, inner_state, None, **extra_args
            )
        else:
            low_weights = _low(weights, projectors, matrices)
            if held:
                low_weights = {i: (w / unit).astype(w.dtype) for i, w in low_weights.items()}
            low_params = treedef.unflatten(replaced(of_params, low_weights))
            if held.derived:
                first = optimizer.init(low_params)
                inner_state = _replaced_if(state.count == 0, held.derived, first, inner_state)
            inner_updates, decay, inner_state = update_and_decay(
                optimizer,
                low_updates,
                inner_state,
                low_params,
                tuple(matrices),
                extra_args,
                tuple(held.copies),
            )

        low = treedef.flatten_up_to(inner_updates)
        full = {}
        for (i, matrix), c in zip(matrices.items(), decay, strict=True):
            # The inner update holds c P^T W; the decay is to be c W, free of scale.
            step = low[i] if c is None else low[i] - c * low_weights[i]
            back = self.scale * projection.project_back(step, projectors[i], matrix.side)
            back = back if c is None else back + c * weights[i]
            full[i] = matrix.from_matrix(back.astype(low[i].dtype))
        new_state = GaLoreState(
            optax.safe_increment(state.count),
            treedef.unflatten(replaced(stored, kept)),
            inner_state,
        )
        return treedef.unflatten(replaced(low, full)), new_state

    def _matrices(self, tree: Any, *, must_match: bool = False) -> dict[int, Matrix]:
        # An update may be of a part of the tree that init saw.
        found = enumerate(self.find_matrices(tree, must_match=must_match))
        return {i: matrix for i, matrix in found if matrix is not None}

    def _of_each_matrix(
        self, tree: Any, matrices: Mapping[int, Matrix]
    ) -> optax.GradientTransformationExtraArgs:
        of_matrices = {i: matrix.stack_shape for i, matrix in matrices.items()}
        stacks = {**layer_stacks(tree, self.stacked_modules), **of_matrices}
        return per_matrix(self.optimizer, stacks)


def _empty_projector(
    leaf: Any, matrix: Matrix, dtype: jax.typing.DTypeLike, bits: Literal[8, 4] | None
) -> Projector:
    *batch, row, column = matrix.axes

    def zeros(shape: jax.ShapeDtypeStruct, *sides: int | None) -> Any:
        axes = (*batch, *sides)
        if bits is None:
            return zeros_beside(leaf, axes, shape.shape, dtype)
        return quantized_zeros(leaf, axes, shape.shape, "int8" if bits == 8 else "int4")

    shape = _projector_shape(matrix)
    if isinstance(shape, projection.TwoSided):
        return projection.TwoSided(zeros(shape.left, row, column), zeros(shape.right, column, row))
    return zeros(shape, *((row, column) if matrix.side == "left" else (column, row)))


def _projector_shape(matrix: Matrix) -> Any:
    return jax.eval_shape(
        lambda: projection.empty_projector(matrix.matrix_shape, matrix.rank, matrix.side, "float32")
    )


def _gradient_leaves(updates: optax.Updates) -> list[Any]:
    return jax.tree.leaves(updates, is_leaf=is_projected_gradient)


def _shape_of(gradient: Any) -> jax.ShapeDtypeStruct:
    """That of the full gradient."""
    if is_projected_gradient(gradient):
        return jax.ShapeDtypeStruct(gradient.shape, gradient.dtype)
    return jax.ShapeDtypeStruct(jnp.shape(gradient), jnp.result_type(gradient))


def _coordinates(leaves: Sequence[Any], matrices: Mapping[int, Matrix]) -> dict[int, jax.Array]:
    """Those of the gradients that come projected, which must be as these settings have them."""
    found = {i: leaf for i, leaf in enumerate(leaves) if is_projected_gradient(leaf)}
    for i, gradient in found.items():
        expected = (matrices[i].low_shape, matrices[i].side) if i in matrices else None
        if (jnp.shape(gradient.coordinates), gradient.side) != expected:
            raise ValueError(
                f"a gradient of shape {gradient.shape} comes projected on the side "
                f"{gradient.side!r} to {jnp.shape(gradient.coordinates)}, where these settings "
                f"have {expected or 'no projection'}"
            )
    return {i: gradient.coordinates for i, gradient in found.items()}


def _as_matrices(leaves: Sequence[Any], matrices: Mapping[int, Matrix]) -> dict[int, jax.Array]:
    return {i: matrix.to_matrix(leaves[i]) for i, matrix in matrices.items()}


def _low(leaves: Leaves, projectors: Projectors, matrices: Mapping[int, Matrix]) -> Leaves:
    return {
        i: projection.project(leaf, projectors[i], matrices[i].side) for i, leaf in leaves.items()
    }


def _replaced_if(
    condition: jax.Array, positions: Iterable[int], new: optax.OptState, old: optax.OptState
) -> optax.OptState:
    news, (olds, treedef) = jax.tree.leaves(new), jax.tree.flatten(old)
    return treedef.unflatten(
        replaced(olds, {i: where(condition, news[i], olds[i]) for i in positions})
    )


def _checked(stored: Sequence[Any], matrices: Mapping[int, Matrix]) -> Projectors:
    """The projectors of a state, which must be those of the matrices."""
    for i, projector in enumerate(stored):
        expected = optax.MaskedNode()
        if i in matrices:
            expected = _projector_shape(matrices[i])
        shapes = jax.tree.map(jnp.shape, projector, is_leaf=is_quantized)
        if shapes != jax.tree.map(jnp.shape, expected):
            raise ValueError(
                "the state was made with another rank, proj_type or choice of leaves: its "
                f"projector is {shapes} where these settings have "
                f"{jax.tree.map(jnp.shape, expected)}"
            )
    return {i: stored[i] for i in matrices}
