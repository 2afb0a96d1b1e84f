"""Counts, from shapes, the bytes of weights, gradients and optimizer state."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from galore_jax.memory.compile import CompiledPlan

# The fields in which Optax's states keep moments; everything else is other state.
_FIRST_MOMENTS = frozenset({"mu", "trace", "ema", "m"})
_SECOND_MOMENTS = frozenset({"nu", "nu_max", "v", "v_row", "v_col", "sum_of_squares"})

# The rows of a report that are optimizer state, in the order of StateBytes.
STATE_ROWS = (
    "projectors",
    "first moments",
    "second moments",
    "quantisation scales",
    "other state",
)


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
    for fields, leaf in _leaves_with_fields(opt_state):
        counted[_kind(fields)] += tree_bytes(leaf)
    return StateBytes(**counted)


def _leaves_with_fields(opt_state: optax.OptState) -> list[tuple[list[str], Any]]:
    """Every array with the names of the fields on the way to it."""
    return [
        ([key.name for key in path if isinstance(key, jax.tree_util.GetAttrKey)], leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(opt_state)
    ]


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
class Row:
    """One line of a memory report.

    Attributes:
      name: what the bytes hold.
      bytes: how many.
      source: ``"counted"`` from shapes, exact; ``"compiled"``, the compiler's plan; ``"formula"``.
    """

    name: str
    bytes: int
    source: str = "counted"


def count_rows(params: Any, opt_state: optax.OptState, gradient_bytes: int) -> list[Row]:
    """Weights, gradients and the parts of the optimizer state, each a row."""
    state = dataclasses.astuple(count_state(opt_state))
    return [
        Row("weights", tree_bytes(params)),
        Row("gradients", gradient_bytes),
        *map(Row, STATE_ROWS, state),
    ]


def bytes_of(rows: list[Row] | tuple[Row, ...], *names: str) -> int:
    """Bytes of the rows of these names together."""
    return sum(row.bytes for row in rows if row.name in names)


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
      plans: the compiler's plans of the steps, by the steps' names.

    Returns:
      A table of counted bytes, in MiB of 2^20, and a line with each of the compiler's plans.
    """
    ours = count_rows(params, opt_state, gradient_bytes)
    adamw = count_rows(params, jax.eval_shape(optax.adamw(0.0).init, params), gradient_bytes)
    paths = (fields for fields, _ in _leaves_with_fields(opt_state))
    quantised = {_kind(fields) for fields in paths if fields[-1:] == ["codes"]}
    names = [f"{r.name}, codes" if r.name.replace(" ", "_") in quantised else r.name for r in ours]
    lines = [f"{'memory, counted (MiB)':<24}{'this run':>12}{'full AdamW':>12}"]
    sizes = [(row.bytes, other.bytes) for row, other in zip(ours, adamw, strict=True)]
    names += ["= optimizer state", "= total"]
    sizes.append((bytes_of(ours, *STATE_ROWS), bytes_of(adamw, *STATE_ROWS)))
    sizes.append((sum(row.bytes for row in ours), sum(row.bytes for row in adamw)))
    for name, (size, other) in zip(names, sizes, strict=True):
        lines.append(f"{name:<24}{size / 2**20:>12,.2f}{other / 2**20:>12,.2f}")
    for step, plan in plans.items():
        if plan is not None:
            lines.append(
                f"{step} compiled for {plan.device}: peak {plan.peak / 2**20:,.1f} MiB"
                f" = arguments {plan.arguments / 2**20:,.1f}"
                f" + outputs {(plan.outputs - plan.aliased) / 2**20:,.1f}"
                f" + temporary {plan.temporary / 2**20:,.1f}"
            )
    return "\n".join(lines)
