"""Compiles programs for a target, and reads the compiler's own memory plan of them."""

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import SingleDeviceSharding

from galore_jax.errors import UserError
from galore_jax.memory.targets import Target


@dataclasses.dataclass(frozen=True)
class CompiledPlan:
    """The compiler's own memory plan of a program for one device, in bytes.

    Attributes:
      device: what it was compiled for.
      arguments: inputs: weights, optimizer state and the batch.
      outputs: results, those written over donated inputs included.
      aliased: outputs that take the place of donated inputs.
      temporary: activations, gradients and workspace.
    """

    device: str
    arguments: int
    outputs: int
    aliased: int
    temporary: int

    @property
    def peak(self) -> int:
        """Arguments, outputs that are not aliased, and temporaries together."""
        return self.arguments + self.outputs - self.aliased + self.temporary


class DoesNotFit(UserError):
    """A compiler gave up for lack of memory; ``needed`` is in bytes, 0 if it did not say."""

    def __init__(self, message: str):
        super().__init__(message)
        said = re.search(r"(?:Used|temporaries \()\s*([\d.]+)([KMG])", message)
        self.needed = int(float(said[1]) * 2 ** {"K": 10, "M": 20, "G": 30}[said[2]]) if said else 0


def compiled_plan(compiled: jax.stages.Compiled, device: str) -> CompiledPlan | None:
    """The memory plan of a compiled program; None where the backend keeps none.

    >>> import jax, jax.numpy as jnp
    >>> double = jax.jit(lambda x: 2 * x, donate_argnums=0)
    >>> plan = compiled_plan(double.lower(jnp.zeros(1024)).compile(), "cpu")
    >>> plan.arguments, plan.aliased, plan.peak
    (4096, 4096, 4096)
    """
    analysis = compiled.memory_analysis()
    if analysis is None:
        return None
    sizes = (
        getattr(analysis, f"{x}_size_in_bytes") for x in ("argument", "output", "alias", "temp")
    )
    return CompiledPlan(device, *sizes)


def compile_lowered(lowered: jax.stages.Lowered) -> jax.stages.Compiled:
    """``lowered.compile()``, which raises ``DoesNotFit`` for lack of memory."""
    try:
        return lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        first = str(error).partition("\n")[0]
        if "RESOURCE_EXHAUSTED" in first:
            raise DoesNotFit(first) from error
        raise


def compile_for(target: Target, function: Callable[..., Any], *arguments: Any) -> CompiledPlan:
    """The plan of a function of these arguments (or shapes), the first donated, for a target.

    Raises:
      DoesNotFit: the compiler gives up for lack of memory.
      UserError: the target's compiler reports no memory analysis.
    """
    place = SingleDeviceSharding(target.device)
    jitted = jax.jit(function, donate_argnums=0, in_shardings=place, out_shardings=place)
    plan = compiled_plan(compile_lowered(jitted.lower(*arguments)), target.label)
    if plan is None:
        raise UserError(f"the compiler for {target.label} reports no memory analysis")
    return plan
