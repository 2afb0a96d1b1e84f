r"""Gradients that come out of the backward pass already projected.

For ``y = x W`` the gradient of the weight is :math:`G = x^\top dy`. GaLore needs only its
coordinates in a basis, and these need not go by way of G:

=====  ============================  ========================
side   coordinates                   products, T tokens
=====  ============================  ========================
left   :math:`(x P)^\top dy`         ``2 T r (m + n)`` FLOPs
right  :math:`x^\top (dy\, P)`       ``2 T r (m + n)``
both   :math:`(x P)^\top (dy\, Q)`   ``2 T r (m + n + r)``
=====  ============================  ========================

in place of ``2 T m n``. In the kernel's place among the params goes a :class:`ProjectedKernel`, on
which :func:`linear` dispatches; the derivative is taken with respect to its coordinates, never the
kernel, and no array of the kernel's size is made on the way. It is the projection of Zhao et al.
2024 (arXiv:2403.03507), section 3, moved past the sum over the tokens.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from galore_jax.low_rank import GaLoreState
from galore_jax.projection import (
    ProjectedGradient,
    Projector,
    ProjType,
    Side,
    TwoSided,
    project,
    projected_shape,
    projected_side,
)
from galore_jax.quantization import dequantize_tree, is_quantized
from galore_jax.selection import compiled_patterns, leaf_path


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["kernel", "projector", "coordinates"],
    meta_fields=["side"],
)
@dataclasses.dataclass(frozen=True)
class ProjectedKernel:
    """What stands in a kernel's place while projected gradients are taken; a pytree.

    Attributes:
      kernel: (..., m, n).
      projector: its basis, or a quantised one (shapes: :mod:`galore_jax.projection`).
      coordinates: zeros of the coordinates' shape, in the kernel's dtype: what the derivative is
        taken with respect to.
      side: the side that is projected.
    """

    kernel: Any
    projector: Any
    coordinates: Any
    side: Side


def linear(x: jax.Array, kernel: Any, out_dtype: jax.typing.DTypeLike | None = None) -> jax.Array:
    """``x @ kernel``, for a kernel that may be a :class:`ProjectedKernel`.

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
    flat = x.reshape(-1, x.shape[-1])
    if isinstance(kernel, ProjectedKernel):
        parts = kernel.kernel, kernel.projector, kernel.coordinates
        y: jax.Array = _product(kernel.side, out_dtype, flat, *parts)
    else:
        y = _plain_product(flat, kernel, out_dtype)
    return y.reshape(*x.shape[:-1], -1)


def projected_value_and_grad(
    loss_fn: Callable[..., Any],
    *,
    proj_type: ProjType = "std",
    kernels: str | Sequence[str] | None = None,
    has_aux: bool = False,
) -> Callable[..., Any]:
    """``jax.value_and_grad`` whose gradients of projected kernels are born projected.

    For the updates between two changes of basis. At a change the basis comes from the full
    gradient: use ``jax.value_and_grad`` there, and give ``update`` the same ``refresh``.

    Args:
      loss_fn: a function of (params, ...) that multiplies with its projected kernels by
        :func:`linear`.
      proj_type: that of the ``galore`` in question.
      kernels: regular expressions on the paths of the leaves that go through :func:`linear`. Others
        get their full gradients, which ``galore`` projects. None: all that are projected.
      has_aux: whether ``loss_fn`` returns (loss, auxiliary data).

    Returns:
      A function of (params, opt_state, ...), the rest as ``loss_fn`` takes it, that returns the
      loss (or loss and auxiliary data) and the gradients: a
      :class:`~galore_jax.projection.ProjectedGradient` for each projected kernel.

    Raises:
      ValueError: by that function, an ``opt_state`` without exactly one ``GaLoreState``, or bases
        that do not fit the kernels and ``proj_type``.

    >>> import functools, jax, jax.numpy as jnp, optax
    >>> from galore_jax import galore, linear, projected_value_and_grad
    >>> def loss_fn(params, x, y):
    ...     hidden = jax.nn.relu(linear(x, params["w1"]))
    ...     return jnp.mean((linear(hidden, params["w2"]) - y) ** 2)
    >>> tx = galore(optax.adam(1e-2), rank=4, update_proj_gap=10)
    >>> @functools.partial(jax.jit, static_argnames="refresh")
    ... def step(params, state, x, y, refresh):
    ...     if refresh:
    ...         loss, grads = jax.value_and_grad(loss_fn)(params, x, y)
    ...     else:
    ...         loss, grads = projected_value_and_grad(loss_fn)(params, state, x, y)
    ...     updates, state = tx.update(grads, state, params, refresh=refresh)
    ...     return optax.apply_updates(params, updates), state, loss
    >>> k1, k2, k3 = jax.random.split(jax.random.key(0), 3)
    >>> params = {"w1": jax.random.normal(k1, (16, 64)) / 4, "w2": jnp.zeros((64, 1))}
    >>> x = jax.random.normal(k2, (256, 16))
    >>> y, state, losses = jnp.sin(x[:, :1]), tx.init(params), []
    >>> for count in range(100):
    ...     params, state, loss = step(params, state, x, y, refresh=count % 10 == 0)
    ...     losses.append(float(loss))
    >>> losses[-1] < losses[0] / 4
    True

    A Flax Linen or NNX module takes part by calling :func:`linear` on its kernel: Linen with
    ``linear(x, self.param("kernel", init, shape))``, NNX with ``linear(x, self.kernel[...])`` on
    what ``nnx.split`` and ``nnx.to_pure_dict`` made the params.
    """

    def value_and_grad(params: Any, opt_state: optax.OptState, *args: Any, **kwargs: Any) -> Any:
        nodes = projected_kernels(params, opt_state, proj_type=proj_type, kernels=kernels)

        def of_variables(variables: Any) -> Any:
            return loss_fn(with_coordinates(nodes, variables), *args, **kwargs)

        value, grads = jax.value_and_grad(of_variables, has_aux=has_aux)(variables_of(nodes))
        return value, as_gradients(nodes, grads)

    return value_and_grad


def projected_kernels(
    params: Any,
    opt_state: optax.OptState,
    *,
    proj_type: ProjType = "std",
    kernels: str | Sequence[str] | None = None,
) -> Any:
    """The params with a :class:`ProjectedKernel` in the place of every projected kernel.

    Arguments and errors are those of :func:`projected_value_and_grad`.

    >>> import jax.numpy as jnp, optax
    >>> from galore_jax import galore
    >>> params = {"kernel": jnp.ones((4, 6)), "bias": jnp.ones(6)}
    >>> state = galore(optax.sgd(0.1), rank=2).init(params)
    >>> projected_kernels(params, state)["kernel"].coordinates.shape
    (2, 6)
    """
    patterns = None if kernels is None else compiled_patterns(kernels)
    projectors = galore_state(opt_state).projector
    leaves, treedef = jax.tree_util.tree_flatten_with_path(params)
    nodes = []
    for (key_path, leaf), projector in zip(leaves, treedef.flatten_up_to(projectors), strict=True):
        path = leaf_path(key_path)
        wanted = patterns is None or any(pattern.search(path) for pattern in patterns)
        if isinstance(projector, optax.MaskedNode) or not wanted:
            nodes.append(leaf)
        else:
            nodes.append(_projected_kernel(path, leaf, projector, proj_type))
    return treedef.unflatten(nodes)


def is_projected_kernel(node: Any) -> bool:
    """Whether a node of a tree is a :class:`ProjectedKernel`, for ``is_leaf``.

    >>> is_projected_kernel({})
    False
    """
    return isinstance(node, ProjectedKernel)


def variables_of(nodes: Any) -> Any:
    """What derivatives are taken with respect to: coordinates, and leaves without a projection.

    >>> import jax.numpy as jnp
    >>> node = ProjectedKernel(jnp.ones((4, 6)), jnp.eye(4, 2), jnp.zeros((2, 6)), "left")
    >>> variables_of({"kernel": node})["kernel"].shape
    (2, 6)
    """
    return _map_nodes(lambda node: node.coordinates, lambda leaf: leaf, nodes)


def with_coordinates(nodes: Any, variables: Any) -> Any:
    """The tree of kernels with these variables: the inverse of :func:`variables_of`.

    >>> import jax.numpy as jnp
    >>> node = ProjectedKernel(jnp.ones((4, 6)), jnp.eye(4, 2), jnp.zeros((2, 6)), "left")
    >>> with_coordinates(node, jnp.ones((2, 6))).coordinates.sum().item()
    12.0
    """
    return _map_nodes(
        lambda node, variable: dataclasses.replace(node, coordinates=variable),
        lambda _, variable: variable,
        nodes,
        variables,
    )


def as_gradients(nodes: Any, grads: Any) -> Any:
    """Gradients with respect to :func:`variables_of` as ``galore`` takes them.

    >>> import jax.numpy as jnp
    >>> node = ProjectedKernel(jnp.ones((4, 6)), jnp.eye(4, 2), jnp.zeros((2, 6)), "left")
    >>> as_gradients(node, jnp.ones((2, 6))).shape
    (4, 6)
    """
    return _map_nodes(
        lambda node, grad: ProjectedGradient(grad, jnp.shape(node.kernel), node.side),
        lambda _, grad: grad,
        nodes,
        grads,
    )


def project_gradients(nodes: Any, grads: Any) -> Any:
    """Full gradients projected onto the bases of :func:`projected_kernels`.

    >>> import jax.numpy as jnp
    >>> node = ProjectedKernel(jnp.ones((4, 6)), jnp.eye(4, 2), jnp.zeros((2, 6)), "left")
    >>> project_gradients(node, jnp.ones((4, 6))).coordinates.shape
    (2, 6)
    """

    def projected(node: ProjectedKernel, grad: jax.Array) -> ProjectedGradient:
        coordinates = project(grad, dequantize_tree(node.projector), node.side)
        return ProjectedGradient(coordinates, jnp.shape(grad), node.side)

    return _map_nodes(projected, lambda _, grad: grad, nodes, grads)


def galore_state(opt_state: optax.OptState) -> GaLoreState:
    """The one ``GaLoreState`` inside an optimizer's state.

    Raises:
      ValueError: there is none, or more than one.

    >>> import jax.numpy as jnp, optax
    >>> from galore_jax import galore
    >>> tx = optax.chain(optax.clip(1.0), galore(optax.sgd(0.1), rank=2))
    >>> galore_state(tx.init({"kernel": jnp.ones((4, 6))})).projector["kernel"].shape
    (4, 2)
    """
    nodes = jax.tree.leaves(opt_state, is_leaf=lambda node: isinstance(node, GaLoreState))
    found = [node for node in nodes if isinstance(node, GaLoreState)]
    if len(found) != 1:
        raise ValueError(f"opt_state must hold one GaLoreState, this one holds {len(found)}")
    return found[0]


def _map_nodes(on_node: Callable[..., Any], on_leaf: Callable[..., Any], nodes: Any, *rest: Any):
    def apply(node: Any, *of_rest: Any) -> Any:
        return (on_node if is_projected_kernel(node) else on_leaf)(node, *of_rest)

    return jax.tree.map(apply, nodes, *rest, is_leaf=is_projected_kernel)


def _projected_kernel(
    path: str, kernel: Any, projector: Any, proj_type: ProjType
) -> ProjectedKernel:
    shape = jnp.shape(kernel)
    side = projected_side(shape, proj_type)
    bases = projector if isinstance(projector, TwoSided) else (projector,)
    shapes = [tuple(basis.shape) for basis in bases]
    rows = {"left": shape[-2:-1], "right": shape[-1:], "both": shape[-2:]}[side]
    if [s[:-1] for s in shapes] != [(*shape[:-2], size) for size in rows]:
        raise ValueError(
            f"the bases {shapes} of {path} do not fit its shape {shape} and "
            f"proj_type={proj_type!r}; give the proj_type of the galore that made them, and in "
            "kernels only leaves whose last two axes are the matrix"
        )
    low_shape = projected_shape(shape, shapes[0][-1], side)
    return ProjectedKernel(kernel, projector, jnp.zeros(low_shape, kernel.dtype), side)


def _plain_product(
    x: jax.Array, kernel: jax.Array, out_dtype: jax.typing.DTypeLike | None
) -> jax.Array:
    return jnp.dot(x, kernel.astype(x.dtype), preferred_element_type=out_dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _product(
    side: Side,
    out_dtype: jax.typing.DTypeLike | None,
    x: jax.Array,
    kernel: jax.Array,
    projector: Any,
    coordinates: jax.Array,
) -> jax.Array:
    del side, projector, coordinates
    return _plain_product(x, kernel, out_dtype)


def _forward(side, out_dtype, x, kernel, projector, coordinates):
    del side
    dtype_of_gradient = jnp.zeros((), coordinates.dtype)
    return _plain_product(x, kernel, out_dtype), (x, kernel, projector, dtype_of_gradient)


def _backward(side, out_dtype, saved, dy):
    del out_dtype
    x, kernel, projector, dtype_of_gradient = saved
    dy = dy.astype(x.dtype)
    dx = jnp.dot(dy, kernel.astype(x.dtype).T)
    left, right = _bases(projector, side, x.dtype)
    # Behind a barrier: XLA would compute (x P)^T as P^T x^T, and on CPU the product with that takes
    # twice the time (benchmarks/step.py).
    rows = x if left is None else jax.lax.optimization_barrier(jnp.dot(x, left))
    columns = dy if right is None else jnp.dot(dy, right)
    coordinates = jnp.dot(rows.T, columns).astype(dtype_of_gradient.dtype)
    return dx, None, None, coordinates


_product.defvjp(_forward, _backward)


def _bases(projector: Projector, side: Side, dtype: Any) -> tuple[Any, Any]:
    """The left and the right basis; None on a side that is not projected."""
    plain = dequantize_tree(projector)
    cast = jax.tree.map(lambda basis: basis.astype(dtype), plain, is_leaf=is_quantized)
    if isinstance(cast, TwoSided):
        return cast.left, cast.right
    return (cast, None) if side == "left" else (None, cast)
