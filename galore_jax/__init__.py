"""GaLore for Optax: full-parameter training with low-rank optimizer state."""

from galore_jax.aliases import galore_adafactor, galore_adamw
from galore_jax.chaining import chain
from galore_jax.low_rank import GaLoreState
from galore_jax.transform import galore

__all__ = ["GaLoreState", "chain", "galore", "galore_adafactor", "galore_adamw"]
__version__ = "0.1.0"
