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

    @functools.lru_cache(8)
    def axes_of(state_treedef: Any) -> list[tuple[Any, Any]]:
        state = state_treedef.unflatten(range(state_treedef.num_leaves))
        return _mapped_axes(depths, _owners(optimizer, state, depths))

    def init(params: optax.Params) -> optax.OptState:
        # Without their shardings: an explicit one cannot be mapped over.
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(jnp.shape(x), x.dtype), params)
        one = jax.tree.map(
            lambda x, depth: jax.ShapeDtypeStruct(x.shape[depth:], x.dtype), shapes, depths
        )
        on_stacks = optimizer.init
        for of_params, of_state in axes_of(jax.tree.structure(jax.eval_shape(optimizer.init, one))):
            on_stacks = jax.vmap(on_stacks, in_axes=(of_params,), out_axes=of_state)
        found = _leafwise_program(on_stacks, shapes)
        # Zeros made on the stacks themselves are sharded as these are.
        if found is None or found[1] == jax.eval_shape(optimizer.init, shapes):
            return optimizer.init(params)
        return on_stacks(params)

    def update(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        axes, arguments = axes_of(jax.tree.structure(state)), (updates, state, params)
        on_stacks = _over_leaves(optimizer, axes, has_params=params is not None, **extra_args)
        if found := _leafwise_program(on_stacks, *arguments):
            program, out = found
            leaves = jax.tree.leaves(arguments)
            if not any(isinstance(leaf, Tracer) for leaf in leaves):
                return on_stacks(*arguments)  # an eager call would compile a new program each time
            return jax.tree.unflatten(jax.tree.structure(out), jaxpr_as_fun(program)(*leaves))
        if _shapes(jax.eval_shape(optimizer.init, updates)) != _shapes(state):
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

    def twice(x: Any, owner: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((2, *x.shape) if owner >= 0 else x.shape, x.dtype)

    update = _over_leaves(tx, _mapped_axes(one, owners), has_params=True, **extra_args)
    doubled = jax.tree.map(twice, params, one)
    state = jax.tree.map(twice, state, owners)
    return _leafwise_program(update, doubled, state, doubled) is not None


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

    def mark(like_params: Any, indices: Any) -> Any:
        return jax.tree.map(_fill, indices, like_params)

    try:
        return optax.tree_utils.tree_map_params(
            optimizer,
            mark,
            state,
            treedef.unflatten(range(len(leaves))),
            transform_non_params=lambda x: _fill(-1, x),
            is_leaf=lambda _: True,
        )
    except (AttributeError, IndexError, KeyError, TypeError):
        # An init that is no jax.tree.map ({k: ... for k in params}) fails on Optax's placeholder.
        return _owners_by_path(state, params)


def _owners_by_path(state: optax.OptState, params: Any) -> Any:
    """The same for a state that has the keys of the params: by the whole path of a leaf."""
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    index = {path: i for i, path in enumerate(paths)}

    def owner(path: tuple[Any, ...], _: Any) -> int:
        parts = (path[i:j] for i in range(len(path)) for j in range(len(path), i, -1))
        return next((index[part] for part in parts if part in index), -1)

    return jax.tree_util.tree_map_with_path(owner, state)


def _fill(value: Any, tree: Any) -> Any:
    return jax.tree.map(lambda _: value, tree)


def _shapes(tree: Any) -> Any:
    return jax.tree.map(jnp.shape, tree)


def _mapped_axes(depths: Any, owners: Any) -> list[tuple[Any, Any]]:
    """What ``jax.vmap`` maps, of params and of state, for each leading axis of each stack."""
    stacks, treedef = jax.tree.flatten(depths)
    axes = []
    for index, depth in enumerate(stacks):
        of_params = treedef.unflatten([0 if i == index else None for i in range(len(stacks))])
        of_state = jax.tree.map(lambda owner, i=index: 0 if owner == i else None, owners)
        axes += [(of_params, of_state)] * depth
    return axes


def _over_leaves(
    optimizer: optax.GradientTransformationExtraArgs,
    axes: list[tuple[Any, Any]],
    *,
    has_params: bool,
    **extra_args: Any,
) -> Callable[..., Any]:
    """An optimizer's ``update``, mapped over the leading axes of each stacked leaf in its turn."""
    update = functools.partial(optimizer.update, **extra_args)
    for params, state in axes:
        in_axes = (params, state, params if has_params else None)
        update = jax.vmap(update, in_axes=in_axes, out_axes=(params, state))
    return update


def _leafwise_program(fn: Any, *arguments: Any) -> tuple[Any, Any] | None:
    """The jaxpr of ``fn`` and its results' shapes; None if leaves depend on one another in it.

    None too if it draws random numbers: under a vmap every layer would draw the same.
    """
    try:
        program, out = jax.make_jaxpr(fn, return_shape=True)(*arguments)
    except ValueError as error:
        # As jax.vmap has it of a result that should not, but does, depend on what it maps over.
        if "output was batched" not in str(error):
            raise
        return None
    text = str(program)
    return None if "random_" in text or "threefry" in text else (program, out)
