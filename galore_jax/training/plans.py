"""The compiler's memory plan of a config's own training step, for any target."""

import functools
from typing import Any

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding

from galore_jax.memory import CompiledPlan, compiled_plan
from galore_jax.targets import Target
from galore_jax.training import modes, settings, steps
from galore_jax.training.optimizers import make_optimizer
from galore_jax.training.settings import Config


def abstract_batch(config: Config, sequences: int) -> steps.Batch:
    """The shapes of a batch."""
    shape = jax.ShapeDtypeStruct((sequences, config.data.seq_len), np.int32)
    return {"tokens": shape, "targets": shape}  # pyright: ignore[reportReturnType]


def abstract_state(config: Config, tx: Any) -> steps.TrainState:
    """The shapes of the state of a run."""
    init = functools.partial(steps.init_state, settings.model_config(config), tx)
    return jax.eval_shape(init, jax.random.key(config.seed))


def plan(config: Config, target: Target, refresh: bool) -> CompiledPlan:
    tx = make_optimizer(config)
    state = abstract_state(config, tx)
    step = modes.train_steps(config, tx)[refresh]
    place = SingleDeviceSharding(target.device)
    compiled = (
        jax.jit(step, donate_argnums=0, in_shardings=place, out_shardings=place)
        .lower(state, abstract_batch(config, config.batch_size))
        .compile()
    )
    return compiled_plan(compiled, target.label)
