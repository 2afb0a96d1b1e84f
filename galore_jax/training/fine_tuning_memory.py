"""The memory of fine-tuning, as it is and as the GaLore paper counts it."""

from typing import NamedTuple

import jax
import optax

from galore_jax.adapters import trainable
from galore_jax.memory.count import tree_bytes
from galore_jax.models.stages import LAYERS
from galore_jax.training.config import target_modules, uses_galore
from galore_jax.training.experiment import Experiment
from galore_jax.weights import projection_mask


class Memory(NamedTuple):
    """Bytes.

    Attributes:
      weights: all weights, low-rank parts of LoRA included.
      state: the whole optimizer state.
      as_in_paper: Table 4's: weights at 2 bytes, and the state at 4 bytes a number; for GaLore that
        of the projected matrices alone, without the full moments of all others.
    """

    weights: int
    state: int
    as_in_paper: int


def count_memory(experiment: Experiment) -> Memory:
    """Counts the memory of an experiment; nothing is allocated."""
    state = experiment.abstract_state()
    counted = state.opt_state
    if uses_galore(experiment.config):
        mask = projection_mask(
            state.params, target_modules(experiment.config), stacked_modules=LAYERS
        )
        matrices = jax.tree.map(
            lambda leaf, is_one: leaf if is_one else optax.MaskedNode(),
            trainable(state.params),
            mask,
        )
        counted = jax.eval_shape(experiment.optimizer.init, matrices)
    numbers = [sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in (state.params, counted)]
    return Memory(
        tree_bytes(state.params), tree_bytes(state.opt_state), 2 * numbers[0] + 4 * numbers[1]
    )
