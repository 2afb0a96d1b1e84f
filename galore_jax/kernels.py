r"""Products with kernels, and with stand-ins that say themselves how they multiply.

A model multiplies by ``linear``. In a kernel's place among its params may be a
``ProjectedKernel``, whose gradient is born projected: for ``y = x W`` the weight's gradient is
$x^\top dy$, and GaLore needs only its projection R, which need not go by way of it:

| side | low-rank gradient R | products, T tokens |
|---|---|---|
| left | $(x P)^\top dy$ | ``2 T r (m + n)`` FLOPs |
| right | $x^\top (dy\, P)$ | ``2 T r (m + n)`` |
| both | $(x P)^\top (dy\, Q)$ | ``2 T r (m + n + r)`` |

in place of ``2 T m n``. No array of the kernel's size is made on the way. It is the projection of
Zhao et al. 2024 (arXiv:2403.03507), section 3, moved past the sum over the tokens.
"""

import dataclasses
import functools
import math
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from galore_jax.int8_kernels import is_int8
from galore_jax.projection import ProjectedGradient, Side, TwoSided, dense


@runtime_checkable
class KernelStandIn(Protocol):
    """A pytree node that a model finds in a kernel's place."""

    def matmul(self, x: jax.Array, out_dtype: jax.typing.DTypeLike | None) -> jax.Array:
        """Multiplies ``(T, m)`` by the kernel to ``(T, n)``."""
        ...


def linear(x: jax.Array, kernel: Any, out_dtype: jax.typing.DTypeLike | None = None) -> jax.Array:
    """Computes ``x @ kernel``, for an array or a ``KernelStandIn``.

    Args:
      x: ``(..., m)``; its dtype is the dtype of the product's operands, forward and backward.
      kernel: ``(m, n)``, of any floating dtype.
      out_dtype: dtype to accumulate in and return; None for that of ``x``.

    Returns:
      ``(..., n)``.

    >>> import jax.numpy as jnp
    >>> linear(jnp.ones((2, 3), jnp.bfloat16), jnp.ones((3, 4))).dtype == jnp.bfloat16
    True
    """
    # One matrix, not a batch of them: on CPU the weight gradient is a third faster so.
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    if isinstance(kernel, KernelStandIn):
        y = kernel.matmul(rows, out_dtype)
    else:
        y = _product(rows, kernel, out_dtype)
    return y.reshape(*x.shape[:-1], y.shape[-1])


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["kernel", "projector", "gradient"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class ProjectedKernel:
    r"""A kernel with a low-rank variable Z of zeros, $W + P Z$.

    The derivative with respect to Z is the projected gradient, and so is every higher one. The
    kernel itself counts as a constant.

    Attributes:
      kernel: (..., m, n), or an ``Int8Kernel`` of that shape.
      projector: P, as it is stored (shapes: ``galore_jax.projection``).
      gradient: a ``ProjectedGradient`` of zeros, the variable Z.
    """

    kernel: Any
    projector: Any
    gradient: ProjectedGradient

    def matmul(self, x: jax.Array, out_dtype: jax.typing.DTypeLike | None) -> jax.Array:
        """Multiplies ``(T, m)`` by the (m, n) kernel."""
        constants = jax.lax.stop_gradient((self.kernel, self.projector))
        kernel, projector, variable = _varying_as(x, (*constants, self.gradient.low_rank))
        return _projected_product(self.gradient.side, out_dtype, x, kernel, projector, variable)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["array"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Frozen:
    """A weight that is not trained, in its place among the params.

    Attributes:
      array: the weight; ``optax.MaskedNode()`` where only what is trained is wanted.
    """

    array: Any

    def matmul(self, x: jax.Array, out_dtype: jax.typing.DTypeLike | None) -> jax.Array:
        """Multiplies ``(T, m)`` by the (m, n) kernel."""
        return _product(x, jax.lax.stop_gradient(self.array), out_dtype)


def is_projected_kernel(node: Any) -> bool:
    """Tells whether a node of a tree is a ``ProjectedKernel``, for ``is_leaf``.

    >>> is_projected_kernel({})
    False
    """
    return isinstance(node, ProjectedKernel)


def detached(kernel: Any) -> Any:
    """Marks a stand-in's constants as such, before it goes into a ``jax.custom_vjp`` of yours.

    >>> detached(3)
    3
    """
    if not is_projected_kernel(kernel):
        return kernel
    weights, projector = jax.lax.stop_gradient((kernel.kernel, kernel.projector))
    return dataclasses.replace(kernel, kernel=weights, projector=projector)


def _product(x: jax.Array, kernel: Any, out_dtype: Any) -> jax.Array:
    if is_int8(kernel):
        return kernel.product(x, out_dtype)
    return jnp.dot(x, kernel.astype(x.dtype), preferred_element_type=out_dtype)


# Both products are linear in Z through the kernel W + P Z, at Z = 0. The derivative of either with
# respect to its first argument is the other, so that derivatives of every order are right.


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _projected_product(
    side: Side, out_dtype: Any, x: jax.Array, kernel: Any, projector: Any, variable: jax.Array
) -> jax.Array:
    del side, projector, variable
    return _product(x, kernel, out_dtype)


def _product_forward(side, out_dtype, x, kernel, projector, variable):
    saved = x, kernel, projector, variable
    return _projected_product(side, out_dtype, *saved), saved  # a derivative of this comes here too


def _product_backward(side, out_dtype, saved, dy):
    del out_dtype
    x, kernel, projector, variable = saved
    dy = dy.astype(x.dtype)
    dx = _transposed_product(side, dy, kernel, projector, variable)
    return dx, None, None, _low_rank_gradient(side, x, dy, projector, variable)


_projected_product.defvjp(_product_forward, _product_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _transposed_product(
    side: Side, dy: jax.Array, kernel: Any, projector: Any, variable: jax.Array
) -> jax.Array:
    del side, projector, variable
    if is_int8(kernel):
        return kernel.T.product(dy)
    return jnp.dot(dy, kernel.astype(dy.dtype).T)


def _transposed_forward(side, dy, kernel, projector, variable):
    saved = dy, kernel, projector, variable
    return _transposed_product(side, *saved), saved


def _transposed_backward(side, saved, dx):
    dy, kernel, projector, variable = saved
    y: Any = _projected_product(side, None, dx, kernel, projector, variable)
    return y, None, None, _low_rank_gradient(side, dx, dy, projector, variable)


_transposed_product.defvjp(_transposed_forward, _transposed_backward)


def _low_rank_gradient(side: Side, x: jax.Array, dy: jax.Array, projector: Any, like: jax.Array):
    plain = jax.tree.map(lambda basis: basis.astype(x.dtype), dense(projector))
    left, right = plain if isinstance(plain, TwoSided) else (plain, plain)
    # Behind a barrier: XLA would compute (x P)^T as P^T x^T, and on CPU the product with that takes
    # twice the time (benchmarks/step.py).
    rows = x if side == "right" else jax.lax.optimization_barrier(jnp.dot(x, left))
    columns = dy if side == "left" else jnp.dot(dy, right)
    return jnp.dot(rows.T, columns).astype(like.dtype)


def _varying_as(x: jax.Array, tree: Any) -> Any:
    """In a ``jax.shard_map``: the tree, varying over the mesh axes that ``x`` varies over.

    The transpose of that is the sum over these axes, as for any product with replicated weights.
    """
    axes = _varying_axes(x)

    def vary(leaf: jax.Array) -> jax.Array:
        more = tuple(axes - _varying_axes(leaf))
        if not more:
            return leaf
        if hasattr(jax.lax, "pcast"):
            return jax.lax.pcast(leaf, more, to="varying")
        return getattr(jax.lax, "pvary")(leaf, more)  # noqa: B009  # before jax 0.8

    return jax.tree.map(vary, tree) if axes else tree


def _varying_axes(x: jax.Array) -> frozenset[Any]:
    kind: Any = jax.typeof(x)
    return (
        kind.vma if hasattr(kind, "vma") else kind.manual_axis_type.varying
    )  # vma before jax 0.10
