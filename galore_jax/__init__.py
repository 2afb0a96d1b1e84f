"""GaLore for Optax: full-parameter training with low-rank optimizer state."""

from galore_jax.adam8bit import adamw8bit, scale_by_adam8bit
from galore_jax.aliases import galore_adafactor, galore_adamw, galore_adamw8bit
from galore_jax.chaining import chain
from galore_jax.galore import GaLoreState, galore
from galore_jax.kernels import linear
from galore_jax.projected_grad import projected_value_and_grad

__all__ = [
    "GaLoreState",
    "adamw8bit",
    "chain",
    "galore",
    "galore_adafactor",
    "galore_adamw",
    "galore_adamw8bit",
    "linear",
    "projected_value_and_grad",
    "scale_by_adam8bit",
]
__version__ = "0.1.0"
