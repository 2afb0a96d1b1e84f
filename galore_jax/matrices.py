"""Where the matrices are in a tree of params, and how each is projected."""

import dataclasses
import math
import numbers
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from galore_jax.projection import (
    ProjType,
    Side,
    effective_rank,
    projected_shape,
    projected_side,
)
from galore_jax.selection import is_projected, leaf_path

Rank = int | Callable[[str, Any], int | None]


@dataclasses.dataclass(frozen=True)
class Matrix:
    """A leaf as a matrix, or as a stack of matrices.

    Attributes:
      shape: of the leaf.
      batch: its axes that index a stack.
      rows: its axes that make the rows m.
      columns: its axes that make the columns n.
      side: the side that is projected.
      rank: of the projection, at most m and n.
    """

    shape: tuple[int, ...]
    batch: tuple[int, ...]
    rows: tuple[int, ...]
    columns: tuple[int, ...]
    side: Side
    rank: int

    @property
    def stack_shape(self) -> tuple[int, ...]:
        """Sizes of the batch axes."""
        return tuple(self.shape[axis] for axis in self.batch)

    @property
    def matrix_shape(self) -> tuple[int, ...]:
        """(*stack_shape, m, n)."""
        return _matrix_shape(self.shape, self.batch, self.rows, self.columns)

    @property
    def axes(self) -> tuple[int | None, ...]:
        """For each axis of the matrix that of the leaf; None where several are joined."""
        joined = (axes[0] if len(axes) == 1 else None for axes in (self.rows, self.columns))
        return (*self.batch, *joined)

    @property
    def low_shape(self) -> tuple[int, ...]:
        """Shape of the coordinates."""
        return projected_shape(self.matrix_shape, self.rank, self.side)

    def to_matrix(self, leaf: jax.Array) -> jax.Array:
        """The leaf as (*stack_shape, m, n)."""
        order = self.batch + self.rows + self.columns
        return jnp.transpose(leaf, order).reshape(self.matrix_shape)

    def from_matrix(self, matrix: jax.Array) -> jax.Array:
        """The leaf of a (*stack_shape, m, n) matrix."""
        order = self.batch + self.rows + self.columns
        apart = matrix.reshape(tuple(self.shape[axis] for axis in order))
        return jnp.transpose(apart, sorted(range(len(order)), key=order.__getitem__))


def find_matrices(
    params: Any,
    *,
    rank: Rank,
    proj_type: ProjType = "std",
    target_modules: str | Sequence[str] | None = None,
    weight_dimension_numbers: Any = None,
    must_match: bool = True,
) -> list[Matrix | None]:
    """How each leaf is projected; None for a leaf that is not.

    Args:
      params: a tree of arrays, or of shapes.
      rank: an int, or a function of a selected leaf's path (``blocks/attn/q_proj/kernel``) and the
        leaf that gives an int, or None to leave it alone.
      proj_type: see :func:`galore_jax.projection.projected_side`.
      target_modules: see :func:`galore_jax.selection.is_projected`.
      weight_dimension_numbers: None (the last two axes), ``optax.contrib.GaLoreDimensionNumbers``
        for every leaf of two axes or more, a tree of them with the params' structure and None
        for leaves to be left alone, or a function of the params that returns such a tree.
        ``MuonDimensionNumbers`` will do too. Axes that are not named index a stack.
      must_match: see :func:`galore_jax.selection.is_projected`.

    Returns:
      One entry a leaf, in the order of ``jax.tree.leaves``.

    Raises:
      TypeError, ValueError: numbers or ranks that do not fit a leaf (its path is named).

    >>> import jax.numpy as jnp
    >>> params = {"bias": jnp.ones(6), "kernel": jnp.ones((4, 6))}
    >>> [matrix and matrix.side for matrix in find_matrices(params, rank=2)]
    [None, 'left']
    """
    paths_and_leaves, treedef = jax.tree_util.tree_flatten_with_path(params)
    if not paths_and_leaves:  # as optax.tree_utils.tree_map_params asks for a state's structure
        return []
    numbers_of = weight_dimension_numbers
    if callable(numbers_of):
        numbers_of = numbers_of(params)
    if numbers_of is None or _is_numbers(numbers_of):
        given = [numbers_of] * len(paths_and_leaves)
    else:
        given = _numbers_of_leaves(numbers_of, treedef)
    if numbers_of is not None and target_modules is None:
        selected = [jnp.ndim(x) >= 2 and 0 not in jnp.shape(x) for _, x in paths_and_leaves]
    else:
        selected = jax.tree.leaves(is_projected(params, target_modules, must_match=must_match))

    found: list[Matrix | None] = []
    for (key_path, leaf), numbers_here, wanted in zip(
        paths_and_leaves, given, selected, strict=True
    ):
        path = leaf_path(key_path)
        if not wanted or (numbers_of is not None and numbers_here is None):
            found.append(None)
            continue
        wanted_rank = _rank_of(rank, path, leaf)
        if wanted_rank is None:
            found.append(None)
            continue
        batch, rows, columns = _axes(numbers_here, path, jnp.ndim(leaf))
        shape = _matrix_shape(jnp.shape(leaf), batch, rows, columns)
        side = projected_side(shape, proj_type)
        found.append(
            Matrix(jnp.shape(leaf), batch, rows, columns, side, effective_rank(shape, wanted_rank))
        )
    return found


def check_rank(rank: Any, where: str = "") -> None:
    """Raises TypeError or ValueError unless ``rank`` is an int of at least 1."""
    traced = "; a rank sets shapes, so for optax.inject_hyperparams name it in static_args"
    check_int(f"rank{where}", rank, 1, hint=traced if isinstance(rank, jax.Array) else "")


def check_int(name: str, value: Any, least: int, *, hint: str = "") -> None:
    """Raises TypeError or ValueError unless ``value`` is an int of at least ``least``."""
    if not isinstance(value, numbers.Integral) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int of at least {least}, got {value!r}{hint}")
    if value < least:
        raise ValueError(f"{name} must be an int of at least {least}, got {value}")


def _rank_of(rank: Rank, path: str, leaf: Any) -> int | None:
    if not callable(rank):
        return rank
    of_leaf = rank(path, leaf)
    if of_leaf is not None:
        check_rank(of_leaf, f"({path!r}, leaf)")
    return of_leaf


def _is_numbers(value: Any) -> bool:
    return hasattr(value, "reduction_axis") and hasattr(value, "output_axis")


def _numbers_of_leaves(tree: Any, treedef: Any) -> list[Any]:
    try:
        given = treedef.flatten_up_to(tree)
    except (TypeError, ValueError) as error:
        raise ValueError(
            "weight_dimension_numbers must be GaLoreDimensionNumbers, or a tree of them (or None) "
            f"with the structure of the params: {error}"
        ) from error
    for value in given:
        if value is not None and not _is_numbers(value):
            raise TypeError(
                f"weight_dimension_numbers must hold GaLoreDimensionNumbers or None, got {value!r}"
            )
    return given


def _axes(value: Any, path: str, ndim: int) -> tuple[tuple[int, ...], ...]:
    """(batch axes, axes of the rows, axes of the columns)."""
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
    batch = tuple(axis for axis in range(ndim) if axis not in rows + columns)
    return batch, rows, columns


def _matrix_shape(
    shape: tuple[int, ...],
    batch: tuple[int, ...],
    rows: tuple[int, ...],
    columns: tuple[int, ...],
) -> tuple[int, ...]:
    sizes = lambda axes: [shape[axis] for axis in axes]  # noqa: E731
    return (*sizes(batch), math.prod(sizes(rows)), math.prod(sizes(columns)))
