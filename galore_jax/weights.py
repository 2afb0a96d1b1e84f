"""Which leaves of a tree of params are projected, along which of their axes, at which rank."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import DictKey, GetAttrKey

from galore_jax.errors import check_rank
from galore_jax.projection import MatrixSpec, ProjType, is_projected_gradient

Rank = int | Mapping[str, int | None] | Callable[[str, Any], int | None]
Patterns = str | Sequence[str]
DEFAULT_RANK = 128


def matrix_specs(
    params: Any,
    *,
    rank: Rank,
    proj_type: ProjType = "std",
    target_modules: Patterns | None = None,
    weight_dimension_numbers: Any = None,
    stacked_modules: Patterns | None = None,
) -> Any:
    """Finds how each leaf is projected.

    Args:
      params: a tree of arrays or shapes; a ``ProjectedGradient`` stands for its full shape.
      rank: an int; a table of ranks by regular expressions, see ``rank_by_pattern``; or a function
        of a selected leaf's path (``blocks/attn/q_proj/kernel``) and the leaf that gives an int, or
        None to leave it alone.
      proj_type: see ``galore_jax.projection.projected_side``.
      target_modules, stacked_modules: see ``projection_mask``; they may select nothing.
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
    is_one = given is None or _are_numbers(given)
    numbers_by_leaf = [given] * len(leaves) if is_one else _numbers_by_leaf(given, treedef)
    mask = projection_mask(
        params,
        "" if given is not None and target_modules is None else target_modules,
        stacked_modules=stacked_modules,
        must_match=False,
    )
    is_stacked = path_filter(stacked_modules, "stacked_modules")
    if isinstance(rank, Mapping):
        rank = rank_by_pattern(rank)
    specs: list[MatrixSpec | None] = [None] * len(leaves)
    for i, selected in enumerate(jax.tree.leaves(mask)):
        (key_path, leaf), numbers = leaves[i], numbers_by_leaf[i]
        if not selected or (numbers is None and given is not None):
            continue
        path = leaf_path(key_path)
        wanted: Any = rank(path, leaf) if callable(rank) else rank
        if wanted is None:
            continue
        if callable(rank):
            check_rank(wanted, f"({path!r}, leaf)")
        stack, rows, columns = _axes(numbers, path, len(leaf.shape))
        if is_stacked(path) and 0 not in stack:
            raise ValueError(f"{numbers} names the first axis of {path}, which indexes layers")
        specs[i] = MatrixSpec(tuple(leaf.shape), stack, rows, columns, proj_type, wanted)
    return treedef.unflatten(specs)


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


def rank_by_pattern(table: Mapping[str, int | None]) -> Callable[[str, Any], int | None]:
    """Makes a function of a leaf's path and the leaf of a table of ranks.

    Args:
      table: ranks by regular expressions that are searched for in a leaf's path. The first that
        matches counts. Where none does, the rank is 128; give ``""``, which matches every path,
        as the last one for another. None leaves a leaf alone.

    Raises:
      TypeError, ValueError: no table of regular expressions and ranks.

    >>> rank = rank_by_pattern({"q_proj|k_proj": 32, "": 64})
    >>> rank("attn/q_proj/kernel", None), rank("attn/v_proj/kernel", None)
    (32, 64)
    """
    if not table:
        raise ValueError("rank={} has no pattern; give a number, or ranks by patterns")
    for pattern, rank in table.items():
        if not isinstance(pattern, str):
            raise TypeError(f"rank: patterns must be regular expressions, got {pattern!r}")
        path_filter(pattern, "rank")
        if rank is not None:
            check_rank(rank, f"[{pattern!r}]")
    compiled = {pattern: re.compile(pattern) for pattern in table}

    def of_leaf(path: str, leaf: Any) -> int | None:
        del leaf
        first = next((p for p in table if compiled[p].search(path)), None)
        return DEFAULT_RANK if first is None else table[first]

    return of_leaf


def check_rank_patterns(table: Mapping[str, Any], paths: Sequence[str]) -> None:
    """Raises a ValueError for a pattern of a rank table that decides on no leaf.

    Args:
      table: ranks by patterns.
      paths: of the leaves that are selected.
    """
    first = {next((p for p in table if re.search(p, path)), None) for path in paths}
    for pattern in table:
        if pattern not in first:
            left = (
                " that those before it leave" if any(re.search(pattern, x) for x in paths) else ""
            )
            raise ValueError(
                f"rank: the pattern {pattern!r} matches no projected leaf{left}; their paths are "
                + ", ".join([*paths[:7], *["..."] * (len(paths) > 7)])
            )


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
