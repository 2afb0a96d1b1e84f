"""Any Optax transformation, ready for ``nnx.Optimizer`` on a mesh."""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P


def for_nnx(
    optimizer: optax.GradientTransformation | optax.MultiSteps,
) -> optax.GradientTransformationExtraArgs:
    """Lets ``flax.nnx.Optimizer`` keep a state whose arrays have other shapes than the params.

    ``nnx.Optimizer`` gives each array of a state the ``out_sharding`` of the param it is made from.
    On a mesh it raises where their axes differ in number, as those of a low-rank moment and a
    kernel of three axes do, and shards along the wrong axes where it does not raise. Here each
    array of the state is a variable with its own sharding, and keeps it through every update.

    Args:
      optimizer: ``galore_jax.galore``, one of its aliases, any other Optax optimizer, or an
        ``optax.MultiSteps`` of one.

    Returns:
      The same transformation for ``nnx.Optimizer``, and what wraps one (Tunix's ``PeftTrainer``).
      It takes variables in ``init`` and arrays in ``update``, as ``nnx.Optimizer`` passes them.
      Make the ``nnx.Optimizer`` outside ``nnx.jit``, from params that are on the mesh already.

    Raises:
      TypeError: ``optimizer`` is no ``optax.GradientTransformation``.
      ImportError: Flax is not installed.

    >>> import optax
    >>> from flax import nnx
    >>> from galore_jax import for_nnx, galore
    >>> model = nnx.Linear(64, 256, rngs=nnx.Rngs(0))
    >>> tx = for_nnx(galore(optax.adamw(1e-3), rank=8))
    >>> optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    >>> optimizer.opt_state.inner_state[0].mu["kernel"].shape
    (8, 256)
    """
    if isinstance(optimizer, optax.MultiSteps):
        optimizer = optimizer.gradient_transformation()
    if not isinstance(optimizer, optax.GradientTransformation):
        raise TypeError(
            f"optimizer must be an optax.GradientTransformation, got {type(optimizer).__name__}"
        )
    nnx, inner = _nnx(), optax.with_extra_args_support(optimizer)
    # On automatic meshes jax.jit shows update no sharding: init keeps those of each kind of state.
    shardings: dict[Any, list[NamedSharding | None]] = {}

    def init(params: optax.Params) -> optax.OptState:
        is_variable = lambda node: isinstance(node, nnx.Variable)  # noqa: E731
        array_of = lambda node: node[...] if is_variable(node) else node  # noqa: E731
        arrays = jax.tree.map(array_of, params, is_leaf=is_variable)
        spec_of = lambda node: nnx.spmd.get_var_pspec(node) if is_variable(node) else P()  # noqa: E731
        specs = jax.tree.map(spec_of, params, is_leaf=is_variable)
        state, found = _init_and_shardings(inner.init, arrays, specs)
        shardings[_kind(state)] = found
        pairs = zip(jax.tree.leaves(state), found, strict=True)
        variables = [x if s is None else _variable(nnx, x, s) for x, s in pairs]
        return jax.tree.unflatten(jax.tree.structure(state), variables)

    def update(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        updates, new = inner.update(updates, state, params, **extra_args)
        leaves, treedef = jax.tree.flatten(new)
        pairs = zip(leaves, shardings.get(_kind(state), [None] * len(leaves)), strict=True)
        return updates, treedef.unflatten([_keep(x, s) for x, s in pairs])

    return optax.GradientTransformationExtraArgs(init, update)


def _nnx() -> ModuleType:
    try:
        from flax import nnx
    except ImportError as error:
        raise ImportError(
            "galore_jax.for_nnx needs Flax, which is not installed: pip install 'galore-jax[nnx]'"
        ) from error
    return nnx


def _kind(state: optax.OptState) -> Any:
    leaves, treedef = jax.tree.flatten(state)
    return treedef, tuple((jnp.shape(x), jnp.result_type(x)) for x in leaves)


def _init_and_shardings(
    init: Callable[[Any], Any], arrays: Any, specs: Any
) -> tuple[optax.OptState, list[NamedSharding | None]]:
    """A new state, and for each of its arrays how it is sharded if it is on a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    in_jit = any(isinstance(x, Tracer) for x in jax.tree.leaves(arrays))
    if in_jit and not mesh.empty and mesh.are_all_axes_auto:
        # An array shows no sharding there: with explicit axes, as its variable says, it does.
        found = []

        def explicit_init(arrays: Any) -> Any:
            state = init(arrays)
            found.extend(jax.typeof(x).sharding.spec for x in jax.tree.leaves(state))
            return state

        state: Any = jax.sharding.explicit_axes(explicit_init, in_sharding=(specs,))(arrays)
        return state, [NamedSharding(mesh, spec) if spec else None for spec in found]
    state = init(arrays)
    return state, [_mesh_sharding(x) for x in jax.tree.leaves(state)]


def _mesh_sharding(array: Any) -> NamedSharding | None:
    of = jax.typeof(array) if isinstance(array, Tracer) else array
    sharding = getattr(of, "sharding", None)
    if not isinstance(sharding, NamedSharding) or sharding.mesh.empty or not jnp.ndim(array):
        return None
    return sharding


def _variable(nnx: ModuleType, array: jax.Array, sharding: NamedSharding) -> Any:
    spec = (*sharding.spec, *(None,) * (jnp.ndim(array) - len(sharding.spec)))
    return nnx.OptVariable(nnx.with_partitioning(lambda: array, spec, mesh=sharding.mesh)())


def _keep(array: jax.Array, sharding: NamedSharding | None) -> jax.Array:
    if sharding is None or AxisType.Explicit in sharding.mesh.axis_types:
        return array
    return jax.lax.with_sharding_constraint(array, sharding)
