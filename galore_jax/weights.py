"""Which leaves of a tree of params are projected, along which of their axes, at which rank."""

import dataclasses
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import DictKey, GetAttrKey

from galore_jax.errors import check_rank
from galore_jax.projection import (
    ProjType,
    Side,
    effective_rank,
    is_projected_gradient,
    project,
    projected_shape,
    projected_side,
    projector_shape,
)
from galore_jax.quantization import Quantized

Rank = int | Callable[[str, Any], int | None]
Patterns = str | Sequence[str]


@dataclasses.dataclass(frozen=True)
class MatrixSpec:
    """How a leaf is a matrix, or a stack of matrices, and how that is projected.

    Attributes:
      shape: the leaf's shape.
      stack: the axes that index a stack.
      rows: the axes that make the rows m.
      columns: the axes that make the columns n.
      side: the side that is projected.
      rank: the rank r of the projection, at most m and n.
    """

    shape: tuple[int, ...]
    stack: tuple[int, ...]
    rows: tuple[int, ...]
    columns: tuple[int, ...]
    side: Side
    rank: int

    @property
    def matrix_shape(self) -> tuple[int, ...]:
        """(*stack, m, n)."""
        return _matrix_shape(self.shape, self.stack, self.rows, self.columns)

    @property
    def low_shape(self) -> tuple[int, ...]:
        """The shape of the low-rank gradient R."""
        return projected_shape(self.matrix_shape, self.rank, self.side)

    @property
    def projector_shape(self) -> Any:
        """The shape of the projector, see ``galore_jax.projection.projector_shape``."""
        return projector_shape(self.matrix_shape, self.rank, self.side)

    @property
    def is_kernel(self) -> bool:
        """Whether the last two axes are m and n, as ``galore_jax.linear`` multiplies."""
        ndim = len(self.shape)
        return (self.rows, self.columns) == ((ndim - 2,), (ndim - 1,))

    @property
    def axes(self) -> tuple[int | None, ...]:
        """The leaf's axis of each axis of the matrix; where several are joined, the outermost."""
        return (*self.stack, self.rows[0], self.columns[0])

    def to_matrix(self, leaf: jax.Array) -> jax.Array:
        """The leaf as (*stack, m, n)."""
        return jnp.transpose(leaf, self._order).reshape(self.matrix_shape)

    def from_matrix(self, matrix: jax.Array) -> jax.Array:
        """The leaf of a (*stack, m, n) matrix."""
        order = self._order
        apart = matrix.reshape(tuple(self.shape[axis] for axis in order))
        return jnp.transpose(apart, sorted(range(len(order)), key=order.__getitem__))

    @property
    def _order(self) -> tuple[int, ...]:
        return self.stack + self.rows + self.columns


def on_matrices(fn: Callable[..., Any], specs: Any, tree: Any, *rest: Any) -> Any:
    """Maps ``fn(spec, leaf, *rest)`` over the projected leaves of a tree; others stay.

    >>> on_matrices(lambda spec, x: x + spec, {"a": 1, "b": None}, {"a": 2, "b": 3})
    {'a': 3, 'b': 3}
    """
    pick = lambda x, spec, *more: x if spec is None else fn(spec, x, *more)  # noqa: E731
    return jax.tree.map(pick, tree, specs, *rest, is_leaf=is_projected_gradient)


def low_rank_gradient(spec: MatrixSpec, leaf: Any, projector: Any) -> jax.Array:
    """Projects one leaf to R, of the shape ``spec.low_shape``; takes R itself if it has that."""
    is_low = is_projected_gradient(leaf)
    return leaf.low_rank if is_low else project(spec.to_matrix(leaf), projector, spec.side)


def check_fit(specs: Any, updates: Any, projectors: Any) -> None:
    """Raises if gradients or projectors are not as these settings have them."""

    def check(gradient: Any, spec: MatrixSpec | None, projector: Any) -> None:
        expected = optax.MaskedNode() if spec is None else spec.projector_shape
        found = jax.tree.map(jnp.shape, projector, is_leaf=lambda x: isinstance(x, Quantized))
        if found != expected:
            raise ValueError(
                "the state was made with another rank, proj_type or choice of leaves: its "
                f"projector is {found} where these settings have {expected}"
            )
        if not is_projected_gradient(gradient):
            return
        wanted = spec and (spec.low_shape, spec.side)
        found = (jnp.shape(gradient.low_rank), gradient.side)
        if spec is None or found != wanted:
            raise ValueError(
                f"a gradient of shape {gradient.shape} comes projected to {found}, where these "
                f"settings have {wanted or 'no projection'}"
            )
        if not spec.is_kernel:
            raise ValueError(
                f"a gradient of shape {gradient.shape} comes projected along its last two axes, "
                "and weight_dimension_numbers names others: leave it out of kernels=..."
            )

    jax.tree.map(check, updates, specs, projectors, is_leaf=is_projected_gradient)


def matrix_specs(
    params: Any,
    *,
    rank: Rank,
    proj_type: ProjType = "std",
    target_modules: Patterns | None = None,
    weight_dimension_numbers: Any = None,
    stacked_modules: Patterns | None = None,
    must_match: bool = True,
) -> Any:
    """Finds how each leaf is projected.

    Args:
      params: a tree of arrays or shapes; a ``ProjectedGradient`` stands for its full shape.
      rank: an int, or a function of a selected leaf's path (``blocks/attn/q_proj/kernel``) and the
        leaf that gives an int, or None to leave it alone.
      proj_type: see ``galore_jax.projection.projected_side``.
      target_modules, stacked_modules, must_match: see ``projection_mask``.
      weight_dimension_numbers: None (the last two axes), ``optax.contrib.GaLoreDimensionNumbers``
        for every leaf of two axes or more, a tree of them with the params' structure and None
        for leaves to be left alone, or a function of the params that returns such a tree.
        ``MuonDimensionNumbers`` will do too. Axes that are not named index a stack.

    Returns:
      A tree with the params' structure: a ``MatrixSpec``, or None where nothing is projected.

    Raises:
      TypeError, ValueError: numbers or ranks that do not fit a leaf (its path is named).

    >>> specs = matrix_specs({"bias": jnp.ones(6), "kernel": jnp.ones((4, 6))}, rank=2)
    >>> specs["bias"], specs["kernel"].side
    (None, 'left')
    """
    params = jax.tree.map(_full_shape, params, is_leaf=is_projected_gradient)
    leaves, treedef = jax.tree_util.tree_flatten_with_path(params)
    if not leaves:  # as optax.tree_utils.tree_map_params asks for a state's structure
        return params
    given = weight_dimension_numbers
    given = given(params) if callable(given) else given
    if given is None or _are_numbers(given):
        numbers_by_leaf = [given] * len(leaves)
    else:
        numbers_by_leaf = _numbers_by_leaf(given, treedef)
    mask = projection_mask(
        params,
        "" if given is not None and target_modules is None else target_modules,
        stacked_modules=stacked_modules,
        must_match=must_match and target_modules is not None,
    )
    is_stacked = path_filter(stacked_modules, "stacked_modules")

    def spec(path: str, leaf: Any, numbers_here: Any) -> MatrixSpec | None:
        wanted = rank(path, leaf) if callable(rank) else rank
        if wanted is None:
            return None
        if callable(rank):
            check_rank(wanted, f"({path!r}, leaf)")
        shape = tuple(leaf.shape)
        stack, rows, columns = _axes(numbers_here, path, len(shape))
        if is_stacked(path) and 0 not in stack:
            raise ValueError(f"{numbers_here} names the first axis of {path}, which indexes layers")
        matrix_shape = _matrix_shape(shape, stack, rows, columns)
        side = projected_side(matrix_shape, proj_type)
        return MatrixSpec(shape, stack, rows, columns, side, effective_rank(matrix_shape, wanted))

    return treedef.unflatten(
        [
            spec(leaf_path(path), leaf, numbers_here)
            if selected and (given is None or numbers_here is not None)
            else None
            for (path, leaf), numbers_here, selected in zip(
                leaves, numbers_by_leaf, jax.tree.leaves(mask), strict=True
            )
        ]
    )


def projection_mask(
    params: Any,
    target_modules: Patterns | None = None,
    *,
    stacked_modules: Patterns | None = None,
    must_match: bool = True,
) -> Any:
    """Finds which leaves are projected.

    Args:
      params: a tree of arrays or shapes.
      target_modules: a regular expression, or several, searched for in each leaf's path. A leaf
        that matches and has two axes or more is projected, its last two axes being the matrix and
        the leading ones a stack. None selects every leaf of exactly two axes. Integers and bools
        are never projected.
      stacked_modules: patterns of leaves whose first axis indexes layers, and is none of the two.
      must_match: whether patterns that select nothing are an error.

    Returns:
      A tree of bools with the params' structure: a mask as Optax takes it.

    Raises:
      TypeError, ValueError: patterns that are no strings, no regular expressions, or select
        nothing (paths are listed); a selected leaf of complex numbers.

    >>> params = {"embed": jnp.ones((8, 4)), "mlp": {"kernel": jnp.ones((2, 4, 6))}}
    >>> projection_mask(params), projection_mask(params, "mlp")
    ({'embed': True, 'mlp': {'kernel': False}}, {'embed': False, 'mlp': {'kernel': True}})
    """
    is_target = path_filter(target_modules)
    is_stacked = path_filter(stacked_modules, "stacked_modules")

    def selected(key_path: tuple[Any, ...], leaf: Any) -> bool:
        path, shape = leaf_path(key_path), getattr(leaf, "shape", ())
        ndim = len(shape) - is_stacked(path)
        wanted = ndim == 2 if target_modules is None else ndim >= 2 and is_target(path)
        if not wanted or 0 in shape:
            return False
        dtype = jnp.result_type(leaf.dtype)
        if jnp.issubdtype(dtype, jnp.complexfloating):
            raise ValueError(f"{path} is {dtype}: GaLore projects real matrices; leave it out")
        return jnp.issubdtype(dtype, jnp.floating)

    mask = jax.tree_util.tree_map_with_path(selected, params)
    paths = [leaf_path(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    if must_match and target_modules is not None and paths and not any(jax.tree.leaves(mask)):
        raise ValueError(
            f"target_modules={target_modules!r} matches no leaf of two axes or more; paths are "
            + ", ".join(paths[:5] + ["..."] * (len(paths) > 5))
        )
    return mask


def leaf_path(key_path: tuple[Any, ...]) -> str:
    """Joins a leaf's keys by ``/``, without the ``.value`` that Flax NNX puts behind them.

    >>> leaf_path((DictKey("mlp"), DictKey("kernel"), GetAttrKey("value")))
    'mlp/kernel'
    """
    if key_path[-1:] == (GetAttrKey("value"),) and isinstance(key_path[-2:][0], DictKey):
        key_path = key_path[:-1]
    return jax.tree_util.keystr(key_path, simple=True, separator="/")


def path_filter(patterns: Patterns | None, name: str = "target_modules") -> Callable[[str], bool]:
    """Compiles regular expressions into a predicate on paths; None matches no path.

    Raises:
      TypeError, ValueError: see ``projection_mask``.

    >>> path_filter(["attn", "mlp"])("blocks/mlp/kernel")
    True
    """
    if patterns is None:
        return lambda path: False
    several = [patterns] if isinstance(patterns, str) else patterns
    if not isinstance(several, Sequence) or not all(isinstance(p, str) for p in several):
        raise TypeError(
            f"{name} must be a regular expression, a sequence of them or None, got {patterns!r}"
        )
    try:
        compiled = [re.compile(pattern) for pattern in several]
    except re.error as error:
        raise ValueError(f"{name}={patterns!r} is no regular expression: {error}") from error
    return lambda path: any(pattern.search(path) for pattern in compiled)


def _full_shape(leaf: Any) -> Any:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) if is_projected_gradient(leaf) else leaf


def _are_numbers(value: Any) -> bool:
    return hasattr(value, "reduction_axis") and hasattr(value, "output_axis")


def _numbers_by_leaf(tree: Any, treedef: Any) -> list[Any]:
    try:
        given = treedef.flatten_up_to(tree)
    except (TypeError, ValueError) as error:
        raise ValueError(
            "weight_dimension_numbers must be GaLoreDimensionNumbers, or a tree of them (or None) "
            f"with the structure of the params: {error}"
        ) from error
    for value in given:
        if value is not None and not _are_numbers(value):
            raise TypeError(
                f"weight_dimension_numbers must hold GaLoreDimensionNumbers or None, got {value!r}"
            )
    return given


def _axes(value: Any, path: str, ndim: int) -> tuple[tuple[int, ...], ...]:
    """The axes of (the stack, the rows, the columns)."""
    if value is None:
        return tuple(range(ndim - 2)), (ndim - 2,), (ndim - 1,)
    named = [
        (axes,) if isinstance(axes, int) else tuple(axes)
        for axes in (value.reduction_axis, value.output_axis)
    ]
    if not all(named) or not all(-ndim <= axis < ndim for axes in named for axis in axes):
        raise ValueError(f"{value} does not fit the {ndim} axes of {path}")
    rows, columns = (tuple(axis % ndim for axis in axes) for axes in named)
    if len({*rows, *columns}) != len(rows) + len(columns):
        raise ValueError(f"{value} names an axis of {path} twice")
    stack = tuple(axis for axis in range(ndim) if axis not in rows + columns)
    return stack, rows, columns


def _matrix_shape(
    shape: tuple[int, ...],
    stack: tuple[int, ...],
    rows: tuple[int, ...],
    columns: tuple[int, ...],
) -> tuple[int, ...]:
    size = lambda axes: math.prod(shape[axis] for axis in axes)  # noqa: E731
    return (*(shape[axis] for axis in stack), size(rows), size(columns))
