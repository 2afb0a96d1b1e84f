"""A training run, made once from its config."""

import dataclasses
from typing import Any

import jax
import numpy as np
import optax

from galore_jax.training import modes, settings
from galore_jax.training.modes import Step, step_name
from galore_jax.training.optimizers import make_optimizer
from galore_jax.training.settings import Config
from galore_jax.training.steps import Batch, TrainState

__all__ = ["Experiment", "make_experiment", "step_name"]


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A checked config and its optimizer."""

    config: Config
    optimizer: optax.GradientTransformationExtraArgs

    def abstract_state(self) -> TrainState:
        """The shapes of the state."""
        return modes.abstract_state(self.config, self.optimizer)

    def abstract_batch(self, sequences: int) -> Batch:
        """The shapes of a batch."""
        shape: Any = jax.ShapeDtypeStruct((sequences, self.config.data.seq_len), np.int32)
        return {"tokens": shape, "targets": shape}

    def train_steps(self) -> dict[bool, Step]:
        """The steps, by whether they refresh the projectors."""
        return modes.train_steps(self.config, self.optimizer)

    def gradient_bytes(self) -> int:
        """Bytes of the gradients that exist at once."""
        return modes.gradient_bytes(self.config, self.abstract_state())


def make_experiment(config: Config) -> Experiment:
    """Checks a config."""
    settings.check_config(config)
    return Experiment(config, make_optimizer(config))
