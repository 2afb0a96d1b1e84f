"""The stages of a model, so that a trainer can take them one at a time without its key names.

Every model of this package keeps its blocks' params under ``blocks``, each leaf with a leading
layer axis.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

BLOCKS = "blocks"  # the key of the params of all layers
LAYERS = f"^{BLOCKS}/"  # the paths of the leaves whose first axis indexes layers
# The paths of the leaves that a model only ever multiplies by galore_jax.linear, a layer at a time.
KERNELS = f"^{BLOCKS}/.*/kernel$"

# The key under which a batch that is trained on may have a PRNG key, for models that drop.
DROPOUT_KEY = "dropout_key"


class Stage(NamedTuple):
    """A piece of a model.

    Attributes:
      keys: the keys of the params that it reads: the model's, or in a block one layer's.
      run: a pure function whose first argument is a dict that has at least these params.
    """

    keys: tuple[str, ...]
    run: Callable[..., Any]


class Stages(NamedTuple):
    """A model as pure functions of its params.

    Attributes:
      forward: the whole model, a function of (params, batch).
      before: what comes before the blocks; ``run(params, batch)`` gives the first block's input.
      block: the parts of a block, in order, which share no params; ``run(layer, x)`` gives the next
        one's input.
      after: what comes after the blocks; ``run(params, x)`` gives what ``forward`` does. It may
        share params with ``before``.
    """

    forward: Callable[[Any, Any], Any]
    before: Stage
    block: tuple[Stage, ...]
    after: Stage
