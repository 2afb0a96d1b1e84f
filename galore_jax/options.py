"""The options of ``galore_jax.galore``, checked."""

import dataclasses
import difflib
import math
import numbers
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypedDict

import jax
import jax.numpy as jnp
import optax

from galore_jax.errors import check_int, check_rank
from galore_jax.projection import PROJ_TYPES, MatrixSpec, ProjType, TwoSided
from galore_jax.projectors import PROJECTOR_METHODS, ProjectorMethod
from galore_jax.quantization import quantized_zeros
from galore_jax.recovery import RECOVERIES, Recovery
from galore_jax.sharding import zeros_beside
from galore_jax.weights import (
    DEFAULT_RANK,
    Patterns,
    Rank,
    check_rank_patterns,
    leaf_path,
    matrix_specs,
    path_filter,
    projection_mask,
    rank_by_pattern,
)


class GaLoreOptions(TypedDict, total=False):
    """Keyword arguments that the aliases pass on to ``galore_jax.galore``, which says more.

    Attributes:
      update_proj_gap: updates between two refreshes; 200.
      scale: factor on the updates of projected leaves; 0.25.
      proj_type: ``"std"``, ``"reverse_std"``, ``"left"``, ``"right"`` or ``"full"``; ``"std"``.
      target_modules: regular expressions on the paths of the leaves to project; every matrix.
      weight_dimension_numbers: which axes of a leaf are its matrix; the last two.
      stacked_modules: regular expressions on the paths of leaves stacked by layer; none.
      projector: ``"svd"``, ``"eigh"``, ``"subspace_iteration"``, ``"randomized"`` or ``"random"``;
        ``"svd"``.
      power_iterations: rounds of the iterated methods at a refresh; 2.
      rotate_moments: whether first moments turn with the projector; False.
      projector_dtype: dtype of the stored projectors; each leaf's.
      projector_bits: 8 or 4 to store projectors as integers; None.
      seed: seed of the projectors' random parts; 0.
      recovery: ``"column"`` or ``"matrix"`` to add what is outside the subspace; None.
      lazy_refresh: the overlap of two bases from which on the next refresh waits longer; None.
    """

    update_proj_gap: int
    scale: float
    proj_type: ProjType
    target_modules: Patterns | None
    weight_dimension_numbers: Any
    stacked_modules: Patterns | None
    projector: ProjectorMethod
    power_iterations: int
    rotate_moments: bool
    projector_dtype: jax.typing.DTypeLike | None
    projector_bits: Literal[8, 4] | None
    seed: int
    recovery: Recovery | None
    lazy_refresh: float | None


@dataclasses.dataclass(frozen=True)
class CheckedOptions:
    """All options of a ``galore``; ``galore_jax.galore`` says what each means.

    Raises:
      TypeError, ValueError: an option of the wrong type, or out of its range.
    """

    rank: Rank = DEFAULT_RANK
    update_proj_gap: Any = 200
    scale: Any = 0.25
    proj_type: ProjType = "std"
    target_modules: Patterns | None = None
    weight_dimension_numbers: Any = None
    stacked_modules: Patterns | None = None
    projector: ProjectorMethod = "svd"
    power_iterations: Any = 2
    rotate_moments: bool = False
    projector_dtype: Any = None
    projector_bits: Literal[8, 4] | None = None
    seed: Any = 0
    recovery: Recovery | None = None
    lazy_refresh: float | None = None

    def __post_init__(self):
        if isinstance(self.rank, Mapping):
            object.__setattr__(self, "rank", dict(self.rank))  # the caller's may change
            rank_by_pattern(self.rank)
        elif not callable(self.rank):
            check_rank(self.rank)
        for name, least in (("update_proj_gap", 1), ("power_iterations", 1), ("seed", 0)):
            value = getattr(self, name)
            if not isinstance(value, jax.Array):  # as optax.inject_hyperparams passes it
                check_int(name, value, least)
        if not isinstance(self.scale, jax.Array):
            _check_scale(self.scale)
        if not isinstance(self.rotate_moments, bool):
            raise TypeError(f"rotate_moments must be a bool, got {self.rotate_moments!r}")
        _check_choice("proj_type", self.proj_type, PROJ_TYPES)
        _check_choice("projector", self.projector, PROJECTOR_METHODS)
        if self.lazy_refresh is not None:
            _check_share("lazy_refresh", self.lazy_refresh)
        if self.recovery is not None:
            _check_choice("recovery", self.recovery, RECOVERIES)
        path_filter(self.target_modules)
        path_filter(self.stacked_modules, "stacked_modules")
        bits, dtype = self.projector_bits, self.projector_dtype
        if bits is not None and (bits not in (8, 4) or isinstance(bits, bool | float)):
            raise ValueError(f"projector_bits must be 8, 4 or None, got {bits!r}")
        if dtype is not None:
            _check_dtype(dtype)
            if bits is not None:
                raise ValueError(
                    f"projector_bits={bits} and projector_dtype={dtype} exclude each other: "
                    "give one"
                )

    def specs(self, tree: Any, rank: Rank | None = None) -> Any:
        """Finds how each leaf of a tree is projected, see ``galore_jax.weights.matrix_specs``."""
        return matrix_specs(
            tree,
            rank=self.rank if rank is None else rank,
            proj_type=self.proj_type,
            target_modules=self.target_modules,
            weight_dimension_numbers=self.weight_dimension_numbers,
            stacked_modules=self.stacked_modules,
        )

    def check_patterns(self, params: Any, specs: Any) -> None:
        """Raises a ValueError for ``target_modules`` or a pattern of ``rank`` that select nothing.

        Args:
          params: a tree of all weights, arrays or shapes.
          specs: how each is projected.
        """
        if not jax.tree.leaves(specs):
            projection_mask(params, self.target_modules, stacked_modules=self.stacked_modules)
        if isinstance(self.rank, Mapping):  # which may leave leaves alone
            selected = jax.tree_util.tree_leaves_with_path(self.specs(params, rank=1))
            if selected:
                check_rank_patterns(self.rank, [leaf_path(path) for path, _ in selected])

    def no_projector(self, leaf: Any, spec: MatrixSpec | None) -> Any:
        """Makes zeros, stored and sharded as a leaf's projector will be."""
        if spec is None:
            return optax.MaskedNode()
        *stack, row, column = spec.axes

        def zeros(shape: tuple[int, ...], *sides: int | None) -> Any:
            axes = (*stack, *sides)
            if self.projector_bits is not None:
                encoding = "int8" if self.projector_bits == 8 else "int4"
                return quantized_zeros(leaf, axes, shape, encoding)
            return zeros_beside(leaf, axes, shape, self.projector_dtype or leaf.dtype)

        shape = spec.projector_shape
        if isinstance(shape, TwoSided):
            return TwoSided(zeros(shape.left, row, column), zeros(shape.right, column, row))
        return zeros(shape, *((row, column) if spec.side == "left" else (column, row)))


def _check_scale(scale: Any) -> None:
    allowed = f"scale must be a number greater than 0, got {scale!r}"
    if not isinstance(scale, numbers.Real) or isinstance(scale, bool):
        raise TypeError(allowed)
    if not 0 < float(scale) < math.inf:
        raise ValueError(allowed)


def _check_share(name: str, value: Any) -> None:
    allowed = f"{name} must be a number from 0 to 1, or None, got {value!r}"
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise TypeError(allowed)
    if not 0 <= float(value) <= 1:
        raise ValueError(allowed)


def _check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
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
