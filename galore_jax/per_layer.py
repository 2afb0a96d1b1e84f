"""Stacked layers: an optimizer that takes each matrix of a stack as a leaf of its own.

A stacked leaf has leading axes that index layers, as ``jax.lax.scan`` wants them. Each such leaf
goes through a ``jax.vmap`` of its own, so that JAX itself tells whether anything of one leaf
reaches another.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer
from jax.extend.core import jaxpr_as_fun

from galore_jax.weights import Patterns, leaf_path, path_filter


def per_layer(
    optimizer: optax.GradientTransformation, stacked_modules: Patterns
) -> optax.GradientTransformationExtraArgs:
    """Runs an optimizer on each layer of stacked leaves, see ``over_stacks``.

    Args:
      optimizer: the optimizer.
      stacked_modules: regular expressions on the paths of leaves whose first axis indexes layers.

    >>> import jax.numpy as jnp, optax
    >>> params = {"blocks": {"kernel": jnp.ones((3, 4, 5))}, "head": jnp.ones((4, 5))}
    >>> state = per_layer(optax.novograd(0.1), "^blocks/").init(params)
    >>> state[0].nu["blocks"]["kernel"].shape, state[0].nu["head"].shape
    ((3,), ())
    """
    inner = optax.with_extra_args_support(optimizer)

    def init(params: optax.Params) -> optax.OptState:
        return over_stacks(inner, layer_depths(params, stacked_modules)).init(params)

    def update(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        tx = over_stacks(inner, layer_depths(updates, stacked_modules))
        return tx.update(updates, state, params, **extra_args)

    return optax.GradientTransformationExtraArgs(init, update)


def layer_depths(tree: Any, stacked_modules: Patterns | None) -> Any:
    """Gives each leaf 1 if its first axis indexes layers, else 0.

    >>> import jax.numpy as jnp
    >>> layer_depths({"blocks": jnp.ones((3, 4)), "head": jnp.ones(4)}, "^blocks")
    {'blocks': 1, 'head': 0}
    """
    is_stacked = path_filter(stacked_modules, "stacked_modules")
    return jax.tree_util.tree_map_with_path(lambda p, _: int(is_stacked(leaf_path(p))), tree)


def over_stacks(
    optimizer: optax.GradientTransformationExtraArgs, depths: Any
) -> optax.GradientTransformationExtraArgs:
    """Runs an optimizer under ``jax.vmap`` over the leading axes of stacked leaves.

    Norms, trust ratios, factored moments and clipping by leaf (lamb, lars, novograd, adafactor) are
    then those of each matrix, as in a loop over the stack. Where leaves depend on one another (a
    global norm, prodigy) or the optimizer draws random numbers, it runs on the stacks as they are.

    Args:
      optimizer: the optimizer.
      depths: for each leaf of the params the number of its leading axes that index matrices.

    Returns:
      A transformation with a state of the optimizer's structure, whose arrays for a stacked leaf
      are stacked too.

    Raises:
      ValueError: by ``update``, an optimizer that lets leaves depend on one another and whose state
        on stacks has another layout (a global norm in a chain with adafactor).

    >>> import jax.numpy as jnp, optax
    >>> novograd = optax.with_extra_args_support(optax.novograd(0.1))
    >>> state = over_stacks(novograd, {"w": 1}).init({"w": jnp.ones((3, 4, 5))})
    >>> state[0].mu["w"].shape, state[0].nu["w"].shape
    ((3, 4, 5), (3,))
    """
    if not any(jax.tree.leaves(depths)):
        return optimizer

    def init(params: optax.Params) -> optax.OptState:
        # Without their shardings: an explicit one cannot be mapped over.
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(jnp.shape(x), x.dtype), params)
        one = jax.tree.map(
            lambda x, depth: jax.ShapeDtypeStruct(x.shape[depth:], x.dtype), shapes, depths
        )
        owners = _owners(optimizer, jax.eval_shape(optimizer.init, one), depths)
        on_stacks = _over_leaves(optimizer.init, depths, owners)
        if _traced(on_stacks, shapes) is None:
            return optimizer.init(params)
        # Zeros made on the stacks themselves are sharded as these are.
        plain, stacked = (jax.eval_shape(init, shapes) for init in (optimizer.init, on_stacks))
        return optimizer.init(params) if plain == stacked else on_stacks(params)

    def update(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        owners = _owners(optimizer, state, depths)
        one = functools.partial(optimizer.update, **extra_args)
        on_stacks = _over_leaves(one, depths, owners, is_update=True, has_params=params is not None)
        if traced := _traced(on_stacks, updates, state, params):
            return traced()
        plain = jax.eval_shape(optimizer.init, updates)
        if jax.tree.map(jnp.shape, plain) != jax.tree.map(jnp.shape, state):
            raise ValueError(
                "the optimizer lets leaves depend on each other (a global norm?) and keeps "
                "more than moments of a leaf's shape: on stacked leaves these do not go "
                "together; put the former before galore(...)"
            )
        return optimizer.update(updates, state, params, **extra_args)

    return optax.GradientTransformationExtraArgs(init, update)


def is_leafwise(
    optimizer: optax.GradientTransformationExtraArgs, params: optax.Params, **extra_args: Any
) -> bool:
    """Tells whether an update can be made leaf by leaf.

    That is whether no leaf's gradient reaches another leaf's update or state, or a state that
    belongs to none, and no random number is drawn.

    Args:
      optimizer: the optimizer.
      params: arrays or shapes.
      extra_args: the update's other arguments.

    >>> import jax.numpy as jnp, optax
    >>> params = {"a": jnp.ones(3), "b": jnp.ones(4)}
    >>> [is_leafwise(tx, params) for tx in (optax.adam(0.1), optax.clip_by_global_norm(1))]
    [True, False]
    """
    tx = optax.with_extra_args_support(optimizer)
    one = jax.tree.map(lambda _: 1, params)
    state = jax.eval_shape(tx.init, params)
    owners = _owners(tx, state, one)

    def twice(x: Any, is_twice: bool) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((2, *x.shape) if is_twice else x.shape, x.dtype)

    update = _over_leaves(
        functools.partial(tx.update, **extra_args), one, owners, is_update=True, has_params=True
    )
    doubled = jax.tree.map(lambda x: twice(x, True), params)
    state = jax.tree.map(lambda x, owner: twice(x, owner >= 0), state, owners)
    return _traced(update, doubled, state, doubled) is not None


def layer_axes(optimizer: optax.GradientTransformation, state: optax.OptState, depths: Any) -> Any:
    """Tells which arrays of an optimizer's state have a leading layer axis.

    Args:
      optimizer: the optimizer.
      state: its state, arrays or shapes.
      depths: for each leaf of the params 1 if its first axis indexes layers, else 0.

    Returns:
      A tree of bools with the state's structure.

    >>> import jax.numpy as jnp, optax
    >>> params = {"blocks": jnp.ones((3, 4)), "head": jnp.ones(4)}
    >>> tx = optax.trace(0.9)
    >>> layer_axes(tx, tx.init(params), {"blocks": 1, "head": 0}).trace
    {'blocks': True, 'head': False}
    """
    depth_of = [*jax.tree.leaves(depths), 0]
    return jax.tree.map(lambda owner: bool(depth_of[owner]), _owners(optimizer, state, depths))


def take_layer(tree: Any, axes: Any, index: jax.typing.ArrayLike) -> Any:
    """Takes one layer of the stacked arrays of a tree, and the other arrays as they are.

    >>> import jax.numpy as jnp
    >>> take_layer([jnp.arange(3), jnp.ones(1)], [True, False], 2)[0].item()
    2
    """

    def take(x: jax.Array, is_stacked: bool) -> jax.Array:
        return jax.lax.dynamic_index_in_dim(x, index, keepdims=False) if is_stacked else x

    return jax.tree.map(take, tree, axes)


def put_layer(tree: Any, axes: Any, index: jax.typing.ArrayLike, layer: Any) -> Any:
    """Puts one layer into the stacked arrays of a tree; other arrays are the layer's.

    >>> import jax.numpy as jnp
    >>> put_layer([jnp.arange(3)], [True], 1, [jnp.int32(7)])[0].tolist()
    [0, 7, 2]
    """

    def put(x: jax.Array, is_stacked: bool, new: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_index_in_dim(x, new, index, 0) if is_stacked else new

    return jax.tree.map(put, tree, axes, layer)


def _owners(optimizer: Any, state: optax.OptState, params: Any) -> Any:
    """For each array of a state the index of the leaf that it belongs to, or -1."""
    leaves, treedef = jax.tree.flatten(params)
    indices = treedef.unflatten(range(len(leaves)))

    def mark(like_params: Any, indices: Any) -> Any:
        return jax.tree.map(lambda i, x: jax.tree.map(lambda _: i, x), indices, like_params)

    return optax.tree_utils.tree_map_params(
        optimizer,
        mark,
        state,
        indices,
        transform_non_params=lambda x: jax.tree.map(lambda _: -1, x),
        is_leaf=lambda _: True,
    )


def _over_leaves(
    fn: Any, depths: Any, owners: Any, *, is_update: bool = False, has_params: bool = False
) -> Any:
    """An ``init`` or ``update``, mapped over the leading axes of each stacked leaf in its turn."""
    stacks, treedef = jax.tree.flatten(depths)
    for index, depth in enumerate(stacks):
        axes = jax.tree.map(lambda owner, i=index: 0 if owner == i else None, owners)
        params = treedef.unflatten([0 if i == index else None for i in range(len(stacks))])
        for _ in range(depth):
            if is_update:
                in_axes = (params, axes, params if has_params else None)
                fn = jax.vmap(fn, in_axes=in_axes, out_axes=(params, axes))
            else:
                fn = jax.vmap(fn, in_axes=(params,), out_axes=axes)
    return fn


def _traced(fn: Any, *arguments: Any) -> Callable[[], Any] | None:
    """A call of ``fn``; None if it lets leaves depend on one another, or draws random numbers."""
    try:
        program, out = jax.make_jaxpr(fn, return_shape=True)(*arguments)
    except ValueError as error:
        # As jax.vmap has it of a result that should not, but does, depend on what it maps over.
        if "output was batched" not in str(error):
            raise
        return None
    # Under a vmap every layer would draw the same numbers.
    text, leaves = str(program), jax.tree.leaves(arguments)
    if "random_" in text or "threefry" in text:
        return None
    if not any(isinstance(leaf, Tracer) for leaf in leaves):
        return lambda: fn(*arguments)  # a new program would be compiled anew at each eager call
    return lambda: jax.tree.unflatten(jax.tree.structure(out), jaxpr_as_fun(program)(*leaves))
