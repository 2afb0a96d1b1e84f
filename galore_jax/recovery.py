r"""Recovery: the gradient outside the subspace, scaled as the optimizer scales what is inside.

A projected matrix is updated by $P N$, with N the optimizer's update for the low-rank gradient
$R = P^\top G$. What is left of the gradient, $G - P R$, has no state. Fira (Chen et al. 2024)
gives it the factor by which the optimizer changes R, and adds it:

$$S = -\phi \, (G - P R), \qquad \phi_j = \frac{\lVert N_{:,j} \rVert}{\lVert R_{:,j} \rVert},
\qquad \Delta W = \mathrm{scale} \cdot (P N + S)$$

with one $\phi$ for each column (of the axis that is not projected), or one of the norms of the
whole matrices. As an update of Optax is added to the weights, N points against the gradient, and so
does S.

A norm that grows suddenly would show as a spike of the loss. The limiter lets it grow by a factor
of 1.01 an update at most:
$S \leftarrow S \cdot 1.01 \, s_{t-1} / s_t$ where $s_t > 1.01 \, s_{t-1}$.
Here $s = \lVert S \rVert / \lVert N \rVert$: N has the learning rate as a factor, whose own growth
while it warms up would else be taken for a spike. In the paper $s = \lVert S \rVert$ without that
rate, which is the same for an optimizer whose updates keep their norm.

Where R, or what is outside, is no more than the rounding of the gradient (a share of 1e-5 in
float32), there is no factor to go by, and S is zero.

References:
  Chen et al., Fira: Can We Achieve Full-rank Training of LLMs Under Low-rank Constraint?, 2024,
  https://arxiv.org/abs/2410.01623, equations 5 to 8
"""

from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import optax

from galore_jax.projection import (
    MatrixSpec,
    Projector,
    in_float32,
    is_projected_gradient,
    norm_over,
    on_matrices,
    project_back,
)
from galore_jax.sharding import zeros_beside

Recovery = Literal["column", "matrix"]
RECOVERIES: tuple[Recovery, ...] = get_args(Recovery)
MOST_GROWTH = 1.01
_NOISE = 1e-5  # parts of a gradient below this share of it are rounding, in float32


def no_norm(leaf: Any, spec: MatrixSpec | None) -> Any:
    """Makes the zeros that a leaf's norms begin with, one float32 for each matrix of its stack."""
    if spec is None:
        return optax.MaskedNode()
    return zeros_beside(leaf, spec.axes[:-2], spec.matrix_shape[:-2], jnp.float32)


def recovered(
    kind: Recovery,
    specs: Any,
    gradients: Any,
    projectors: Any,
    low: Any,
    steps: Any,
    norms: Any,
) -> tuple[Any, Any]:
    """Finds what is added to the updates of projected leaves.

    Args:
      kind: whether each column has its own factor, or each matrix. Matrices that are projected on
        both sides share no axis with R, and have one factor.
      specs: a ``MatrixSpec`` for each leaf that is projected, else None.
      gradients: full ones.
      projectors: P of each projected leaf.
      low, steps: R and N of each projected leaf, the latter without a decay of weights.
      norms: s of the update before, zero where there is none.

    Returns:
      For each projected leaf S, of the shape (*stack, m, n), and for all others what ``gradients``
      has; and the new norms.

    Raises:
      ValueError: gradients that come projected.
    """

    def of_leaf(spec: MatrixSpec, gradient: Any, *rest: Any) -> "_Recovered":
        if is_projected_gradient(gradient):
            raise ValueError(
                "recovery needs the full gradient, and this one comes projected: train without "
                "projected gradients, or with recovery=None"
            )
        return _recover(kind, spec, gradient, *rest)

    found = on_matrices(of_leaf, specs, gradients, projectors, low, steps, norms)
    is_found = lambda x: isinstance(x, _Recovered)  # noqa: E731
    parts = jax.tree.map(lambda x: x.part if is_found(x) else x, found, is_leaf=is_found)
    new = jax.tree.map(
        lambda x: x.norm if is_found(x) else optax.MaskedNode(), found, is_leaf=is_found
    )
    return parts, new


class _Recovered:
    """S and s of one leaf; no pytree, so that it is a leaf itself."""

    def __init__(self, part: jax.Array, norm: jax.Array):
        self.part, self.norm = part, norm


def _recover(
    kind: Recovery,
    spec: MatrixSpec,
    gradient: jax.Array,
    projector: Projector,
    low: jax.Array,
    step: jax.Array,
    before: jax.Array,
) -> _Recovered:
    matrix = in_float32(spec.to_matrix(gradient))
    *_, m, n = matrix.shape
    rank_axis = -1 if spec.side == "right" else -2
    if {"left": m, "right": n, "both": max(m, n)}[spec.side] <= low.shape[rank_axis]:
        return _Recovered(jnp.zeros_like(matrix), before)  # the subspace is the whole space
    outside = matrix - project_back(in_float32(low), projector, spec.side)
    whole, noise = (-2, -1), max(_NOISE, 4 * float(jnp.finfo(low.dtype).eps))
    axes = whole if kind == "matrix" or spec.side == "both" else (rank_axis,)
    # What is left of a gradient by rounding tells nothing, neither a factor nor a direction.
    inside = norm_over(low, axes)
    inside = jnp.where(inside > noise * norm_over(matrix, axes), inside, 0)
    is_outside = norm_over(outside, whole) > noise * norm_over(matrix, whole)
    part = jnp.where(is_outside, -_ratio(norm_over(step, axes), inside) * outside, 0)
    norm = _ratio(norm_over(part, whole), norm_over(step, whole))[..., 0, 0]
    is_limited = (before > 0) & (norm > MOST_GROWTH * before)
    shrunk = jnp.where(is_limited, MOST_GROWTH * before / jnp.where(norm == 0, 1, norm), 1)
    is_usable = jnp.isfinite(norm)
    part = jnp.where(is_usable[..., None, None], part * shrunk[..., None, None], 0)
    after = jnp.where(is_usable & (norm > 0), norm * shrunk, before)
    return _Recovered(part, after.astype(before.dtype))


def _ratio(above: jax.Array, below: jax.Array) -> jax.Array:
    return jnp.where(below > 0, above / jnp.where(below > 0, below, 1), 0)
