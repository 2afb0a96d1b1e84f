"""GaLore for Optax: full-parameter training with low-rank optimizer state."""

import contextlib
import sys

from galore_jax.quiet_cuda import quiet_cuda

# "-m" while Python looks for galore_jax.memory in ``python -m galore_jax.memory``, and never else.
with quiet_cuda() if sys.argv[:1] == ["-m"] else contextlib.nullcontext():
    import jax  # noqa: F401

from galore_jax.adam8bit import adamw8bit, scale_by_adam8bit
from galore_jax.aliases import galore_adafactor, galore_adamw, galore_adamw8bit, galore_muon
from galore_jax.chaining import chain
from galore_jax.dimension_numbers import dimension_numbers
from galore_jax.for_nnx import for_nnx
from galore_jax.galore import GaLoreState, galore
from galore_jax.kernels import linear
from galore_jax.projected_grad import projected_value_and_grad

__all__ = [
    "GaLoreState",
    "adamw8bit",
    "chain",
    "dimension_numbers",
    "for_nnx",
    "galore",
    "galore_adafactor",
    "galore_adamw",
    "galore_adamw8bit",
    "galore_muon",
    "linear",
    "projected_value_and_grad",
    "scale_by_adam8bit",
]
__version__ = "0.1.0"
