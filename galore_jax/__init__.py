"""GaLore for Optax."""
