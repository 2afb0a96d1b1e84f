"""Compiles programs for a target, and reads the compiler's own memory plan of them."""

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import SingleDeviceSharding

from galore_jax.errors import UserError
from galore_jax.memory.targets import Target

_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30}


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
    """A compiler gave up because the program takes more memory than there is.

    Attributes:
      needed: bytes, as far as the compiler says; else 0.
    """

    def __init__(self, message: str):
        super().__init__(message)
        said = re.search(r"(?:Used|temporaries \()\s*([\d.]+)([KMG])", message)
        self.needed = int(float(said[1]) * _UNITS[said[2]]) if said else 0


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
    return CompiledPlan(
        device,
        analysis.argument_size_in_bytes,
        analysis.output_size_in_bytes,
        analysis.alias_size_in_bytes,
        analysis.temp_size_in_bytes,
    )


def compile_lowered(lowered: jax.stages.Lowered) -> jax.stages.Compiled:
    """``lowered.compile()``, where lack of memory is a :class:`DoesNotFit`.

    Raises:
      DoesNotFit: the compiler gives up for lack of memory.
    """
    try:
        return lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        first = str(error).partition("\n")[0]
        if "RESOURCE_EXHAUSTED" in first:
            raise DoesNotFit(first) from error
        raise


def compile_for(target: Target, function: Callable[..., Any], *arguments: Any) -> CompiledPlan:
    """Compiles a function for a target, its first argument donated, and returns the plan.

    Args:
      target: the device, which need not be there.
      function: what ``jax.jit`` takes.
      *arguments: its arguments, or their shapes.

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
