"""What in an optimizer's state lives in the coordinates of a basis: moments, copies of weights."""

import dataclasses
import itertools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from galore_jax.dependence import depends_on
from galore_jax.quantization import is_quantized

# As Optax names the first moments of its optimizers: linear in the gradients or the updates.
FIRST_MOMENTS = frozenset({"mu", "trace", "ema"})
_COPIES = frozenset({"copy", "copy_p", "convert_element_type"})


@dataclasses.dataclass(frozen=True)
class Weights:
    """The arrays of a state that are made from the values of the selected leaves.

    Attributes:
      copies: for those that are copies of a leaf (``z`` of schedule_free, ``params0`` of prodigy),
        the index of the array in the flat state to that of the leaf in the flat params.
      derived: the others, such as a first distance from a norm (dog).
    """

    copies: dict[int, int]
    derived: frozenset[int]

    def __bool__(self) -> bool:
        """Whether the state is made from the weights at all."""
        return bool(self.copies or self.derived)


def find_weights(
    init: Callable[[optax.Params], optax.OptState],
    params: optax.Params,
    selected: Collection[int],
) -> Weights:
    """What ``init`` makes from the values, not only the shapes, of the selected leaves.

    Args:
      init: an optimizer's.
      params: a tree of arrays, or of shapes.
      selected: indices of the leaves in question.

    Raises:
      ValueError: an array of a leaf's shape that is made from its values without being a copy: it
        is not known what becomes of it in another basis.

    >>> import jax.numpy as jnp, optax
    >>> find_weights(optax.contrib.madgrad(0.1).init, {"w": jnp.ones((2, 3))}, [0]).copies
    {3: 0}
    """
    leaves, treedef = jax.tree.flatten(params)

    def flat_init(*flat: Any) -> list[Any]:
        return jax.tree.leaves(init(treedef.unflatten(flat)))

    shape_of = lambda v: getattr(v.aval, "shape", ())  # noqa: E731
    jaxpr = jax.make_jaxpr(flat_init)(*leaves).jaxpr
    copies: dict[int, int] = {}
    derived: set[int] = set()
    for index in selected:
        source = jaxpr.invars[index]
        copied = {source}
        for equation in jaxpr.eqns:
            if equation.primitive.name in _COPIES and equation.invars[0] in copied:
                copied.update(equation.outvars)
        for position in depends_on(jaxpr, [index]):
            v = jaxpr.outvars[position]
            if v in copied:
                copies[position] = index
            elif shape_of(v) == shape_of(source) != ():
                raise ValueError(
                    "the optimizer's state holds a function of the weights' values; only copies of "
                    "the weights can follow a basis. Put that optimizer around galore(...)"
                )
            else:
                derived.add(position)
    return Weights(copies, frozenset(derived))


def find_first_moments(
    state: optax.OptState, params: optax.Params, selected: Collection[int]
) -> dict[int, int]:
    """Which arrays of a state are first moments of the selected leaves, by the names Optax uses.

    Args:
      state: an optimizer's, arrays or shapes.
      params: what it was made from.
      selected: indices of the leaves in question.

    Returns:
      For each the index in the flat state, a quantised array counting as one, to that of its leaf
      in the flat params.

    >>> import jax.numpy as jnp, optax
    >>> params = {"w": jnp.ones((2, 3))}
    >>> find_first_moments(optax.adam(0.1).init(params), params, [0])
    {1: 0}
    """
    of_params = jax.tree_util.tree_leaves_with_path(params)
    indices = {of_params[index][0]: index for index in selected}
    found = {}
    nodes = jax.tree_util.tree_leaves_with_path(state, is_leaf=is_quantized)
    for position, (path, array) in enumerate(nodes):
        for depth, key in enumerate(path):
            if isinstance(key, jax.tree_util.GetAttrKey) and key.name in FIRST_MOMENTS:
                index = indices.get(path[depth + 1 :])
                if index is not None and jnp.shape(array) == jnp.shape(of_params[index][1]):
                    found[position] = index
    return found


def at_nodes(nodes: Sequence[Any], positions: Mapping[int, int]) -> dict[int, int]:
    """Positions among all arrays as positions among nodes, of which quantised arrays are one each.

    >>> import jax.numpy as jnp
    >>> from galore_jax.quantization import quantize
    >>> at_nodes([quantize(jnp.ones(3)), jnp.ones(3)], {2: 0})
    {1: 0}
    """
    first = list(itertools.accumulate((len(jax.tree.leaves(n)) for n in nodes), initial=0))
    return {first.index(position): leaf for position, leaf in positions.items()}
