"""GaLore for Optax: full-parameter training with low-rank optimizer state."""

from galore_jax.aliases import galore_adamw
from galore_jax.transform import GaLoreState, chain, galore

__all__ = ["GaLoreState", "chain", "galore", "galore_adamw"]
__version__ = "0.1.0"
