"""Measures of projectors and gradients: captured energy, overlap of bases, stable rank.

Leading axes of every argument are a stack, as in ``galore_jax.projectors``, and broadcast. All
is computed in float32 (float64 for float64) and may be inside ``jax.jit``. What is not finite gives
NaN. For each projected matrix of a model whose kernels are matrices or stacks of them:

>>> import jax, jax.numpy as jnp, optax
>>> from galore_jax import galore
>>> gradients = {"kernel": jnp.ones((8, 64, 256))}
>>> tx = galore(optax.sgd(0.1), rank=4, target_modules="kernel")
>>> _, state = tx.update(gradients, tx.init(gradients))
>>> jax.tree.map(captured_energy, gradients, state.projector)["kernel"].round(3).tolist()
[1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]
"""

import jax
import jax.numpy as jnp

from galore_jax.projection import Projector, Side, TwoSided, in_float32, matmul, project, scaled
from galore_jax.projectors import each_matrix


def captured_energy(
    gradient: jax.Array, projector: Projector, side: Side | None = None
) -> jax.Array:
    r"""The part of a gradient's squared Frobenius norm that lies in the subspace of a basis.

    $$\|P^\top G\|_F^2 / \|G\|_F^2, \qquad \|G Q\|_F^2 / \|G\|_F^2, \qquad
    \|P^\top G Q\|_F^2 / \|G\|_F^2$$

    for the left, the right and both sides. No basis of r vectors captures more than the top r
    singular vectors do, the sum of whose squared singular values it then is (Eckart & Young 1936).

    Args:
      gradient: (..., m, n), of any float dtype.
      projector: orthonormal columns, (..., m, r) or (..., n, r), or a
        ``TwoSided`` of the two; as in ``GaLoreState.projector``.
      side: ``"left"``, ``"right"`` or ``"both"``; None takes ``"both"`` for a ``TwoSided`` and else
        the side whose length is the projector's, the left one if both are.

    Returns:
      (...) float32, at most 1; 1 for an all-zero gradient, of which nothing is lost. With a
      projector stored in bfloat16, whose columns are rounded, good to about two digits.

    Raises:
      TypeError: a projector that is neither an array nor a ``TwoSided``.
      ValueError: shapes that do not fit each other or the side.

    >>> import jax.numpy as jnp
    >>> gradient = jnp.diag(jnp.array([2.0, 1.0, 1.0, 1.0, 1.0]))
    >>> captured_energy(gradient, jnp.eye(5, 1)).item()
    0.5
    >>> captured_energy(jnp.zeros((8, 64, 256)), jnp.zeros((8, 64, 4))).shape
    (8,)
    """
    side = _side_of(gradient, projector, side)
    matrix = scaled(gradient)
    total = _energy(matrix)
    captured = _energy(project(matrix, projector, side))
    nothing = total == 0
    ratio = jnp.minimum(captured / jnp.where(nothing, 1, total), 1)
    return jnp.where(nothing, 1, ratio)


def overlap(a: jax.Array, b: jax.Array) -> jax.Array:
    r"""How much of the smaller of two subspaces lies in the other, from 0 to 1.

    $$\|A^\top B\|_F^2 / \min(r_a, r_b)$$

    The singular values of $A^\top B$ are the cosines of the principal angles between the two
    subspaces (Björck & Golub 1973), so this is the mean of their squares: 1 where one subspace
    contains the other, 0 where they are orthogonal, about $\max(r_a, r_b) / k$ for two
    random ones.

    Args:
      a: (..., k, r_a), orthonormal columns.
      b: (..., k, r_b), orthonormal columns.

    Returns:
      (...) float32, at most 1.

    Raises:
      TypeError: a ``TwoSided``, whose sides are to be compared one by
        one.
      ValueError: bases of spaces of different dimension, or stacks that do not broadcast.

    >>> import jax.numpy as jnp
    >>> overlap(jnp.eye(4, 2), jnp.eye(4)[:, 1:3]).item()
    0.5
    """
    for basis in (a, b):
        if isinstance(basis, TwoSided):
            raise TypeError("overlap compares two arrays; for a TwoSided call it on each side")
    shapes = jnp.shape(a), jnp.shape(b)
    if min(map(len, shapes)) < 2 or shapes[0][-2] != shapes[1][-2]:
        raise ValueError(
            f"the bases must be (..., k, r_a) and (..., k, r_b), got {shapes[0]} and {shapes[1]}"
        )
    _check_stacks(*shapes)
    a, b = in_float32(a), in_float32(b)
    cosines = matmul(jnp.swapaxes(a, -2, -1), b)
    return jnp.minimum(_energy(cosines) / min(cosines.shape[-2:]), 1)


def stable_rank(gradient: jax.Array) -> jax.Array:
    r"""How many directions a gradient's energy is spread over, at least in effect.

    $$\|G\|_F^2 / \|G\|_2^2$$

    the sum of the squared singular values over the largest of them (Rudelson & Vershynin 2007):
    never more than the rank, and unlike it little changed by small perturbations.

    Args:
      gradient: (..., m, n), of any float dtype.

    Returns:
      (...) float32, from 1 to ``min(m, n)`` up to rounding; 0 for an all-zero gradient.

    Raises:
      ValueError: fewer than two axes.

    >>> import jax.numpy as jnp
    >>> stable_rank(jnp.diag(jnp.array([2.0, 1.0, 1.0, 0.0]))).item()
    1.5
    """
    if jnp.ndim(gradient) < 2:
        raise ValueError(f"the gradient must be (..., m, n), got {jnp.shape(gradient)}")
    matrix = scaled(gradient)
    if matrix.shape[-2] > matrix.shape[-1]:
        matrix = jnp.swapaxes(matrix, -2, -1)
    gram = matmul(matrix, jnp.swapaxes(matrix, -2, -1))
    largest = each_matrix(jnp.linalg.eigvalsh, gram)[..., -1]
    total = _energy(matrix)
    return jnp.where(total == 0, 0, total / jnp.where(total == 0, 1, largest))


def _side_of(gradient: jax.Array, projector: Projector, side: Side | None) -> Side:
    """The side, after checking that the projector is one for it."""
    given = tuple(projector) if isinstance(projector, TwoSided) else (projector,)
    if not all(hasattr(basis, "shape") for basis in given):
        raise TypeError(f"the projector must be an array or a TwoSided, got {projector!r}")
    shape, shapes = jnp.shape(gradient), [jnp.shape(basis) for basis in given]
    if len(shape) < 2 or min(map(len, shapes)) < 2:
        raise ValueError(
            f"the gradient must be (..., m, n) and the projector (..., k, r), got {shape} and "
            + " and ".join(map(str, shapes))
        )
    rows: dict[Side, tuple[int, ...]] = {
        "left": (shape[-2],),
        "right": (shape[-1],),
        "both": shape[-2:],
    }
    lengths = tuple(basis[-2] for basis in shapes)
    fitting: list[Side] = [name for name, expected in rows.items() if lengths == expected]
    if not fitting or (side is not None and side not in fitting):
        where = "no side" if side is None else f"not side={side!r}"
        raise ValueError(
            f"a projector of shape {' and '.join(map(str, shapes))} fits {where} of a gradient of "
            f"shape {shape}"
        )
    _check_stacks(shape, *shapes)
    return side or fitting[0]


def _check_stacks(*shapes: tuple[int, ...]) -> None:
    try:
        jnp.broadcast_shapes(*(shape[:-2] for shape in shapes))
    except ValueError as error:
        raise ValueError(
            "the leading axes of " + " and ".join(map(str, shapes)) + " do not broadcast"
        ) from error


def _energy(matrix: jax.Array) -> jax.Array:
    return jnp.sum(jnp.square(matrix), axis=(-2, -1))
