"""Sharded params of a distributed trainer: a state that is sharded too, on meshes of any kind."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P


def zeros_beside(
    leaf: Any, axes: Sequence[int | None], shape: Sequence[int], dtype: jax.typing.DTypeLike
) -> jax.Array:
    """Zeros on the devices of a leaf, sharded as the given axes of it.

    Args:
      leaf: an array, or a shape (then the zeros go to the default device).
      axes: for each axis of the zeros the axis of the leaf that it is cut or made from, or None.
        An axis whose size the mesh does not divide is not sharded, nor is a mesh axis used twice.
      shape: of the zeros.
      dtype: of the zeros.

    >>> import jax.numpy as jnp
    >>> zeros_beside(jnp.ones((8, 4)), (0, None), (8, 2), "bfloat16").dtype
    dtype(bfloat16)
    """
    sharding = _sharding(leaf)
    if sharding is None:
        return jnp.zeros(shape, dtype)
    of_leaf = [*sharding.spec, *(None,) * (jnp.ndim(leaf) - len(sharding.spec))]
    spec, used = [], set()
    for axis, size in zip(axes, shape, strict=True):
        entry = None if axis is None else of_leaf[axis]
        names = entry if isinstance(entry, tuple) else () if entry is None else (entry,)
        parts = math.prod(sharding.mesh.shape[name] for name in names)
        fits = size % parts == 0 and not used.intersection(names)
        spec.append(entry if fits else None)
        used.update(names if fits else ())
    return jnp.zeros(shape, dtype, device=NamedSharding(sharding.mesh, P(*spec)))


def in_auto_mode(
    fn: Callable[..., Any], arguments: tuple[Any, ...], options: dict[str, Any], *, like: Any
) -> Any:
    """Calls ``fn(*arguments, **options)`` where the compiler shards intermediate results.

    On a mesh with explicit axes (the default of ``jax.make_mesh``) every product of sharded arrays
    would ask for an output sharding. ``fn`` runs with automatic ones, and its results are sharded
    as the arrays of ``like``, a tree of their structure. Elsewhere it is just called.

    >>> import jax.numpy as jnp
    >>> in_auto_mode(lambda x: 2 * x, (jnp.ones(()),), {}, like=jnp.ones(())).item()
    2.0
    """
    leaves, treedef = jax.tree.flatten((arguments, options))
    is_array = [isinstance(leaf, jax.Array) for leaf in leaves]
    arrays = [leaf for leaf in leaves if isinstance(leaf, jax.Array)]
    shardings = [sharding for x in arrays if (sharding := _explicit_sharding(x)) is not None]
    if not shardings:
        return fn(*arguments, **options)

    def call(arrays: list[jax.Array]) -> Any:
        given = iter(arrays)
        pairs = zip(leaves, is_array, strict=True)
        positional, named = treedef.unflatten([next(given) if is_ else x for x, is_ in pairs])
        return fn(*positional, **named)

    def sharding_of(leaf: Any) -> NamedSharding:
        replicated = NamedSharding(shardings[0].mesh, P(*(None,) * jnp.ndim(leaf)))
        return _explicit_sharding(leaf) or replicated

    return jax.sharding.auto_axes(call, out_sharding=jax.tree.map(sharding_of, like))(arrays)


def _sharding(leaf: Any) -> NamedSharding | None:
    if isinstance(leaf, Tracer):
        return _explicit_sharding(leaf)
    sharding = getattr(leaf, "sharding", None)
    return sharding if isinstance(sharding, NamedSharding) else None


def _explicit_sharding(leaf: Any) -> NamedSharding | None:
    sharding = getattr(jax.typeof(leaf), "sharding", None)
    if not isinstance(sharding, NamedSharding) or sharding.mesh.empty:
        return None
    return sharding if AxisType.Explicit in sharding.mesh.axis_types else None
