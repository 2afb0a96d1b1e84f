"""A refresh: new projectors, and the first moments that turn with them."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from galore_jax.lazy_refresh import next_times, overlap
from galore_jax.options import CheckedOptions
from galore_jax.projection import dense, rotate
from galore_jax.projectors import find_projector
from galore_jax.quantization import FirstMoment, Quantized, quantize_like

# As Optax names the first moments of its optimizers: linear in the gradients or the updates.
FIRST_MOMENTS = frozenset({"mu", "trace", "ema"})


def refresh_projectors(
    options: CheckedOptions, due: bool | jax.Array, gradients: Any, specs: Any, state: Any
) -> tuple[Any, optax.OptState, Any]:
    """Computes new projectors where they are due, and turns first moments to them.

    The matrices of a stack have their turns one after the other: the workspace is that of one. A
    matrix whose gradient is zero or not finite keeps all that it had; a first projector is then
    one of coordinate axes.

    Args:
      options: GaLore's.
      due: whether to do anything, a bool or () bool.
      gradients: a tree of gradients, full ones unless ``due`` is False.
      specs: a ``MatrixSpec`` for each leaf that is projected, else None.
      state: a ``GaLoreState``; its projectors are zeros if there are none yet.

    Returns:
      The projectors and the inner state, stored as before, and the refresh times: with lazy
      refreshes a matrix that is not due keeps all that it had.
    """
    if due is False:
        return state.projector, state.inner_state, state.refresh_times
    leaves, treedef = jax.tree_util.tree_flatten_with_path(gradients)
    spec, stored = treedef.flatten_up_to(specs), treedef.flatten_up_to(state.projector)
    lazy = options.lazy_refresh
    times = [()] * len(leaves) if lazy is None else treedef.flatten_up_to(state.refresh_times)
    nodes, inner_treedef = jax.tree.flatten(state.inner_state, is_leaf=_is_whole)
    moments_of = first_moments(state.inner_state) if options.rotate_moments else {}
    given = options.power_iterations
    rounds = (given, None) if isinstance(given, int) else (None, given)

    def refresh_all(before: dict[int, Any]) -> dict[int, Any]:
        # No key is made, and no random number drawn, where the projectors stay.
        key, after = jax.random.fold_in(jax.random.key(options.seed), state.count), {}
        for i, kept in before.items():
            # One leaf after the other: their workspaces are not to exist at once.
            gradient, after = jax.lax.optimization_barrier((leaves[i][1], after))
            matrix = spec[i].to_matrix(gradient)
            find = functools.partial(_refreshed, options.projector, spec[i])
            if lazy is None:
                after[i] = find(*rounds, key, matrix, *kept)
            else:
                rule = state.count, options.update_proj_gap, lazy
                after[i] = find(*rounds, key, matrix, *kept, rule)
        return after

    # Each projected leaf's projector, and its first moments and where these are.
    kept, at = {}, {}
    for i, (path, _) in enumerate(leaves):
        if spec[i] is not None:
            low = spec[i].low_shape
            pairs = moments_of.get(path, ())
            pairs = [x for x in pairs if getattr(nodes[x[0]], "shape", None) == low]
            at[i] = [first for first, _ in pairs]
            kept[i] = stored[i], [_decodable(nodes, *pair) for pair in pairs], times[i]
    kept = refresh_all(kept) if due is True else jax.lax.cond(due, refresh_all, _same, kept)
    for i, (projector, moments, new_times) in kept.items():
        stored[i], times[i] = projector, new_times
        for j, moment in zip(at[i], moments, strict=True):
            nodes[j] = moment.ratio if isinstance(moment, FirstMoment) else moment
    refresh_times = () if lazy is None else treedef.unflatten(times)
    return treedef.unflatten(stored), inner_treedef.unflatten(nodes), refresh_times


def first_moments(state: Any) -> dict[tuple[Any, ...], list[tuple[int, int | None]]]:
    """Finds the first moments in an optimizer's state, by the names that Optax uses.

    Those of a centred second moment (``rmsprop(centered=True)``) are not among them: turned alone
    they would make its variance negative.

    Returns:
      For the path of a leaf of the params where its first moments are, among the leaves of the
      state, a quantised array counting as one; and where the second moments beside them are.

    >>> import jax.numpy as jnp, optax
    >>> first_moments(optax.adam(0.1).init({"w": jnp.ones(2)}))
    {(DictKey(key='w'),): [(1, 2)]}
    """
    found: dict[tuple[Any, ...], list[tuple[int, int | None]]] = {}
    nodes, _ = jax.tree_util.tree_flatten_with_path(state, is_leaf=_is_whole)
    places = {path: i for i, (path, _) in enumerate(nodes)}
    second = jax.tree_util.GetAttrKey("nu")
    for path, i in places.items():
        for depth, key in enumerate(path, start=1):
            if getattr(key, "name", None) in FIRST_MOMENTS:
                beside = places.get((*path[: depth - 1], second, *path[depth:]))
                found.setdefault(path[depth:], []).append((i, beside))
                break
    return found


def _decodable(nodes: list[Any], first: int, second: int | None) -> Any:
    """A first moment, with the second one where its codes are a ratio to that."""
    moment = nodes[first]
    is_ratio = isinstance(moment, Quantized) and moment.encoding == "ratio"
    return FirstMoment(moment, nodes[second]) if is_ratio and second is not None else moment


def _is_whole(node: Any) -> bool:
    return isinstance(node, Quantized | optax.ScaleByRStdDevState)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _refreshed(
    method, spec, rounds, traced_rounds, key, gradient, stored, moments, times, rule=None
):
    """The projector, the first moments and the refresh times of one leaf, stored as before."""

    def refresh_one(operands: Any) -> Any:
        gradient, stored, moments, times = operands
        old = dense(stored)
        is_usable = jnp.isfinite(gradient).all() & (gradient != 0).any()
        is_empty = jnp.bool_(True)
        for array in jax.tree.leaves(stored):
            is_empty &= (array == 0).all()

        def keep_or(before: Any, new: Any) -> Any:
            if isinstance(before, Quantized | FirstMoment):
                new = quantize_like(before, new)
            take = lambda a, b: jnp.where(is_usable | is_empty, a.astype(b.dtype), b)  # noqa: E731
            return jax.tree.map(take, new, before)

        found = find_projector(
            method,
            jnp.where(is_usable, gradient, 0),
            spec.rank,
            spec.side,
            old=old,
            key=key,
            power_iterations=traced_rounds if rounds is None else rounds,
        )
        new = jax.tree.map(keep_or, stored, found, is_leaf=_is_whole)
        turned = [rotate(dense(moment), old, dense(new), spec.side) for moment in moments]
        if rule is not None:
            count, gap, threshold = rule
            seen = overlap(old, found)
            times = next_times(times, count, seen, is_usable, gap=gap, threshold=threshold)
        return new, [keep_or(*pair) for pair in zip(moments, turned, strict=True)], times

    def refresh_if_due(operands: Any) -> Any:
        if rule is None:
            return refresh_one(operands)
        is_due = rule[0] >= operands[-1].due_at
        return jax.lax.cond(is_due, refresh_one, lambda operands: operands[1:], operands)

    operands, stack = (gradient, stored, moments, times), gradient.shape[:-2]
    if not stack:
        return refresh_if_due(operands)
    flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[len(stack) :]), operands)
    out = jax.lax.map(refresh_if_due, flat)
    return jax.tree.map(lambda x: x.reshape(*stack, *x.shape[1:]), out)


def _same(kept: Any) -> Any:
    return kept
