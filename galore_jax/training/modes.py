"""Which training steps a config asks for: standard or layerwise, projected gradients or full."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from galore_jax.errors import UserError
from galore_jax.memory.count import tree_bytes
from galore_jax.models.llama import init_params
from galore_jax.projected_grad import projected_kernels, variables_of
from galore_jax.stacks import keeps_leaves_apart
from galore_jax.training import settings, steps
from galore_jax.training.layerwise import make_layerwise_step
from galore_jax.training.optimizers import make_optimizer
from galore_jax.training.settings import Config

Step = Callable[[steps.TrainState, steps.Batch], tuple[steps.TrainState, dict[str, Any]]]


def refreshes(config: Config, count: int) -> bool:
    """Whether the update after ``count`` updates changes GaLore's basis."""
    return config.method == "galore" and count % config.galore.update_proj_gap == 0


def step_name(refresh: bool) -> str:
    """What a step is called in the memory report."""
    if refresh:
        return "step with a new basis"
    return "training step"


def gradient_shapes(config: Config, state: steps.TrainState) -> Any:
    """The shapes of all gradients that exist at once in a step without a new basis."""
    if not settings.projected_gradients(config):
        return state.params
    kernels = functools.partial(
        projected_kernels, proj_type=config.galore.proj_type, kernels=steps.BLOCK_KERNELS
    )
    return jax.eval_shape(lambda p, s: variables_of(kernels(p, s)), state.params, state.opt_state)


def gradient_bytes(config: Config, state: steps.TrainState) -> int:
    """Bytes of the gradients that exist at once in a step without a new basis, sums included."""
    parts = config.batch_size // config.micro_batch_size
    shapes = gradient_shapes(config, state)
    if config.updates != "layerwise":
        return steps.gradient_bytes(shapes, parts)
    layer = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), shapes["blocks"])
    outer = [steps.gradient_bytes(x, 1) for key, x in shapes.items() if key != "blocks"]
    if side_by_side(config):
        return max(steps.gradient_bytes(layer, parts), *outer)
    return max(tree_bytes(layer), *outer) + 4 * sum(x.size for x in jax.tree.leaves(shapes))


def side_by_side(config: Config) -> bool:
    """Whether the micro-batches of a layerwise update go through the layers side by side.

    They do unless the blocks' inputs of a whole batch would take more memory than the float32 sums
    of all projected gradients.
    """
    if not settings.projected_gradients(config):
        return True
    model = settings.model_config(config)
    tokens = config.batch_size * config.data.seq_len
    inputs = tokens * model.hidden_size * model.num_layers * jnp.dtype(model.dtype).itemsize
    state = abstract_state(config, make_optimizer(config))
    sums = sum(4 * leaf.size for leaf in jax.tree.leaves(gradient_shapes(config, state)))
    return inputs <= sums


def abstract_state(config: Config, tx: optax.GradientTransformationExtraArgs) -> steps.TrainState:
    """The shapes of the state of a run."""
    init = functools.partial(steps.init_state, settings.model_config(config), tx)
    return jax.eval_shape(init, jax.random.key(config.seed))


def _layerwise_optimizer(config: Config) -> optax.GradientTransformationExtraArgs:
    """The optimizer of a single layer, if that is enough to know.

    Raises:
      UserError: clipping by the global norm, an optimizer that needs all leaves at once.
    """
    with_layers = "config.updates='layerwise' cannot be used with "
    if config.optimizer.clip_norm is not None:
        raise UserError(
            f"{with_layers}config.optimizer.clip_norm={config.optimizer.clip_norm}: the global "
            "norm is known only when all gradients are; give --config.optimizer.clip_norm=None"
        )
    tx = make_optimizer(config, stacked=False)
    model = dataclasses.replace(settings.model_config(config), num_layers=1)
    _, params = jax.eval_shape(functools.partial(init_params, model), jax.random.key(0))
    blocks = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), params["blocks"])
    fixed = {"refresh": False} if config.method == "galore" else {}
    if not keeps_leaves_apart(tx, {**params, "blocks": blocks}, **fixed, value=0.0):
        raise UserError(
            f"{with_layers}config.optimizer.name={config.optimizer.name!r}, which needs the "
            "gradients of all weights at once, or draws random numbers"
        )
    return tx


def train_steps(config: Config, tx: optax.GradientTransformationExtraArgs) -> dict[bool, Step]:
    """The steps of a run, with and without a change of basis: by what :func:`refreshes` gives.

    Compiled apart, the step of every day carries no decomposition.

    Raises:
      UserError: a layerwise update of what cannot be updated so.
    """
    given: dict[str, Any] = {"rounding": config.param_rounding}
    parts = config.batch_size // config.micro_batch_size
    model, schedule = settings.model_config(config), settings.learning_rate(config)
    projected = None
    if settings.projected_gradients(config):
        projected = steps.ProjectedMode(config.galore.proj_type, config.galore.refresh_from)
    make, of_step = steps.make_train_step, tx
    if config.updates == "layerwise":
        make, of_step = make_layerwise_step, _layerwise_optimizer(config)
        given["side_by_side"] = side_by_side(config)
    kinds = [False]
    if config.method == "galore":
        kinds = [True] if config.galore.update_proj_gap == 1 else [False, True]
    return {
        refresh: make(
            model,
            of_step,
            schedule,
            micro_batches=parts,
            refresh=refresh if config.method == "galore" else None,
            projected=projected,
            **given,
        )
        for refresh in kinds
    }
