"""Where the bytes of a training step go: counted from shapes, and planned by the compiler.

``python -m galore_jax.memory`` reports them for a config of the trainer.
"""

from galore_jax.memory.compile import CompiledPlan, compiled_plan
from galore_jax.memory.count import StateBytes, count_state, memory_table, tree_bytes

__all__ = [
    "CompiledPlan",
    "StateBytes",
    "compiled_plan",
    "count_state",
    "memory_table",
    "tree_bytes",
]
