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


def in_auto_mode(fn: Callable[..., Any], operands: Any, like: Any) -> Any:
    """``fn(operands)``, where the compiler decides how intermediate results are sharded.

    On a mesh with explicit axes (the default of ``jax.make_mesh``) every product of sharded arrays
    would ask for an output sharding. ``fn`` runs with automatic ones, and its results are sharded
    as the arrays of ``like``, a tree of their structure. Elsewhere it is just called.

    >>> import jax.numpy as jnp
    >>> in_auto_mode(lambda x: 2 * x, jnp.ones(()), jnp.ones(())).item()
    2.0
    """
    meshes = [
        sharding.mesh
        for leaf in jax.tree.leaves(operands)
        if (sharding := _explicit_sharding(leaf)) is not None
    ]
    if not meshes:
        return fn(operands)

    def of(leaf: Any) -> NamedSharding:
        return _explicit_sharding(leaf) or NamedSharding(meshes[0], P(*(None,) * jnp.ndim(leaf)))

    return jax.sharding.auto_axes(fn, out_sharding=jax.tree.map(of, like))(operands)


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
