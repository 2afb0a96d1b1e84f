r"""Lazy refreshes: a matrix whose subspace stays waits longer for its next projector.

Every matrix has a gap of its own, ``update_proj_gap`` at first. Each of its refreshes tells how far
the new basis lies in the old one's span,

$$o = \frac{\lVert P_\text{new}^\top P_\text{old} \rVert_F^2 / r - r/k}{1 - r/k},$$

which is 1 for the same subspace and 0 on average for a random one (k rows, r columns). After five
refreshes at one gap their mean decides: at least the threshold, and the gap doubles; less, and it
halves, though not below ``update_proj_gap``. The idea is that of Q-GaLore (Zhang et al. 2024,
arXiv:2407.08296, section 3.2), which compares the first vectors alone and never goes back.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from galore_jax.projection import MatrixSpec, Projector, TwoSided, in_float32, matmul
from galore_jax.sharding import zeros_beside

OBSERVED = 5  # refreshes at a gap before it changes


class RefreshTimes(NamedTuple):
    """When the matrices of a stack are refreshed; all arrays have the stack's shape.

    Attributes:
      due_at: the count of updates at which the next refresh is due, int32.
      gap: updates between two refreshes, int32; 0 before the first one.
      overlap: sum of the overlaps observed at this gap, float32.
      observed: their number, int32.
      made: refreshes so far, int32.
    """

    due_at: Any
    gap: Any
    overlap: Any
    observed: Any
    made: Any


def no_times(leaf: Any, spec: MatrixSpec | None) -> Any:
    """Makes the times that a leaf begins with: due at once."""
    if spec is None:
        return optax.MaskedNode()
    axes, shape = spec.axes[:-2], spec.matrix_shape[:-2]
    dtypes = (jnp.int32, jnp.int32, jnp.float32, jnp.int32, jnp.int32)
    return RefreshTimes(*(zeros_beside(leaf, axes, shape, dtype) for dtype in dtypes))


def overlap(old: Projector, new: Projector) -> jax.Array:
    """Computes o of two bases, (..., k, r) each; of the left ones where there are two sides.

    >>> overlap(jnp.eye(4)[:, :2], jnp.eye(4)[:, 1:3]).item()
    0.0
    """
    if isinstance(old, TwoSided) or isinstance(new, TwoSided):
        return overlap(old.left, new.left)  # pyright: ignore[reportAttributeAccessIssue]
    k, r = new.shape[-2:]
    if k == r:
        return jnp.ones(new.shape[:-2], jnp.float32)
    cosines = matmul(jnp.matrix_transpose(in_float32(new)), in_float32(old))
    share = jnp.sum(jnp.square(cosines), axis=(-2, -1)) / r
    return ((share - r / k) / (1 - r / k)).astype(jnp.float32)


def next_times(
    times: RefreshTimes,
    count: jax.Array,
    observed: jax.Array,
    is_refreshed: jax.Array,
    *,
    gap: Any,
    threshold: float,
) -> RefreshTimes:
    """Sets when a matrix is refreshed next, after it was due.

    Args:
      times: of one matrix, () each.
      count: updates so far.
      observed: the overlap of its last two bases.
      is_refreshed: whether it has a new one; a gradient that is zero or not finite gives none.
      gap: the shortest gap.
      threshold: the least mean overlap at which the gap doubles.
    """
    is_first = times.gap == 0
    counts = is_refreshed & ~is_first
    total = times.overlap + jnp.where(counts, observed, 0)
    number = times.observed + counts
    is_full = number >= OBSERVED
    longer = total >= threshold * number
    changed = jnp.where(longer, 2 * times.gap, times.gap // 2)
    new_gap = jnp.maximum(jnp.where(is_full, changed, times.gap), jnp.int32(gap))
    return RefreshTimes(
        due_at=(count + new_gap).astype(jnp.int32),
        gap=new_gap.astype(jnp.int32),
        overlap=jnp.where(is_full, 0.0, total),
        observed=jnp.where(is_full, 0, number),
        made=times.made + is_refreshed,
    )


def times_in(opt_state: optax.OptState) -> list[RefreshTimes]:
    """Finds the refresh times in an optimizer's state.

    >>> times_in(())
    []
    """
    is_times = lambda node: isinstance(node, RefreshTimes)  # noqa: E731
    return [x for x in jax.tree.leaves(opt_state, is_leaf=is_times) if is_times(x)]
