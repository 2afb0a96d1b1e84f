"""Compiled steps for batches of a few shapes."""

from typing import Any

import jax


class OnShapes:
    """A jitted function of (state, batch) for batches of the shapes that come.

    The largest batch's is compiled before the run, so that its memory is known; others as soon as
    they come.
    """

    def __init__(self, function: Any, largest: Any, compiled: jax.stages.Compiled):
        """Begins with what is compiled for the largest batch, given as arrays or shapes."""
        self._function = function
        self._compiled = {_shapes(largest): compiled}

    def __call__(self, state: Any, batch: Any) -> Any:
        """Calls what was compiled for the shapes of the batch."""
        shapes = _shapes(batch)
        if shapes not in self._compiled:
            self._compiled[shapes] = self._function.lower(state, batch).compile()
        return self._compiled[shapes](state, batch)


def _shapes(batch: Any) -> tuple[tuple[int, ...], ...]:
    return tuple(leaf.shape for leaf in jax.tree.leaves(batch))
