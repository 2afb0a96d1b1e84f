"""Which results of a traced function depend on which of its arguments."""

from collections.abc import Collection
from typing import Any

from jax.extend.core import Jaxpr, Var


def depends_on(jaxpr: Jaxpr, arguments: Collection[int]) -> set[int]:
    """Positions of the results that depend on the values of these arguments.

    Looks into branches and into functions that are jitted on their own; what it cannot look into
    (loops) counts as mixing all that goes in with all that comes out.

    Args:
      jaxpr: as ``jax.make_jaxpr`` gives it.
      arguments: positions of the arguments.

    >>> import jax
    >>> traced = jax.make_jaxpr(jax.jit(lambda a, b: (2 * b, 2 * a)))(1.0, 2.0)
    >>> depends_on(traced.jaxpr, [0])
    {1}
    """
    reached = {jaxpr.invars[i] for i in arguments}
    for equation in jaxpr.eqns:
        inputs = [i for i, v in enumerate(equation.invars) if isinstance(v, Var) and v in reached]
        if inputs:
            reached.update(equation.outvars[i] for i in _through(equation, inputs))
    return {i for i, v in enumerate(jaxpr.outvars) if isinstance(v, Var) and v in reached}


def _through(equation: Any, inputs: list[int]) -> set[int]:
    everything = set(range(len(equation.outvars)))
    if "branches" in equation.params:
        if 0 in inputs:
            return everything
        of_branch = [i - 1 for i in inputs]
        return set().union(*(depends_on(b.jaxpr, of_branch) for b in equation.params["branches"]))
    inner = equation.params.get("jaxpr")
    inner = getattr(inner, "jaxpr", inner)
    is_call = "jaxpr" in equation.params and "length" not in equation.params
    if is_call and len(inner.invars) == len(equation.invars):
        return depends_on(inner, inputs)
    return everything
