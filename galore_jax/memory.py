"""Where the bytes go: counted from shapes, and planned by the compiler."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from galore_jax.projection import FIRST_MOMENTS

# The fields in which Optax's states keep moments; everything else is other state.
_FIRST_MOMENTS = FIRST_MOMENTS | {"m"}
_SECOND_MOMENTS = frozenset({"nu", "nu_max", "v", "v_row", "v_col", "sum_of_squares"})


def tree_bytes(tree: Any) -> int:
    """Bytes of the arrays (or of the shapes) of a tree.

    >>> import jax.numpy as jnp
    >>> tree_bytes({"a": jnp.zeros((3, 4)), "b": jnp.zeros(5, jnp.bfloat16)})
    58
    """
    return sum(_array_bytes(leaf) for leaf in jax.tree.leaves(tree))


def _array_bytes(array: Any) -> int:
    if jnp.issubdtype(array.dtype, jnp.integer):
        return -(-array.size * jnp.iinfo(array.dtype).bits // 8)  # two int4 share a byte
    return array.size * array.dtype.itemsize


@dataclasses.dataclass(frozen=True)
class StateBytes:
    """Bytes of an optimizer's state by what they hold.

    Attributes:
      projectors, first_moments, second_moments: of arrays, or of the codes of quantised ones.
      scales: of all quantised arrays.
      other: step counts and all else.
    """

    projectors: int = 0
    first_moments: int = 0
    second_moments: int = 0
    scales: int = 0
    other: int = 0

    @property
    def total(self) -> int:
        """Bytes of the whole state."""
        return sum(dataclasses.astuple(self))


def count_state(opt_state: optax.OptState) -> StateBytes:
    """Counts an optimizer's state, exactly: arrays, or the shapes of ``jax.eval_shape``.

    An array belongs to the innermost field of the state that says what it holds: ``projector``
    (GaLore's), ``mu``, ``trace``, ... (first moments), ``nu``, ``v_row``, ... (second moments).
    Step counts and all else are other.

    >>> import jax, jax.numpy as jnp, optax
    >>> from galore_jax import galore
    >>> tx = galore(optax.adamw(1e-3), rank=8)
    >>> count_state(jax.eval_shape(tx.init, {"kernel": jnp.ones((64, 256))}))
    StateBytes(projectors=2048, first_moments=8192, second_moments=8192, scales=0, other=8)
    """
    counted = dict.fromkeys((field.name for field in dataclasses.fields(StateBytes)), 0)
    for key_path, leaf in jax.tree_util.tree_leaves_with_path(opt_state):
        fields = [key.name for key in key_path if isinstance(key, jax.tree_util.GetAttrKey)]
        counted[_kind(fields)] += tree_bytes(leaf)
    return StateBytes(**counted)


def _kinds_in_codes(opt_state: optax.OptState) -> set[str]:
    """Which kinds of state have quantised arrays."""
    paths = (path for path, _ in jax.tree_util.tree_leaves_with_path(opt_state))
    fields = ([k.name for k in p if isinstance(k, jax.tree_util.GetAttrKey)] for p in paths)
    return {_kind(names) for names in fields if names and names[-1] == "codes"}


def _kind(fields: list[str]) -> str:
    if fields and fields[-1] == "scales":
        return "scales"
    for field in reversed(fields):
        if field == "projector":
            return "projectors"
        if field in _FIRST_MOMENTS:
            return "first_moments"
        if field in _SECOND_MOMENTS:
            return "second_moments"
    return "other"


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


def memory_table(
    params: Any,
    opt_state: optax.OptState,
    gradient_bytes: int,
    plans: Mapping[str, CompiledPlan | None],
) -> str:
    """The memory of a training step beside that of full-rank AdamW, as lines of text.

    Args:
      params: the weights, or their shapes.
      opt_state: the optimizer's state, or its shapes.
      gradient_bytes: bytes of the gradients, accumulators included.
      plans: those of the compiled steps, by what they are called.

    Returns:
      A table of counted bytes, in MiB of 2^20, and a line with each of the compiler's plans.
    """
    weights = tree_bytes(params)
    ours = count_state(opt_state)
    adamw = count_state(jax.eval_shape(optax.adamw(0.0).init, params))
    rows = [
        ("weights", weights, weights),
        ("gradients", gradient_bytes, gradient_bytes),
        ("projectors", ours.projectors, adamw.projectors),
        ("first moments", ours.first_moments, adamw.first_moments),
        ("second moments", ours.second_moments, adamw.second_moments),
        ("quantisation scales", ours.scales, adamw.scales),
        ("other state", ours.other, adamw.other),
        ("optimizer state", ours.total, adamw.total),
        ("total", weights + gradient_bytes + ours.total, weights + gradient_bytes + adamw.total),
    ]
    in_codes = _kinds_in_codes(opt_state)
    lines = [f"{'memory, counted (MiB)':<24}{'this run':>12}{'full AdamW':>12}"]
    for name, here, there in rows:
        if name.replace(" ", "_") in in_codes:
            name = f"{name}, codes"
        if name in ("optimizer state", "total"):
            name = f"= {name}"
        lines.append(f"{name:<24}{here / 2**20:>12,.2f}{there / 2**20:>12,.2f}")
    for step, plan in plans.items():
        if plan is None:
            continue
        lines.append(
            f"{step} compiled for {plan.device}: peak {plan.peak / 2**20:,.1f} MiB"
            f" = arguments {plan.arguments / 2**20:,.1f}"
            f" + outputs {(plan.outputs - plan.aliased) / 2**20:,.1f}"
            f" + temporary {plan.temporary / 2**20:,.1f}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    # The command compiles the trainer's steps, which are above this module: it is only named here.
    import sys

    from galore_jax.training.memory_command import main

    sys.exit(main(sys.argv))
