"""What GaLore finds out once about a tree of weights, from its structure, shapes and dtypes."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer

from galore_jax.options import CheckedOptions
from galore_jax.per_layer import layer_depths, over_stacks
from galore_jax.projection import (
    MatrixSpec,
    ProjectedGradient,
    is_projected_gradient,
    on_matrices,
)
from galore_jax.quantization import Quantized
from galore_jax.weight_copies import WeightCopies, find_copies

_MOST_PLANS = 32  # of one transformation: layerwise training has one for each group of weights


@dataclasses.dataclass(frozen=True)
class Plan:
    """How each leaf of a tree is projected, and what the wrapped optimizer makes of that.

    Attributes:
      treedef: the structure; a ``ProjectedGradient`` is a leaf of it.
      specs: a tree of ``MatrixSpec``, and None for the leaves that are not projected.
      optimizer: the wrapped one, which takes each matrix of a stack by itself, see
        ``galore_jax.per_layer.over_stacks``.
      copies: the copies of weights in its state, or None.
    """

    treedef: Any
    specs: Any
    optimizer: optax.GradientTransformationExtraArgs
    copies: WeightCopies | None

    def check_fit(self, due: bool | jax.Array, updates: Any, state: Any) -> None:
        """Raises if gradients or a ``GaLoreState`` are not as this plan has them.

        Args:
          due: whether new projectors are, which come from full gradients alone.
          updates: gradients, projected ones among them.
          state: the state before the update.
        """
        trees = map(self.treedef.flatten_up_to, (self.specs, updates, state.projector))
        for spec, gradient, projector in zip(*trees, strict=True):
            expected = optax.MaskedNode() if spec is None else spec.projector_shape
            found = jax.tree.map(jnp.shape, projector, is_leaf=lambda x: isinstance(x, Quantized))
            if found != expected:
                raise ValueError(
                    "the state was made with another rank, proj_type or choice of leaves: its "
                    f"projector is {found} where these settings have {expected}"
                )
            if isinstance(gradient, ProjectedGradient):
                _check_projected(due, gradient, spec)
        if due is False and not isinstance(state.count, Tracer) and int(state.count) == 0:
            arrays = jax.tree.leaves(state.projector)
            if arrays and not any(jnp.any(x != 0) for x in arrays):
                raise ValueError(
                    "refresh=False on a new state, which has no projector yet: the first update "
                    "(update 0, 0 % update_proj_gap == 0) needs refresh=True and full gradients"
                )


def planner(
    make_optimizer: Callable[[Mapping[Any, MatrixSpec]], optax.GradientTransformation],
    options: CheckedOptions,
) -> Callable[[Any], Plan]:
    """Makes a function that finds the plan of a tree of weights or of their gradients.

    Plans are kept: a tree of the same structure, shapes and dtypes gets the same one again, be it
    of arrays, tracers, shapes or projected gradients. A plan holds no arrays.

    Args:
      make_optimizer: a function of the projected leaves, by their key paths, that gives the
        optimizer to wrap.
      options: GaLore's.

    Returns:
      A function of a tree. It raises what ``galore_jax.weights.matrix_specs`` and
      ``galore_jax.weight_copies.find_copies`` raise.
    """
    # A function of the leaves may look at more than their shapes: it is asked each time.
    asks = callable(options.rank) or callable(options.weight_dimension_numbers)

    @functools.lru_cache(_MOST_PLANS)
    def make(treedef: Any, shapes: tuple[Any, ...], answers: tuple[Any, ...] | None) -> Plan:
        params = treedef.unflatten(shapes)
        specs = options.specs(params) if answers is None else treedef.unflatten(answers)
        optimizer = optax.with_extra_args_support(make_optimizer(_by_path(specs)))
        depths = jax.tree.map(
            lambda depth, spec: depth if spec is None else len(spec.stack),
            layer_depths(params, options.stacked_modules),
            specs,
        )
        low = on_matrices(
            lambda spec, x: jax.ShapeDtypeStruct(spec.low_shape, x.dtype), specs, params
        )
        copies = find_copies(optimizer.init, low, specs)
        return Plan(treedef, specs, over_stacks(optimizer, depths), copies)

    def plan(tree: Any) -> Plan:
        leaves, treedef = jax.tree.flatten(tree, is_leaf=is_projected_gradient)
        shapes = []
        for leaf in leaves:
            dtype = leaf.dtype if hasattr(leaf, "dtype") else jnp.result_type(leaf)
            shapes.append(jax.ShapeDtypeStruct(getattr(leaf, "shape", ()), dtype))
        answers = tuple(treedef.flatten_up_to(options.specs(tree))) if asks else None
        return make(treedef, tuple(shapes), answers)

    return plan


def _by_path(specs: Any) -> dict[Any, MatrixSpec]:
    return dict(jax.tree_util.tree_leaves_with_path(specs))


def _check_projected(due: Any, gradient: ProjectedGradient, spec: MatrixSpec | None) -> None:
    if due is not False:
        raise ValueError(
            "a new projector needs the full gradients, and these are projected: give full ones "
            "with refresh=True, projected ones with refresh=False"
        )
    wanted = spec and (spec.low_shape, spec.side)
    found = jnp.shape(gradient.low_rank), gradient.side
    if spec is None or found != wanted:
        raise ValueError(
            f"a gradient of shape {gradient.shape} comes projected to {found}, where these "
            f"settings have {wanted or 'no projection'}"
        )
    if spec != MatrixSpec.of_kernel(spec.shape, spec.rank, spec.proj_type):
        raise ValueError(
            f"a gradient of shape {gradient.shape} comes projected along its last two axes, "
            "and weight_dimension_numbers names others: leave it out of kernels=..."
        )
