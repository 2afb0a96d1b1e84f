"""Projection of one matrix, or of a stack of matrices along leading axes.

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
import warnings
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax

from galore_jax.quantization import FirstMoment, Quantized, dequantize, is_quantized

# As Optax names the first moments of its optimizers: linear in the gradients or the updates.
FIRST_MOMENTS = frozenset({"mu", "trace", "ema"})

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


def projected_shape(shape: tuple[int, ...], rank: int, side: Side) -> tuple[int, ...]:
    """Gives the shape of R: (..., r, n) for left, (..., m, r) for right, (..., r, r) for both.

    >>> projected_shape((8, 512, 1376), 128, "left"), projected_shape((512, 1376), 128, "both")
    ((8, 128, 1376), (128, 128))
    """
    r, (m, n) = effective_rank(shape, rank), shape[-2:]
    rows, columns = {"left": (r, n), "right": (m, r), "both": (r, r)}[side]
    return (*shape[:-2], rows, columns)


def projector_shape(shape: tuple[int, ...], rank: int, side: Side) -> Any:
    """Gives a projector's shape: (..., m, r) for left, (..., n, r) for right, the two for both.

    >>> projector_shape((8, 512, 1376), 128, "left"), projector_shape((8, 4), 2, "both")
    ((8, 512, 128), TwoSided(left=(8, 2), right=(4, 2)))
    """
    r = effective_rank(shape, rank)
    left, right = ((*shape[:-2], rows, r) for rows in shape[-2:])
    return TwoSided(left, right) if side == "both" else left if side == "left" else right


def empty_projector(
    shape: tuple[int, ...], rank: int, side: Side, dtype: jax.typing.DTypeLike
) -> Projector:
    """Makes a projector of zeros, of the shape that ``projector_shape`` gives.

    >>> empty_projector((8, 512, 1376), 128, "left", "float32").shape
    (8, 512, 128)
    """
    shapes = projector_shape(shape, rank, side)
    if isinstance(shapes, TwoSided):
        return TwoSided(*(jnp.zeros(each, dtype) for each in shapes))
    return jnp.zeros(shapes, dtype)


def dense(projector: Any) -> Any:
    """Decodes the quantised arrays of a projector, or of a tree.

    >>> import jax.numpy as jnp
    >>> dense(jnp.eye(2)).shape
    (2, 2)
    """
    decode = lambda node: dequantize(node) if is_quantized(node) else node  # noqa: E731
    return jax.tree.map(decode, projector, is_leaf=is_quantized)


def project(matrix: jax.Array, projector: Projector, side: Side) -> jax.Array:
    """Projects a (..., m, n) matrix to R, in the matrix's dtype.

    >>> import jax.numpy as jnp
    >>> project(jnp.ones((4, 6)), jnp.eye(4, 2), "left").shape
    (2, 6)
    """
    return _on_each_side(matrix, projector, side, lambda basis: jnp.swapaxes(basis, -2, -1))


def project_back(low_rank: jax.Array, projector: Projector, side: Side) -> jax.Array:
    """Brings R back to a (..., m, n) matrix, in the dtype of R.

    >>> import jax.numpy as jnp
    >>> project_back(jnp.ones((2, 6)), jnp.eye(4, 2), "left").shape
    (4, 6)
    """
    return _on_each_side(low_rank, projector, side, lambda basis: basis)


def rotate(low_rank: jax.Array, old: Projector, new: Projector, side: Side) -> jax.Array:
    """Turns R from an old projector to a new one: ``(P_new^T P_old) R`` on the left.

    The part outside the new subspace is lost. Computed in float32 (float64 for float64).

    >>> import jax.numpy as jnp
    >>> rotate(jnp.array([[1.0], [2.0]]), jnp.eye(2), jnp.eye(2)[:, ::-1], "left").tolist()
    [[2.0], [1.0]]
    """

    def turn(new_basis: jax.Array, old_basis: jax.Array) -> jax.Array:
        return matmul(jnp.swapaxes(in_float32(new_basis), -2, -1), in_float32(old_basis))

    return _on_each_side(low_rank, jax.tree.map(turn, new, old), side, lambda basis: basis)


def split_first_moments(state: Any) -> tuple[list[Any], Callable[[list[Any]], Any]]:
    """Takes the first moments out of an optimizer's state, by the names that Optax uses.

    Those of a centred second moment (``rmsprop(centered=True)``) are left where they are: turned
    alone they would make its variance negative.

    Returns:
      The trees under fields named ``mu``, ``trace`` or ``ema``; and a function that puts others in
      their places.

    >>> import jax.numpy as jnp, optax
    >>> moments, put = split_first_moments(optax.adam(0.1).init({"w": jnp.ones(2)}))
    >>> moments, put([{"w": 1}])[0].mu
    ([{'w': Array([0., 0.], dtype=float32)}], {'w': 1})
    """

    def is_moment(path: Any) -> bool:
        return bool(path) and getattr(path[-1], "name", None) in FIRST_MOMENTS

    nodes, treedef = jax.tree_util.tree_flatten_with_path(
        state,
        is_leaf=lambda path, x: (
            is_moment(path) or isinstance(x, optax.ScaleByRStdDevState | optax.ScaleByAdamState)
        ),
        is_leaf_takes_path=True,
    )
    at = [
        i
        for i, (path, node) in enumerate(nodes)
        if is_moment(path) or isinstance(node, optax.ScaleByAdamState)
    ]

    def take(node: Any) -> Any:
        if not isinstance(node, optax.ScaleByAdamState):
            return node
        return jax.tree.map(_with_second, node.mu, node.nu, is_leaf=is_quantized)

    def put(moments: list[Any]) -> Any:
        new = {i: _put_moment(nodes[i][1], moment) for i, moment in zip(at, moments, strict=True)}
        return treedef.unflatten([new.get(i, node) for i, (_, node) in enumerate(nodes)])

    return [take(nodes[i][1]) for i in at], put


def _with_second(first: Any, second: Any) -> Any:
    """Adds to the codes of a ratio what they are a ratio to."""
    is_ratio = isinstance(first, Quantized) and first.encoding == "ratio"
    return FirstMoment(first, second) if is_ratio else first


def _put_moment(node: Any, moment: Any) -> Any:
    if not isinstance(node, optax.ScaleByAdamState):
        return moment
    is_first = lambda x: isinstance(x, FirstMoment)  # noqa: E731
    codes = lambda x: x.ratio if is_first(x) else x  # noqa: E731
    return node._replace(mu=jax.tree.map(codes, moment, is_leaf=is_first))


def warn_without_first_moments(state: Any) -> None:
    """Warns that ``rotate_moments`` does nothing for a state without first moments."""
    if not split_first_moments(state)[0]:
        warnings.warn(
            "rotate_moments=True does nothing here: the optimizer's state has no first moment "
            "named mu, trace or ema that can turn",
            stacklevel=3,
        )


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
