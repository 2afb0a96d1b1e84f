"""The mathematics of GaLore on one matrix, or on a stack of matrices along leading axes.

A gradient ``G`` of shape (..., m, n) is projected onto an orthonormal basis ``P`` of one of its
sides (Zhao et al. 2024, arXiv:2403.03507, section 3 and Definition 3.4):

=======  ==============  ==========================  ===============
side     P               R, the projected gradient   brought back
=======  ==============  ==========================  ===============
left     (..., m, r)     ``P^T G``, (..., r, n)      ``P R``
right    (..., n, r)     ``G P``, (..., m, r)        ``R P^T``
=======  ==============  ==========================  ===============
"""

from typing import Literal

import jax
import jax.numpy as jnp

Side = Literal["left", "right"]

# Orthonormality is what makes project_back the inverse of project on the subspace: products with a
# basis are taken in full float32 on hardware whose default for float32 is less (TPU, TF32).
_PRECISION = jax.lax.Precision.HIGHEST


def std_side(shape: tuple[int, ...]) -> Side:
    """The side that ``proj_type="std"`` projects: the smaller one, as in the paper.

    Flax kernels are (in, out) and torch weights (out, in). For a square matrix the reference
    (``galore_torch/galore_projector.py``) takes the *in* side, which is the left one here.

    Args:
      shape: (..., m, n) of a kernel.

    Returns:
      ``"left"`` if m <= n, else ``"right"``.

    >>> std_side((512, 1376)), std_side((512, 512)), std_side((8, 1376, 512))
    ('left', 'left', 'right')
    """
    return "left" if shape[-2] <= shape[-1] else "right"


def effective_rank(shape: tuple[int, ...], rank: int) -> int:
    """``min(rank, m, n)`` for a (..., m, n) matrix.

    >>> effective_rank((8, 64, 512), 128)
    64
    """
    return min(rank, *shape[-2:])


def projector_shape(shape: tuple[int, ...], rank: int, side: Side) -> tuple[int, ...]:
    """Shape of the basis of a (..., m, n) matrix: (..., m, r) for left, (..., n, r) for right.

    >>> projector_shape((8, 512, 1376), 128, "left")
    (8, 512, 128)
    """
    rows = shape[-2] if side == "left" else shape[-1]
    return (*shape[:-2], rows, effective_rank(shape, rank))


def projected_shape(shape: tuple[int, ...], rank: int, side: Side) -> tuple[int, ...]:
    """Shape of the projected gradient: (..., r, n) for left, (..., m, r) for right.

    >>> projected_shape((8, 512, 1376), 128, "left")
    (8, 128, 1376)
    """
    r = effective_rank(shape, rank)
    return (*shape[:-2], r, shape[-1]) if side == "left" else (*shape[:-1], r)


def svd_basis(gradient: jax.Array, rank: int, side: Side) -> jax.Array:
    """The top singular vectors of a gradient, with a sign that does not depend on the solver.

    A singular vector's sign is arbitrary, but moments are carried over a change of basis, so it
    matters: in each vector the entry of largest magnitude is made positive.

    Args:
      gradient: (..., m, n), any float dtype; the decomposition is in float32 (float64 for float64).
      rank: number of vectors; more than ``min(m, n)`` gives ``min(m, n)``.
      side: which singular vectors.

    Returns:
      P of shape ``projector_shape(gradient.shape, rank, side)``, orthonormal columns by falling
      singular value, float32 (float64 for float64). NaN where the gradient is not finite.

    >>> import jax.numpy as jnp
    >>> svd_basis(jnp.diag(jnp.array([1.0, -3.0, 2.0])), rank=2, side="left").astype(int).tolist()
    [[0, 0], [1, 0], [0, 1]]
    """
    matrix = gradient.astype(jnp.promote_types(gradient.dtype, jnp.float32))
    u, _, vh = jnp.linalg.svd(matrix, full_matrices=False)
    basis = u if side == "left" else jnp.swapaxes(vh, -2, -1)
    return fix_signs(basis[..., :, : effective_rank(gradient.shape, rank)])


def fix_signs(basis: jax.Array) -> jax.Array:
    """Flip each column of a (..., k, r) basis so that its entry of largest magnitude is positive.

    >>> import jax.numpy as jnp
    >>> fix_signs(jnp.array([[0.6, 0.8], [-0.8, 0.6]])).tolist() == [[-0.6000000238418579,
    ...     0.800000011920929], [0.800000011920929, 0.6000000238418579]]
    True
    """
    largest = jnp.argmax(jnp.abs(basis), axis=-2, keepdims=True)
    return basis * jnp.where(jnp.take_along_axis(basis, largest, axis=-2) < 0, -1, 1)


def project(matrix: jax.Array, projector: jax.Array, side: Side) -> jax.Array:
    """Coordinates of a (..., m, n) matrix in the basis, in the matrix's dtype.

    >>> import jax.numpy as jnp
    >>> project(jnp.ones((4, 6)), jnp.eye(4, 2), "left").shape
    (2, 6)
    """
    basis = projector.astype(matrix.dtype)
    if side == "left":
        return jnp.matmul(jnp.swapaxes(basis, -2, -1), matrix, precision=_PRECISION)
    return jnp.matmul(matrix, basis, precision=_PRECISION)


def project_back(coordinates: jax.Array, projector: jax.Array, side: Side) -> jax.Array:
    """The (..., m, n) matrix of the given coordinates, in the coordinates' dtype.

    >>> import jax.numpy as jnp
    >>> project_back(jnp.ones((2, 6)), jnp.eye(4, 2), "left").shape
    (4, 6)
    """
    basis = projector.astype(coordinates.dtype)
    if side == "left":
        return jnp.matmul(basis, coordinates, precision=_PRECISION)
    return jnp.matmul(coordinates, jnp.swapaxes(basis, -2, -1), precision=_PRECISION)
