"""Projection of one matrix, or of a stack of matrices along leading axes; leaves as matrices.

A gradient ``G`` of shape (..., m, n) is projected onto orthonormal columns on one of its sides, or
on both (Zhao et al. 2024, arXiv:2403.03507, section 3 and Definition 3.4):

| side | projector | low-rank gradient R | brought back |
|---|---|---|---|
| left | P (..., m, r) | ``P^T G``, (..., r, n) | ``P R`` |
| right | P (..., n, r) | ``G P``, (..., m, r) | ``R P^T`` |
| both | P, Q: (m, r) and (n, r) | ``P^T G Q``, (..., r, r) | ``P R Q^T`` |
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp

from galore_jax.quantization import FirstMoment, Quantized, dequantize

ProjType = Literal["std", "reverse_std", "left", "right", "full"]
Side = Literal["left", "right", "both"]

PROJ_TYPES: tuple[ProjType, ...] = get_args(ProjType)


class TwoSided(NamedTuple):
    """The two projectors of ``proj_type="full"``.

    Attributes:
      left: P, (..., m, r).
      right: Q, (..., n, r).
    """

    left: Any
    right: Any


Projector = jax.Array | TwoSided


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["low_rank"], meta_fields=["shape", "side"]
)
@dataclasses.dataclass(frozen=True)
class ProjectedGradient:
    """A gradient of which only the low-rank projection R exists, a pytree of one array.

    ``galore_jax.galore`` takes it in place of the gradient of that shape. Sums and multiples
    of such gradients with the same projector are ``jax.tree.map`` away.

    Attributes:
      low_rank: R, (..., r, n), (..., m, r) or (..., r, r), by the side.
      shape: (..., m, n), the shape of the full gradient.
      side: the side that is projected.
    """

    low_rank: Any
    shape: tuple[int, ...]
    side: Side

    @property
    def dtype(self) -> Any:
        """The dtype of R."""
        return self.low_rank.dtype


def is_projected_gradient(node: Any) -> bool:
    """Tells whether a node of a tree is a ``ProjectedGradient``, for ``is_leaf``.

    >>> import jax.numpy as jnp
    >>> is_projected_gradient(ProjectedGradient(jnp.ones((2, 6)), (4, 6), "left"))
    True
    """
    return isinstance(node, ProjectedGradient)


def projected_side(shape: tuple[int, ...], proj_type: ProjType = "std") -> Side:
    """Finds the side of a matrix that a ``proj_type`` projects.

    ``std`` is the smaller side, as in the paper, and ``reverse_std`` the larger one. Flax kernels
    are (in, out) and torch weights (out, in). For a square matrix the reference
    (``galore_torch/galore_projector.py``) takes the *in* side with ``std``, which is the left one
    here; with ``reverse_std`` ``optax.contrib.galore`` takes the left one, and so do we.
    ``left`` and ``right`` are the sides of the matrix as it is stored.

    Args:
      shape: (..., m, n) of a kernel.
      proj_type: as in the reference.

    Returns:
      ``"left"``, ``"right"``, or ``"both"`` for ``full``.

    >>> projected_side((512, 1376)), projected_side((512, 512)), projected_side((8, 1376, 512))
    ('left', 'left', 'right')
    >>> projected_side((512, 1376), "reverse_std"), projected_side((512, 1376), "full")
    ('right', 'both')
    """
    m, n = shape[-2:]
    if proj_type == "std":
        return "left" if m <= n else "right"
    if proj_type == "reverse_std":
        return "left" if m >= n else "right"
    return "both" if proj_type == "full" else proj_type


def effective_rank(shape: tuple[int, ...], rank: int) -> int:
    """Computes ``min(rank, m, n)`` for a (..., m, n) matrix.

    >>> effective_rank((8, 64, 512), 128)
    64
    """
    return min(rank, *shape[-2:])


@dataclasses.dataclass(frozen=True)
class MatrixSpec:
    """How a leaf is a matrix, or a stack of matrices, and how that is projected.

    Attributes:
      shape: the leaf's shape.
      stack: the axes that index a stack.
      rows: the axes that make the rows m.
      columns: the axes that make the columns n.
      proj_type: how the side follows from the shape, see ``projected_side``.
      rank: the rank r of the projection; a smaller matrix takes ``min(m, n)``.

    >>> spec = MatrixSpec.of_kernel((8, 512, 1376), 128)
    >>> spec.side, spec.low_shape, spec.projector_shape
    ('left', (8, 128, 1376), (8, 512, 128))
    >>> spec = MatrixSpec.of_kernel((512, 1376), 128, "full")
    >>> spec.low_shape, spec.projector_shape
    ((128, 128), TwoSided(left=(512, 128), right=(1376, 128)))
    """

    shape: tuple[int, ...]
    stack: tuple[int, ...]
    rows: tuple[int, ...]
    columns: tuple[int, ...]
    proj_type: ProjType
    rank: int

    @classmethod
    def of_kernel(
        cls, shape: tuple[int, ...], rank: int, proj_type: ProjType = "std"
    ) -> "MatrixSpec":
        """The last two axes are m and n, as ``galore_jax.linear`` multiplies."""
        *stack, row, column = range(len(shape))
        return cls(shape, tuple(stack), (row,), (column,), proj_type, rank)

    @functools.cached_property
    def matrix_shape(self) -> tuple[int, ...]:
        """(*stack, m, n)."""
        m, n = (math.prod(self.shape[i] for i in axes) for axes in (self.rows, self.columns))
        return (*(self.shape[i] for i in self.stack), m, n)

    @functools.cached_property
    def side(self) -> Side:
        """The side that is projected."""
        return projected_side(self.matrix_shape, self.proj_type)

    @functools.cached_property
    def low_shape(self) -> tuple[int, ...]:
        """The shape of R: (*stack, r, n) for left, (*stack, m, r) for right, (*stack, r, r)."""
        *stack, m, n = self.matrix_shape
        r = effective_rank(self.matrix_shape, self.rank)
        return (*stack, *{"left": (r, n), "right": (m, r), "both": (r, r)}[self.side])

    @functools.cached_property
    def projector_shape(self) -> Any:
        """The shape of P: (*stack, m, r) for left, (*stack, n, r) for right, a ``TwoSided``."""
        *stack, m, n = self.matrix_shape
        r = effective_rank(self.matrix_shape, self.rank)
        both = TwoSided((*stack, m, r), (*stack, n, r))
        return {"left": both.left, "right": both.right, "both": both}[self.side]

    @property
    def axes(self) -> tuple[int | None, ...]:
        """The leaf's axis of each axis of the matrix; where several are joined, the outermost."""
        return (*self.stack, self.rows[0], self.columns[0])

    def to_matrix(self, leaf: jax.Array) -> jax.Array:
        """The leaf as (*stack, m, n)."""
        order = self.stack + self.rows + self.columns
        return jnp.transpose(leaf, order).reshape(self.matrix_shape)

    def from_matrix(self, matrix: jax.Array) -> jax.Array:
        """The leaf of a (*stack, m, n) matrix."""
        order = self.stack + self.rows + self.columns
        apart = matrix.reshape(tuple(map(self.shape.__getitem__, order)))
        return jnp.transpose(apart, sorted(range(len(order)), key=order.__getitem__))

    def to_low_rank(self, leaf: Any, projector: Projector) -> jax.Array:
        """Projects the leaf to R, of the shape ``low_shape``; takes R itself if it has that."""
        if is_projected_gradient(leaf):
            return leaf.low_rank
        return project(self.to_matrix(leaf), projector, self.side)

    def from_low_rank(self, low_rank: jax.Array, projector: Projector) -> jax.Array:
        """Brings R back to the leaf's shape."""
        return self.from_matrix(project_back(low_rank, projector, self.side))


def on_matrices(fn: Callable[..., Any], specs: Any, tree: Any, *rest: Any) -> Any:
    """Maps ``fn(spec, leaf, *rest)`` over the projected leaves of a tree; others stay.

    >>> on_matrices(lambda spec, x: x + spec, {"a": 1, "b": None}, {"a": 2, "b": 3})
    {'a': 3, 'b': 3}
    """
    pick = lambda x, spec, *more: x if spec is None else fn(spec, x, *more)  # noqa: E731
    return jax.tree.map(pick, tree, specs, *rest, is_leaf=is_projected_gradient)


def dense(tree: Any) -> Any:
    """Decodes the quantised arrays of a tree of projectors or moments.

    >>> import jax.numpy as jnp
    >>> dense(jnp.eye(2)).shape
    (2, 2)
    """
    is_codes = lambda node: isinstance(node, Quantized | FirstMoment)  # noqa: E731
    decode = lambda node: dequantize(node) if is_codes(node) else node  # noqa: E731
    return jax.tree.map(decode, tree, is_leaf=is_codes)


def project(matrix: jax.Array, projector: Projector, side: Side) -> jax.Array:
    """Projects a (..., m, n) matrix to R, in the matrix's dtype.

    >>> import jax.numpy as jnp
    >>> project(jnp.ones((4, 6)), jnp.eye(4, 2), "left").shape
    (2, 6)
    """
    left, right = projector if isinstance(projector, TwoSided) else (projector, projector)
    out = matrix if side == "right" else matmul(jnp.matrix_transpose(left), matrix)
    out = out if side == "left" else matmul(out, right)
    return out.astype(matrix.dtype)


def project_back(low_rank: jax.Array, projector: Projector, side: Side) -> jax.Array:
    """Brings R back to a (..., m, n) matrix, in the dtype of R.

    >>> import jax.numpy as jnp
    >>> project_back(jnp.ones((2, 6)), jnp.eye(4, 2), "left").shape
    (4, 6)
    """
    left, right = projector if isinstance(projector, TwoSided) else (projector, projector)
    out = low_rank if side == "right" else matmul(left, low_rank)
    out = out if side == "left" else matmul(out, jnp.matrix_transpose(right))
    return out.astype(low_rank.dtype)


def rotate(low_rank: jax.Array, old: Projector, new: Projector, side: Side) -> jax.Array:
    """Turns R from an old projector to a new one: ``(P_new^T P_old) R`` on the left.

    The part outside the new subspace is lost. Computed in float32 (float64 for float64).

    >>> import jax.numpy as jnp
    >>> rotate(jnp.array([[1.0], [2.0]]), jnp.eye(2), jnp.eye(2)[:, ::-1], "left").tolist()
    [[2.0], [1.0]]
    """

    def turn(new: jax.Array, old: jax.Array) -> jax.Array:
        return matmul(jnp.matrix_transpose(in_float32(new)), in_float32(old))

    return project_back(low_rank, jax.tree.map(turn, new, old), side)


def matmul(a: jax.Array, b: jax.Array) -> jax.Array:
    """Multiplies in full float32, on hardware whose default for float32 is less too (TPU, TF32).

    Orthonormality is what makes ``project_back`` the inverse of ``project`` on the subspace.

    >>> import jax.numpy as jnp
    >>> matmul(jnp.ones((2, 3)), jnp.ones((3, 1))).tolist()
    [[3.0], [3.0]]
    """
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def in_float32(array: jax.Array) -> jax.Array:
    """Converts an array to float32, or leaves it in float64.

    >>> import jax.numpy as jnp
    >>> in_float32(jnp.ones(3, jnp.bfloat16)).dtype
    dtype('float32')
    """
    array = jnp.asarray(array)
    return array.astype(jnp.promote_types(array.dtype, jnp.float32))


def scaled(gradient: jax.Array) -> jax.Array:
    """Scales a (..., m, n) gradient, in float32, to 1 as the largest magnitude of each matrix.

    Squares then neither vanish nor overflow.

    >>> import jax.numpy as jnp
    >>> scaled(jnp.array([[1e-30, -2e-30]])).round(2).tolist()
    [[0.5, -1.0]]
    """
    matrix = in_float32(gradient)
    largest = jnp.max(jnp.abs(matrix), axis=(-2, -1), keepdims=True)
    # XLA multiplies by the reciprocal, and flushes those of the largest floats to zero.
    shift = jnp.where(largest > 1, 2.0**-8, 1).astype(matrix.dtype)
    return (matrix * shift) / jnp.where(largest == 0, 1, largest * shift)


def norm_over(array: jax.Array, axes: tuple[int, ...] | None = None) -> jax.Array:
    """Computes norms over some axes, which stay with length 1; over all of them, a () norm.

    In float32 (float64 for float64), without squares that vanish or overflow.

    >>> import jax.numpy as jnp
    >>> f"{norm_over(jnp.array([3e-30, 4e-30])).item():.4g}"
    '5e-30'
    """
    array = jnp.abs(in_float32(array))
    keep = axes is not None
    largest = jnp.max(array, axis=axes, keepdims=True, initial=0)
    shares = array / jnp.where(largest == 0, 1, largest)
    squares = jnp.sum(shares * shares, axis=axes, keepdims=True)
    is_zero = squares == 0  # where a root has no derivative
    total = jnp.where(is_zero, 0, jnp.sqrt(jnp.where(is_zero, 1, squares))) * largest
    return total if keep else total.reshape(())
