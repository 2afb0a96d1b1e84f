"""An optimizer that takes each matrix of a stack for a leaf of its own."""

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from galore_jax.dependence import depends_on
from galore_jax.selection import compiled_patterns, leaf_path

# Fields of Optax's states whose dicts have keys of their own, not those of the params.
_OTHER_KEYS = frozenset({"inner_states", "hyperparams", "hyperparams_states"})

Stack = tuple[int, ...]  # the sizes of the leading axes that index matrices
Owners = Sequence[int | None]  # for each array the index of the leaf it belongs to


def per_matrix(
    optimizer: optax.GradientTransformationExtraArgs, stacks: Mapping[int, Stack]
) -> optax.GradientTransformationExtraArgs:
    """Runs an optimizer under ``jax.vmap`` over stacked leaves.

    Norms, trust ratios, factored moments and clipping by leaf (lamb, lars, novograd, adafactor) are
    then those of each matrix, as in a loop over the stack. Where leaves depend on each other (a
    global norm, prodigy) or the optimizer draws random numbers, it runs on the stacks as they are.

    Args:
      optimizer: the optimizer.
      stacks: for the indices of stacked leaves (of the flat params), their leading sizes.

    Returns:
      A transformation with a state of the optimizer's structure, whose arrays for a stacked leaf
      are stacked too.

    Raises:
      ValueError: by ``update``, an optimizer that lets leaves depend on each other and whose state
        on stacks has another layout (a global norm in a chain with adafactor).

    >>> import jax.numpy as jnp, optax
    >>> novograd = optax.with_extra_args_support(optax.novograd(0.1))
    >>> state = per_matrix(novograd, {0: (3,)}).init({"w": jnp.ones((3, 4, 5))})
    >>> state[0].mu["w"].shape, state[0].nu["w"].shape
    ((3, 4, 5), (3,))
    """
    stacks = {i: stack for i, stack in stacks.items() if stack}
    if not stacks:
        return optimizer

    def init(params: optax.Params) -> optax.OptState:
        leaves, treedef = jax.tree.flatten(params)
        layout = _find_layout(optimizer, leaves, treedef, stacks)
        if layout.as_plain or not layout.apart:
            return optimizer.init(params)

        def init_one(flat: list[jax.Array]) -> list[jax.Array]:
            return jax.tree.leaves(optimizer.init(treedef.unflatten(flat)))

        owners = list(range(len(leaves)))
        return layout.treedef.unflatten(
            _over_stacks(init_one, owners, layout.owners, stacks)(leaves)
        )

    def update(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        gradients, treedef = jax.tree.flatten(updates)
        weights = [] if params is None else treedef.flatten_up_to(params)
        layout = _find_layout(optimizer, gradients, treedef, stacks)
        arrays = jax.tree.leaves(state)
        of_leaves: Owners = list(range(len(gradients)))
        owners_in = [*of_leaves, *of_leaves[: len(weights)], *layout.owners]
        owners_out = [*of_leaves, *layout.owners]
        bounds = len(gradients), len(gradients) + len(weights)

        def update_one(flat: list[jax.Array]) -> list[jax.Array]:
            gradients, weights, arrays = _split(flat, *bounds)
            new_updates, new_state = optimizer.update(
                treedef.unflatten(gradients),
                layout.treedef.unflatten(arrays),
                treedef.unflatten(weights) if weights else None,
                **extra_args,
            )
            return [*treedef.flatten_up_to(new_updates), *jax.tree.leaves(new_state)]

        flat = [*gradients, *weights, *arrays]
        apart = layout.apart and _keeps_apart(update_one, flat, owners_in, owners_out, stacks)
        if not apart:
            if layout.apart and not layout.as_plain:
                raise ValueError(
                    "the optimizer lets leaves depend on each other (a global norm?) and keeps "
                    "more than moments of a leaf's shape: on stacked leaves these do not go "
                    "together; put the former before galore(...)"
                )
            return optimizer.update(updates, state, params, **extra_args)
        out = _over_stacks(update_one, owners_in, owners_out, stacks)(flat)
        return (
            treedef.unflatten(out[: len(gradients)]),
            layout.treedef.unflatten(out[len(gradients) :]),
        )

    return optax.GradientTransformationExtraArgs(init, update)


def per_layer(
    optimizer: optax.GradientTransformation, stacked_modules: str | Sequence[str]
) -> optax.GradientTransformationExtraArgs:
    """:func:`per_matrix` for whole layers stacked along the first axis of their leaves.

    Args:
      optimizer: the optimizer.
      stacked_modules: regular expressions on the paths of the stacked leaves.

    >>> import jax.numpy as jnp, optax
    >>> params = {"blocks": {"kernel": jnp.ones((3, 4, 5))}, "head": jnp.ones((4, 5))}
    >>> state = per_layer(optax.novograd(0.1), "^blocks/").init(params)
    >>> state[0].nu["blocks"]["kernel"].shape, state[0].nu["head"].shape
    ((3,), ())
    """
    inner = optax.with_extra_args_support(optimizer)

    def init(params: optax.Params) -> optax.OptState:
        return per_matrix(inner, layer_stacks(params, stacked_modules)).init(params)

    def update(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        of_each = per_matrix(inner, layer_stacks(updates, stacked_modules))
        return of_each.update(updates, state, params, **extra_args)

    return optax.GradientTransformationExtraArgs(init, update)


def layer_stacks(tree: Any, stacked_modules: str | Sequence[str] | None) -> dict[int, Stack]:
    """The first axis of each stacked leaf, by its index in the flat tree.

    >>> import jax.numpy as jnp
    >>> layer_stacks({"blocks": jnp.ones((3, 4)), "head": jnp.ones(4)}, "^blocks")
    {0: (3,)}
    """
    if stacked_modules is None:
        return {}
    patterns = compiled_patterns(stacked_modules)
    return {
        i: jnp.shape(leaf)[:1]
        for i, (path, leaf) in enumerate(jax.tree_util.tree_leaves_with_path(tree))
        if any(pattern.search(leaf_path(path)) for pattern in patterns)
    }


@dataclasses.dataclass(frozen=True)
class _Layout:
    """The state of an optimizer on single matrices.

    Attributes:
      treedef: its structure.
      owners: for each of its arrays the index of the leaf it belongs to, or None.
      apart: whether ``init`` makes each array from its own leaf alone.
      as_plain: whether, stacked, it has the shapes of the state that is made on the stacks.
    """

    treedef: Any
    owners: Owners
    apart: bool
    as_plain: bool


def _find_layout(
    optimizer: optax.GradientTransformation,
    leaves: Sequence[jax.Array],
    treedef: Any,
    stacks: Mapping[int, Stack],
) -> _Layout:
    of_leaves: Owners = list(range(len(leaves)))
    single = _single(leaves, of_leaves, stacks)
    state = jax.eval_shape(optimizer.init, treedef.unflatten(single))
    owners = find_owners(state, treedef.unflatten(single))

    def init(flat: list[jax.Array]) -> list[jax.Array]:
        return jax.tree.leaves(optimizer.init(treedef.unflatten(flat)))

    plain = jax.eval_shape(init, list(leaves))
    stacked = [
        (*stacks.get(-1 if owner is None else owner, ()), *x.shape)
        for x, owner in zip(jax.tree.leaves(state), owners, strict=True)
    ]
    return _Layout(
        jax.tree.structure(state),
        owners,
        _keeps_apart(init, leaves, of_leaves, owners, stacks),
        stacked == [x.shape for x in plain],
    )


def one_by_one(fn: Callable[[Any], Any], operands: Any, depth: int) -> Any:
    """``fn`` of each element of stacks with ``depth`` leading axes, one after the other.

    Unlike under ``jax.vmap``, what ``fn`` needs in between exists for one element at a time.

    >>> import jax.numpy as jnp
    >>> one_by_one(lambda x: x.sum(), jnp.ones((2, 3, 4)), depth=2).tolist()
    [[4.0, 4.0, 4.0], [4.0, 4.0, 4.0]]
    """
    if not depth:
        return fn(operands)
    stack = jnp.shape(jax.tree.leaves(operands)[0])[:depth]
    flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[depth:]), operands)
    out = jax.lax.map(fn, flat)
    return jax.tree.map(lambda x: x.reshape(*stack, *x.shape[1:]), out)


def find_owners(state: optax.OptState, params: optax.Params) -> Owners:
    """The leaf that each array of a state belongs to: the one whose path its own path contains.

    >>> import jax.numpy as jnp, optax
    >>> params = {"a": jnp.ones(3), "b": jnp.ones(4)}
    >>> find_owners(optax.adam(0.1).init(params), params)
    [None, 0, 1, 0, 1]
    """
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    return [find_owner(path, paths) for path, _ in jax.tree_util.tree_leaves_with_path(state)]


def find_owner(path: Any, of_leaves: Sequence[Any], *, whole: bool = False) -> int | None:
    """The index of the leaf path that a path in a state contains, after the name of a field.

    Args:
      path: a key path in a state.
      of_leaves: key paths in the params.
      whole: whether it must end there.

    >>> import jax.numpy as jnp, optax
    >>> params = {"a": jnp.ones(3), "b": jnp.ones(4)}
    >>> leaves = [path for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    >>> state = jax.tree_util.tree_leaves_with_path(optax.adam(0.1).init(params))
    >>> find_owner(state[2][0], leaves)
    1
    """
    owner = None
    for start in range(1, len(path)):
        field = getattr(path[start - 1], "name", None)
        if field is None or field in _OTHER_KEYS:
            continue
        for index, of_leaf in enumerate(of_leaves):
            here = path[start:] if whole else path[start : start + len(of_leaf)]
            if of_leaf and here == of_leaf:
                owner = index
    return owner


def keeps_leaves_apart(
    optimizer: optax.GradientTransformationExtraArgs, params: optax.Params, **extra_args: Any
) -> bool:
    """Whether an update can be made leaf by leaf.

    That is whether no leaf's gradient reaches another leaf's update or state, or a state that
    belongs to none, and no random number is drawn.

    Args:
      optimizer: the optimizer.
      params: arrays or shapes.
      extra_args: of its update.

    >>> import jax.numpy as jnp, optax
    >>> params = {"a": jnp.ones(3), "b": jnp.ones(4)}
    >>> [keeps_leaves_apart(tx, params) for tx in (optax.adam(0.1), optax.clip_by_global_norm(1))]
    [True, False]
    """
    leaves, treedef = jax.tree.flatten(params)
    state = jax.eval_shape(optimizer.init, params)
    owners = [*range(len(leaves)), *find_owners(state, params)]

    def update(leaves: list[Any], state: optax.OptState, params: Any) -> list[Any]:
        updates, state = optimizer.update(treedef.unflatten(leaves), state, params, **extra_args)
        return [*treedef.flatten_up_to(updates), *jax.tree.leaves(state)]

    jaxpr = jax.make_jaxpr(update)(leaves, state, params).jaxpr
    if _draws(jaxpr):
        return False
    return all(
        owners[out] == leaf for leaf in range(len(leaves)) for out in depends_on(jaxpr, [leaf])
    )


def _draws(jaxpr: Any) -> bool:
    text = str(jaxpr)
    return "random_" in text or "threefry" in text


def _over_stacks(
    fn: Callable[[list[jax.Array]], list[jax.Array]],
    owners_in: Owners,
    owners_out: Owners,
    stacks: Mapping[int, Stack],
) -> Callable[[list[jax.Array]], list[jax.Array]]:
    """``fn`` of single matrices, mapped over the leading axes of what belongs to stacked leaves."""
    for stack in dict.fromkeys(stacks.values()):
        axes_of = lambda owners, stack=stack: [  # noqa: E731
            0 if stacks.get(-1 if owner is None else owner) == stack else None for owner in owners
        ]
        for size in reversed(stack):
            fn = jax.vmap(
                fn,
                in_axes=(axes_of(owners_in),),
                out_axes=axes_of(owners_out),
                axis_size=size,
            )
    return fn


def _single(
    arrays: Sequence[jax.Array], owners: Owners, stacks: Mapping[int, Stack]
) -> list[jax.ShapeDtypeStruct]:
    """The shapes of the arrays without the axes of their stacks."""
    depth = [0 if owner is None else len(stacks.get(owner, ())) for owner in owners]
    return [
        jax.ShapeDtypeStruct(jnp.shape(x)[d:], jnp.result_type(x))
        for x, d in zip(arrays, depth, strict=True)
    ]


def _keeps_apart(
    fn: Callable[[list[jax.Array]], list[jax.Array]],
    arrays: Sequence[jax.Array],
    owners_in: Owners,
    owners_out: Owners,
    stacks: Mapping[int, Stack],
) -> bool:
    """Whether a stacked leaf reaches its own results alone, and no random number is drawn."""
    jaxpr = jax.make_jaxpr(fn)(_single(arrays, owners_in, stacks)).jaxpr
    if _draws(jaxpr):
        return False
    for leaf in stacks:
        mine = [i for i, owner in enumerate(owners_in) if owner == leaf]
        if any(owners_out[i] != leaf for i in depends_on(jaxpr, mine)):
            return False
    return True


def _split(flat: Sequence[jax.Array], *at: int) -> list[Sequence[jax.Array]]:
    bounds = [0, *at, len(flat)]
    return [flat[a:b] for a, b in itertools.pairwise(bounds)]
