"""Gradients that come out of the backward pass already projected, see ``galore_jax.kernels``."""

import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from galore_jax.galore import GaLoreState
from galore_jax.int8_kernels import float_variables, is_int8, with_float_variables
from galore_jax.kernels import ProjectedKernel, is_projected_kernel
from galore_jax.projection import (
    MatrixSpec,
    ProjectedGradient,
    ProjType,
    TwoSided,
    dense,
    is_projected_gradient,
    project,
)
from galore_jax.quantization import is_quantized
from galore_jax.weight_decay import note_tangent, replaced
from galore_jax.weights import Patterns, leaf_path, path_filter


def projected_value_and_grad(
    loss_fn: Callable[..., Any],
    *,
    proj_type: ProjType = "std",
    kernels: Patterns | None = None,
    has_aux: bool = False,
) -> Callable[..., Any]:
    """Makes a ``jax.value_and_grad`` whose gradients of projected kernels are born projected.

    It is for the updates between two refreshes. At a refresh the projector comes from the full
    gradient: use ``jax.value_and_grad`` there, and give ``update`` the same ``refresh``.

    Args:
      loss_fn: a function of (params, ...) that multiplies with its projected kernels by
        ``galore_jax.linear``, and does nothing else with them.
      proj_type: that of the ``galore`` in question.
      kernels: regular expressions on the paths of the leaves that go through ``linear``. Others
        get their full gradients, which ``galore`` projects. None: all that are projected.
      has_aux: whether ``loss_fn`` returns (loss, auxiliary data).

    Returns:
      A function of (params, opt_state, ...), the rest as ``loss_fn`` takes it, that returns the
      loss (or loss and auxiliary data) and the gradients: a
      ``ProjectedGradient`` for each projected kernel. Second
      derivatives inside ``loss_fn`` (a gradient penalty) are right.

    Raises:
      ValueError: by that function, an ``opt_state`` without exactly one ``GaLoreState``, or in
        which a wrapper or an earlier link of a chain would see projected gradients; projectors
        that do not fit the kernels and ``proj_type``; a loss that uses a projected kernel otherwise
        than by ``linear`` (a penalty over all params).

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

    A Flax Linen or NNX module takes part by calling ``linear`` on its kernel: Linen with
    ``linear(x, self.param("kernel", init, shape))``, NNX with ``linear(x, self.kernel[...])`` on
    what ``nnx.split`` and ``nnx.to_pure_dict`` made the params.
    """

    def value_and_grad(params: Any, opt_state: optax.OptState, *args: Any, **kwargs: Any) -> Any:
        _check_route(opt_state)
        zeros = gradient_variables(params, opt_state, proj_type=proj_type, kernels=kernels)
        nodes = with_variables(params, opt_state, zeros)
        _check_uses(lambda nodes: loss_fn(nodes, *args, **kwargs), nodes)

        def loss_of(variables: Any) -> Any:
            return loss_fn(with_variables(params, opt_state, variables), *args, **kwargs)

        return jax.value_and_grad(loss_of, has_aux=has_aux)(zeros)

    return value_and_grad


def gradient_variables(
    params: Any,
    opt_state: optax.OptState,
    *,
    proj_type: ProjType = "std",
    kernels: Patterns | None = None,
) -> Any:
    """Makes the variables whose gradients ``galore`` takes; differentiate with respect to them.

    Args and errors are those of ``projected_value_and_grad``.

    Returns:
      The params' tree with a ``ProjectedGradient`` of zeros in the
      place of each projected kernel.

    >>> import jax.numpy as jnp, optax
    >>> from galore_jax import galore
    >>> params = {"kernel": jnp.ones((4, 6)), "bias": jnp.ones(6)}
    >>> state = galore(optax.sgd(0.1), rank=2).init(params)
    >>> gradient_variables(params, state)["kernel"].low_rank.shape
    (2, 6)
    """
    is_kernel = path_filter("" if kernels is None else kernels, "kernels")

    def variable(key_path: tuple[Any, ...], leaf: Any, projector: Any) -> Any:
        path, shape = leaf_path(key_path), leaf.shape if is_int8(leaf) else jnp.shape(leaf)
        if isinstance(projector, optax.MaskedNode) or not is_kernel(path):
            return float_variables(leaf)
        found = jax.tree.map(jnp.shape, projector, is_leaf=is_quantized)
        rank = (found.left if isinstance(found, TwoSided) else found)[-1]
        spec = MatrixSpec.of_kernel(shape, rank, proj_type)
        if found != spec.projector_shape:
            raise ValueError(
                f"the projectors {found} of {path} do not fit its shape {shape} and "
                f"proj_type={proj_type!r}; give the proj_type of the galore that made them, and in "
                "kernels only leaves whose last two axes are the matrix"
            )
        return ProjectedGradient(jnp.zeros(spec.low_shape, leaf.dtype), shape, spec.side)

    projectors = galore_state(opt_state).projector
    return jax.tree_util.tree_map_with_path(variable, params, projectors, is_leaf=is_int8)


def with_variables(params: Any, opt_state: optax.OptState, variables: Any) -> Any:
    """Puts variables of ``gradient_variables`` where a model looks for its params.

    Returns:
      The params' tree with a ``ProjectedKernel`` for each projected
      kernel, and the variables in the place of the other leaves.

    >>> import jax.numpy as jnp, optax
    >>> from galore_jax import galore
    >>> params = {"kernel": jnp.ones((4, 6))}
    >>> state = galore(optax.sgd(0.1), rank=2).init(params)
    >>> with_variables(params, state, gradient_variables(params, state))["kernel"].projector.shape
    (4, 2)
    """

    def node(variable: Any, kernel: Any, projector: Any) -> Any:
        if not is_projected_gradient(variable):
            return with_float_variables(kernel, variable)
        return ProjectedKernel(kernel, projector, variable)

    projectors = galore_state(opt_state).projector
    return jax.tree.map(node, variables, params, projectors, is_leaf=is_projected_gradient)


def project_gradients(
    grads: Any,
    opt_state: optax.OptState,
    *,
    proj_type: ProjType = "std",
    kernels: Patterns | None = None,
) -> Any:
    """Projects full gradients with the projectors of a state.

    Args and errors are those of ``projected_value_and_grad``.

    >>> import jax.numpy as jnp, optax
    >>> from galore_jax import galore
    >>> grads = {"kernel": jnp.ones((4, 6))}
    >>> project_gradients(grads, galore(optax.sgd(0.1), rank=2).init(grads))["kernel"].shape
    (4, 6)
    """

    def projected(variable: Any, gradient: jax.Array, projector: Any) -> Any:
        if not is_projected_gradient(variable):
            return gradient
        low_rank = project(gradient, dense(projector), variable.side)
        return ProjectedGradient(low_rank, variable.shape, variable.side)

    zeros = gradient_variables(grads, opt_state, proj_type=proj_type, kernels=kernels)
    projectors = galore_state(opt_state).projector
    return jax.tree.map(projected, zeros, grads, projectors, is_leaf=is_projected_gradient)


def galore_state(opt_state: optax.OptState) -> GaLoreState:
    """Finds the one ``GaLoreState`` inside an optimizer's state.

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


def _check_route(opt_state: optax.OptState) -> None:
    """Tells where something else than ``galore`` would see projected gradients first."""
    is_state = lambda node: isinstance(node, GaLoreState)  # noqa: E731
    if isinstance(opt_state, optax.MultiStepsState | optax.ApplyIfFiniteState):
        raise ValueError(
            f"optax.{type(opt_state).__name__.removesuffix('State')} cannot take projected "
            "gradients: use jax.value_and_grad with it, or add up the projected gradients of "
            "micro-batches with jax.tree.map and give the sum to galore itself"
        )
    if type(opt_state) is tuple and opt_state:
        first = opt_state[0]
        if any(map(is_state, jax.tree.leaves(first, is_leaf=is_state))):
            _check_route(first)
        elif any(map(is_state, jax.tree.leaves(opt_state, is_leaf=is_state))):
            warnings.warn(
                "the links before galore see projected gradients: a global norm there is that of "
                "the low-rank gradients; to clip by the full norm use jax.value_and_grad",
                stacklevel=4,
            )


def _check_uses(loss_fn: Callable[[Any], Any], nodes: Any) -> None:
    """Raises if a loss depends on a projected kernel otherwise than by ``linear``."""
    flat, treedef = jax.tree.flatten(nodes, is_leaf=is_projected_kernel)
    constants = {
        i: (node.kernel, node.projector) for i, node in enumerate(flat) if is_projected_kernel(node)
    }
    arrays, structure = jax.tree.flatten(constants)
    floating = {i: x for i, x in enumerate(arrays) if jnp.issubdtype(x.dtype, jnp.floating)}
    found: set[int] = set()

    def noted(values: dict[int, jax.Array]) -> list[jax.Array]:
        pairs = structure.unflatten(replaced(arrays, values))
        kernels = {i: ProjectedKernel(*pairs[i], gradient=flat[i].gradient) for i in pairs}
        out = loss_fn(treedef.unflatten(replaced(flat, kernels)))
        return [note_tangent(x, 0, found) for x in jax.tree.leaves(out) if isinstance(x, jax.Array)]

    def with_tangents(values: dict[int, jax.Array]) -> list[jax.Array]:
        # linear stops these tangents: one that arrives has come by another way.
        return jax.jvp(noted, (values,), (jax.tree.map(jnp.ones_like, values),))[0]

    jax.eval_shape(with_tangents, floating)
    if found:
        raise ValueError(
            "the loss uses a projected kernel, or its projector, otherwise than by "
            "galore_jax.linear (a penalty over all params?), where its gradient would be lost: "
            "leave that kernel out with kernels=..., or use jax.value_and_grad"
        )
