"""Projectors of gradients: exact, iterated, randomized, random.

Each method takes a gradient of shape (..., m, n), any leading axes being a stack, computes in
float32 (float64 for float64) and returns orthonormal columns in that dtype: (..., m, r) for the
left side, (..., n, r) for the right one, and a ``TwoSided`` of the two for both; r is
``min(rank, m, n)``.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp

from galore_jax.projection import (
    Projector,
    Side,
    TwoSided,
    effective_rank,
    in_float32,
    matmul,
    scaled,
)

ProjectorMethod = Literal["svd", "eigh", "subspace_iteration", "randomized", "random"]
PROJECTOR_METHODS: tuple[ProjectorMethod, ...] = get_args(ProjectorMethod)

_OVERSAMPLING = 8  # Halko et al. 2011 suggest 5 or 10
_NOISE = 0.01  # norm of the random part of each column that subspace iteration starts from


def find_projector(
    method: ProjectorMethod,
    gradient: jax.Array,
    rank: int,
    side: Side,
    *,
    old: Projector,
    key: jax.Array,
    power_iterations: jax.typing.ArrayLike = 2,
) -> Projector:
    """Computes a projector by the method of that name; docs/refresh.md has the cost of each.

    Args:
      method: ``"svd"``, ``"eigh"``, ``"subspace_iteration"``, ``"randomized"`` or ``"random"``.
      gradient: (..., m, n), finite.
      rank: number of vectors; more than ``min(m, n)`` gives ``min(m, n)``.
      side: ``"left"``, ``"right"`` or ``"both"``.
      old: the projector so far, zeros if there is none; only subspace iteration reads it.
      key: for the random parts. All matrices of a stack share them.
      power_iterations: rounds of subspace iteration or of the randomized projector, at least 1.

    >>> import jax, jax.numpy as jnp
    >>> g, old, key = jnp.diag(jnp.array([1.0, -3.0, 2.0])), jnp.zeros((3, 1)), jax.random.key(0)
    >>> find_projector("svd", g, 1, "left", old=old, key=key).round().tolist()
    [[0.0], [1.0], [0.0]]
    """
    if method == "svd":
        return svd_projector(gradient, rank, side)
    if method == "eigh":
        return eigh_projector(gradient, rank, side)
    if method == "subspace_iteration":
        return subspace_iteration(gradient, old, key, side, power_iterations)
    if method == "randomized":
        return randomized_projector(gradient, rank, key, side, power_iterations)
    return random_projector(gradient, rank, key, side)


def svd_projector(gradient: jax.Array, rank: int, side: Side) -> Projector:
    """Takes the top singular vectors by falling value (Zhao et al. 2024, Algorithm 2).

    A singular vector's sign is arbitrary, but moments are carried over a refresh, so it matters: in
    each vector the entry of largest magnitude is made positive.

    >>> import jax.numpy as jnp
    >>> svd_projector(jnp.diag(jnp.array([1.0, -3.0, 2.0])), 2, "left").astype(int).tolist()
    [[0, 0], [1, 0], [0, 1]]
    """
    r = effective_rank(gradient.shape, rank)
    u, _, vh = each_matrix(_svd, in_float32(gradient))
    left, right = u[..., :, :r], jnp.swapaxes(vh, -2, -1)[..., :, :r]
    if side == "both":
        return TwoSided(fix_signs(left), fix_signs(right))
    return fix_signs(left if side == "left" else right)


def eigh_projector(gradient: jax.Array, rank: int, side: Side) -> Projector:
    """Takes the same vectors, as eigenvectors of the smaller side's Gram matrix.

    Singular values are squared on the way: vectors of singular values below about 3e-4 of the
    largest are noise in float32.

    >>> import jax.numpy as jnp
    >>> eigh_projector(jnp.diag(jnp.array([1.0, -3.0, 2.0])), 1, "left").round().tolist()
    [[0.0], [1.0], [0.0]]
    """
    r = effective_rank(gradient.shape, rank)
    matrix = scaled(gradient)
    smaller: Side = "left" if matrix.shape[-2] <= matrix.shape[-1] else "right"
    if smaller == "right":
        matrix = jnp.swapaxes(matrix, -2, -1)
    small = fix_signs(_top_eigenvectors(matrix, r))
    if side == smaller:
        return small
    large = fix_signs(orthonormalized(matmul(jnp.swapaxes(matrix, -2, -1), small)))
    if side != "both":
        return large
    return TwoSided(small, large) if smaller == "left" else TwoSided(large, small)


def subspace_iteration(
    gradient: jax.Array,
    old: Projector,
    key: jax.Array,
    side: Side,
    rounds: jax.typing.ArrayLike = 2,
) -> Projector:
    """Iterates ``P <- orth(G (G^T P))`` from the projector so far (Halko et al. 2011, Alg. 4.4).

    Columns move continuously with the gradient: there is no fixed order or sign but that of the
    QR decomposition with a positive diagonal. A little noise on the start finds directions to
    which the old one is orthogonal; from none at all (zeros) it is a randomized range finder.
    With both sides, ``Q = orth(G^T P)``.

    >>> import jax, jax.numpy as jnp
    >>> g = jnp.diag(jnp.array([1.0, -30.0, 2.0]))
    >>> subspace_iteration(g, jnp.eye(3, 1), jax.random.key(0), "left").round().astype(int).tolist()
    [[0], [1], [0]]
    """
    matrix = scaled(gradient)
    start = old.left if isinstance(old, TwoSided) else old
    if side == "right":
        matrix = jnp.swapaxes(matrix, -2, -1)
    transposed = jnp.swapaxes(matrix, -2, -1)
    k, r = start.shape[-2:]
    found = start.astype(matrix.dtype) + _NOISE / math.sqrt(k) * _normal(key, k, r, matrix.dtype)
    found = _power_iterations(matrix, found, rounds)
    if side == "both":
        return TwoSided(found, orthonormalized(matmul(transposed, found)))
    return found


def randomized_projector(
    gradient: jax.Array,
    rank: int,
    key: jax.Array,
    side: Side,
    power_iterations: jax.typing.ArrayLike = 2,
) -> Projector:
    """Takes the top singular vectors of a randomized SVD (Halko et al. 2011, arXiv:0909.4061).

    >>> import jax, jax.numpy as jnp
    >>> g = jnp.diag(jnp.array([1.0, -3.0, 2.0]))
    >>> randomized_projector(g, 2, jax.random.key(0), "left").round().astype(int).tolist()
    [[0, 0], [1, 0], [0, 1]]
    """
    matrix, r = scaled(gradient), effective_rank(gradient.shape, rank)
    if side == "right":
        matrix = jnp.swapaxes(matrix, -2, -1)
    transposed = jnp.swapaxes(matrix, -2, -1)
    width = effective_rank(gradient.shape, r + _OVERSAMPLING)
    found = matmul(matrix, _normal(key, matrix.shape[-1], width, matrix.dtype))
    found = _power_iterations(matrix, orthonormalized(found), power_iterations)
    inside = _top_eigenvectors(matmul(jnp.swapaxes(found, -2, -1), matrix), r)
    found = fix_signs(matmul(found, inside))
    if side == "both":
        return TwoSided(found, fix_signs(orthonormalized(matmul(transposed, found))))
    return found


def random_projector(gradient: jax.Array, rank: int, key: jax.Array, side: Side) -> Projector:
    """Draws a random subspace, whatever the gradient (GoLore, He et al. 2024, arXiv:2410.11289).

    >>> import jax, jax.numpy as jnp
    >>> random_projector(jnp.ones((8, 64, 256)), 4, jax.random.key(0), "left").shape
    (8, 64, 4)
    """
    dtype, r = jnp.promote_types(gradient.dtype, jnp.float32), effective_rank(gradient.shape, rank)

    def draw(key: jax.Array, rows: int) -> jax.Array:
        basis = orthonormalized(_normal(key, rows, r, dtype))
        return jnp.broadcast_to(basis, (*gradient.shape[:-2], rows, r))

    m, n = gradient.shape[-2:]
    if side == "both":
        of_left, of_right = jax.random.split(key)
        return TwoSided(draw(of_left, m), draw(of_right, n))
    return draw(key, m if side == "left" else n)


def fix_signs(basis: jax.Array) -> jax.Array:
    """Flips each column of a (..., k, r) basis so that its entry of largest magnitude is positive.

    >>> import jax.numpy as jnp
    >>> fix_signs(jnp.array([[0.5, 1.0], [-0.75, 0.0]])).tolist()
    [[-0.5, 1.0], [0.75, 0.0]]
    """
    largest = jnp.argmax(jnp.abs(basis), axis=-2, keepdims=True)
    return basis * jnp.where(jnp.take_along_axis(basis, largest, axis=-2) < 0, -1, 1)


def orthonormalized(columns: jax.Array) -> jax.Array:
    """Makes (..., k, r) columns orthonormal, each on the positive side of the one it came from.

    >>> import jax.numpy as jnp
    >>> orthonormalized(jnp.array([[-2.0, 1.0], [0.0, 3.0]])).tolist()
    [[-1.0, 0.0], [0.0, 1.0]]
    """
    return each_matrix(_qr, columns)


def each_matrix(decompose: Callable[[jax.Array], Any], matrices: jax.Array) -> Any:
    """Decomposes a stack, on CPU one matrix after the other.

    With jaxlib 0.10.2 stacked decompositions share a pool of threads with whatever runs beside them
    on the CPU (another one, a virtual device's collective), wait for it and never end.

    >>> import jax.numpy as jnp
    >>> each_matrix(jnp.linalg.eigvalsh, jnp.stack([jnp.eye(2), 2 * jnp.eye(2)])).tolist()
    [[1.0, 1.0], [2.0, 2.0]]
    """
    if matrices.ndim == 2:
        return decompose(matrices)
    stack = matrices.reshape(-1, *matrices.shape[-2:])
    one_by_one = functools.partial(jax.lax.map, decompose)
    out = jax.lax.platform_dependent(stack, cpu=one_by_one, default=decompose)
    return jax.tree.map(lambda x: x.reshape(*matrices.shape[:-2], *x.shape[1:]), out)


def _svd(matrix: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    return tuple(jnp.linalg.svd(matrix, full_matrices=False))


def _qr(columns: jax.Array) -> jax.Array:
    q, r = jnp.linalg.qr(columns)
    diagonal = jnp.diagonal(r, axis1=-2, axis2=-1)
    return q * jnp.where(diagonal < 0, -1, 1)[..., None, :]


def _power_iterations(
    matrix: jax.Array, columns: jax.Array, rounds: jax.typing.ArrayLike
) -> jax.Array:
    transposed = jnp.swapaxes(matrix, -2, -1)

    def once(_: Any, columns: jax.Array) -> jax.Array:
        return orthonormalized(matmul(matrix, matmul(transposed, columns)))

    if isinstance(rounds, int):
        for i in range(rounds):
            columns = once(i, columns)
        return columns
    return jax.lax.fori_loop(0, rounds, once, columns)


def _top_eigenvectors(wide: jax.Array, count: int) -> jax.Array:
    """The top eigenvectors of ``W W^T``, by falling eigenvalue."""
    gram = matmul(wide, jnp.swapaxes(wide, -2, -1))
    _, vectors = each_matrix(lambda matrix: tuple(jnp.linalg.eigh(matrix)), gram)
    return jnp.flip(vectors[..., :, -count:], axis=-1)


def _normal(key: jax.Array, rows: int, columns: int, dtype: jax.typing.DTypeLike) -> jax.Array:
    return jax.random.normal(key, (rows, columns), dtype)
