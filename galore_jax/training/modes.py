"""Which training steps a config asks for: standard or layerwise, projected gradients or full."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import optax

from galore_jax.projected_grad import projected_kernels, variables_of
from galore_jax.training import settings, steps
from galore_jax.training.settings import Config

Step = Callable[[steps.TrainState, steps.Batch], tuple[steps.TrainState, dict[str, Any]]]


def refreshes(config: Config, count: int) -> bool:
    """Whether the update after ``count`` updates changes GaLore's basis."""
    return config.method == "galore" and count % config.galore.update_proj_gap == 0


def step_name(config: Config, refresh: bool) -> str:
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


def train_steps(config: Config, tx: optax.GradientTransformationExtraArgs) -> dict[bool, Step]:
    """The steps of a run, with and without a change of basis: by what :func:`refreshes` gives.

    Compiled apart, the step of every day carries no decomposition.

    Raises:
      UserError: a layerwise update of what cannot be updated so.
    """
    given = {"rounding": config.param_rounding}
    parts = config.batch_size // config.micro_batch_size
    model, schedule = settings.model_config(config), settings.learning_rate(config)
    projected = None
    if settings.projected_gradients(config):
        projected = steps.ProjectedMode(config.galore.proj_type, config.galore.refresh_from)
    kinds = [False]
    if config.method == "galore":
        kinds = [True] if config.galore.update_proj_gap == 1 else [False, True]
    return {
        refresh: steps.make_train_step(
            model,
            tx,
            schedule,
            micro_batches=parts,
            refresh=refresh if config.method == "galore" else None,
            projected=projected,
            **given,
        )
        for refresh in kinds
    }
