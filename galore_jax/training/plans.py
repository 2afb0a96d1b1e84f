"""The compiler's memory plan of a config's own training step, for any target."""

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding

from galore_jax.memory import CompiledPlan, compiled_plan
from galore_jax.targets import Target
from galore_jax.training import modes, steps
from galore_jax.training.optimizers import make_optimizer
from galore_jax.training.settings import Config


def abstract_batch(config: Config, sequences: int) -> steps.Batch:
    """The shapes of a batch."""
    shape = jax.ShapeDtypeStruct((sequences, config.data.seq_len), np.int32)
    return {"tokens": shape, "targets": shape}  # pyright: ignore[reportReturnType]


def plan_step(config: Config, target: Target, refresh: bool) -> CompiledPlan:
    """The plan of the step with or without a new basis, compiled for a target.

    Raises:
      UserError: settings that do not fit together, or that the target's compiler refuses.
    """
    tx = make_optimizer(config)
    state = modes.abstract_state(config, tx)
    step = modes.train_steps(config, tx)[refresh]
    place = SingleDeviceSharding(target.device)
    compiled = (
        jax.jit(step, donate_argnums=0, in_shardings=place, out_shardings=place)
        .lower(state, abstract_batch(config, config.batch_size))
        .compile()
    )
    return compiled_plan(compiled, target.label)
