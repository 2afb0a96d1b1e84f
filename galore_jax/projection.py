"""Projection of one matrix, or of a stack of matrices along leading axes, onto a basis.

A gradient ``G`` of shape (..., m, n) is projected onto an orthonormal basis of one of its sides, or
of both (Zhao et al. 2024, arXiv:2403.03507, section 3 and Definition 3.4):

=======  ========================  ==============================  ===============
side     basis                     coordinates R                   brought back
=======  ========================  ==============================  ===============
left     P (..., m, r)             ``P^T G``, (..., r, n)          ``P R``
right    P (..., n, r)             ``G P``, (..., m, r)            ``R P^T``
both     P, Q: (m, r) and (n, r)   ``P^T G Q``, (..., r, r)        ``P R Q^T``
=======  ========================  ==============================  ===============
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp

ProjType = Literal["std", "reverse_std", "left", "right", "full"]
Side = Literal["left", "right", "both"]

PROJ_TYPES: tuple[ProjType, ...] = get_args(ProjType)


class TwoSided(NamedTuple):
    """The two bases of ``proj_type="full"``.

    Attributes:
      left: P, (..., m, r).
      right: Q, (..., n, r).
    """

    left: Any
    right: Any


Projector = jax.Array | TwoSided


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["coordinates"], meta_fields=["shape", "side"]
)
@dataclasses.dataclass(frozen=True)
class ProjectedGradient:
    """A gradient of which only the coordinates in a basis exist, a pytree of one array.

    :func:`galore_jax.galore` takes it in place of the gradient of that shape. Sums and multiples
    of such gradients in the same basis are ``jax.tree.map`` away.

    Attributes:
      coordinates: (..., r, n), (..., m, r) or (..., r, r), by the side.
      shape: (..., m, n), that of the gradient it stands for.
      side: the side that is projected.
    """

    coordinates: Any
    shape: tuple[int, ...]
    side: Side

    @property
    def dtype(self) -> Any:
        """That of the coordinates."""
        return self.coordinates.dtype


def is_projected_gradient(node: Any) -> bool:
    """Whether a node of a tree is one, for ``is_leaf``.

    >>> import jax.numpy as jnp
    >>> is_projected_gradient(ProjectedGradient(jnp.ones((2, 6)), (4, 6), "left"))
    True
    """
    return isinstance(node, ProjectedGradient)


def projected_side(shape: tuple[int, ...], proj_type: ProjType = "std") -> Side:
    """The side of a matrix that a ``proj_type`` projects.

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
    """``min(rank, m, n)`` for a (..., m, n) matrix.

    >>> effective_rank((8, 64, 512), 128)
    64
    """
    return min(rank, *shape[-2:])


def projected_shape(shape: tuple[int, ...], rank: int, side: Side) -> tuple[int, ...]:
    """Shape of the coordinates: (..., r, n) for left, (..., m, r) for right, (..., r, r) for both.

    >>> projected_shape((8, 512, 1376), 128, "left"), projected_shape((512, 1376), 128, "both")
    ((8, 128, 1376), (128, 128))
    """
    r, (m, n) = effective_rank(shape, rank), shape[-2:]
    rows, columns = {"left": (r, n), "right": (m, r), "both": (r, r)}[side]
    return (*shape[:-2], rows, columns)


def empty_projector(
    shape: tuple[int, ...], rank: int, side: Side, dtype: jax.typing.DTypeLike
) -> Projector:
    """A projector of zeros: (..., m, r) for left, (..., n, r) for right, the two for both.

    >>> empty_projector((8, 512, 1376), 128, "left", "float32").shape
    (8, 512, 128)
    """
    r = effective_rank(shape, rank)
    left, right = ((*shape[:-2], rows, r) for rows in shape[-2:])
    if side == "both":
        return TwoSided(jnp.zeros(left, dtype), jnp.zeros(right, dtype))
    return jnp.zeros(left if side == "left" else right, dtype)


def project(matrix: jax.Array, projector: Projector, side: Side) -> jax.Array:
    """Coordinates of a (..., m, n) matrix in the basis, in the matrix's dtype.

    >>> import jax.numpy as jnp
    >>> project(jnp.ones((4, 6)), jnp.eye(4, 2), "left").shape
    (2, 6)
    """
    return _on_each_side(matrix, projector, side, lambda basis: jnp.swapaxes(basis, -2, -1))


def project_back(coordinates: jax.Array, projector: Projector, side: Side) -> jax.Array:
    """The (..., m, n) matrix of the given coordinates, in the coordinates' dtype.

    >>> import jax.numpy as jnp
    >>> project_back(jnp.ones((2, 6)), jnp.eye(4, 2), "left").shape
    (4, 6)
    """
    return _on_each_side(coordinates, projector, side, lambda basis: basis)


def transport(coordinates: jax.Array, old: Projector, new: Projector, side: Side) -> jax.Array:
    """Coordinates in a new basis of what has the given ones in the old: ``(P_new^T P_old) R``.

    What lies outside the new subspace is lost. Computed in float32 (float64 for float64).

    >>> import jax.numpy as jnp
    >>> transport(jnp.array([[1.0], [2.0]]), jnp.eye(2), jnp.eye(2)[:, ::-1], "left").tolist()
    [[2.0], [1.0]]
    """

    def turn(new_basis: jax.Array, old_basis: jax.Array) -> jax.Array:
        return matmul(jnp.swapaxes(in_float32(new_basis), -2, -1), in_float32(old_basis))

    return _on_each_side(coordinates, jax.tree.map(turn, new, old), side, lambda basis: basis)


def matmul(a: jax.Array, b: jax.Array) -> jax.Array:
    """The product in full float32, on hardware whose default for float32 is less too (TPU, TF32).

    Orthonormality is what makes ``project_back`` the inverse of ``project`` on the subspace.

    >>> import jax.numpy as jnp
    >>> matmul(jnp.ones((2, 3)), jnp.ones((3, 1))).tolist()
    [[3.0], [3.0]]
    """
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def in_float32(array: jax.Array) -> jax.Array:
    """The array in float32, or in float64 if it is that.

    >>> import jax.numpy as jnp
    >>> in_float32(jnp.ones(3, jnp.bfloat16)).dtype
    dtype('float32')
    """
    array = jnp.asarray(array)
    return array.astype(jnp.promote_types(array.dtype, jnp.float32))


def scaled(gradient: jax.Array) -> jax.Array:
    """A (..., m, n) gradient in float32 with 1 as the largest magnitude of each matrix.

    Squares then neither vanish nor overflow.

    >>> import jax.numpy as jnp
    >>> scaled(jnp.array([[1e-30, -2e-30]])).round(2).tolist()
    [[0.5, -1.0]]
    """
    matrix = in_float32(gradient)
    largest = jnp.max(jnp.abs(matrix), axis=(-2, -1), keepdims=True)
    return matrix / jnp.where(largest == 0, 1, largest)


def _on_each_side(
    matrix: jax.Array,
    projector: Projector,
    side: Side,
    orient: Callable[[jax.Array], jax.Array],
) -> jax.Array:
    """``A X`` on the left, ``X A^T`` on the right, with A the oriented basis of that side."""
    out = matrix
    left = projector.left if isinstance(projector, TwoSided) else projector
    right = projector.right if isinstance(projector, TwoSided) else projector
    if side != "right":
        out = matmul(orient(left), out)
    if side != "left":
        out = matmul(out, jnp.swapaxes(orient(right), -2, -1))
    return out.astype(matrix.dtype)
