"""Counts, from shapes, the bytes of weights, gradients and optimizer state."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from galore_jax.int8_kernels import decoded
from galore_jax.memory.compile import CompiledPlan
from galore_jax.refresh import FIRST_MOMENTS

# The rows of a report that are optimizer state, in the order of StateBytes.
STATE_ROWS = ("projectors", "first moments", "second moments", "quantisation scales", "other state")
# The fields of Optax's and GaLore's states that say what an array holds; all else is other state.
_ROW_OF_FIELD = {
    "projector": "projectors",
    **dict.fromkeys(FIRST_MOMENTS | {"m"}, "first moments"),
    **dict.fromkeys(("nu", "nu_max", "v", "v_row", "v_col", "sum_of_squares"), "second moments"),
}


def tree_bytes(tree: Any) -> int:
    """Bytes of the arrays (or of the shapes) of a tree; two 4-bit integers share a byte.

    >>> import jax.numpy as jnp
    >>> tree_bytes({"a": jnp.zeros((3, 4)), "b": jnp.zeros(5, jnp.bfloat16)})
    58
    """

    def bits(dtype: Any) -> int:
        return jnp.iinfo(dtype).bits if jnp.issubdtype(dtype, jnp.integer) else 8 * dtype.itemsize

    return sum(-(-leaf.size * bits(leaf.dtype) // 8) for leaf in jax.tree.leaves(tree))


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
    counted: dict[str, int] = dict.fromkeys(STATE_ROWS, 0)
    for fields, leaf in _leaves_with_fields(opt_state):
        row = "quantisation scales" if fields[-1:] == ["scales"] else _state_row(fields)
        counted[row] += tree_bytes(leaf)
    return StateBytes(*counted.values())


def _leaves_with_fields(opt_state: optax.OptState) -> Iterator[tuple[list[str], Any]]:
    """Every array with the names of the fields on the way to it."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(opt_state):
        yield [key.name for key in path if isinstance(key, jax.tree_util.GetAttrKey)], leaf


def _state_row(fields: list[str]) -> str:
    return next((_ROW_OF_FIELD[x] for x in reversed(fields) if x in _ROW_OF_FIELD), "other state")


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of a memory report.

    Attributes:
      name: what the bytes hold.
      bytes: how many.
      source: ``"counted"`` from shapes, exact; ``"compiled"``, the compiler's plan.
    """

    name: str
    bytes: int
    source: str = "counted"


def count_rows(params: Any, opt_state: optax.OptState, gradient_bytes: int) -> list[Row]:
    """Weights, gradients and the parts of the optimizer state, each a row."""
    state = dataclasses.astuple(count_state(opt_state))
    counted = (tree_bytes(params), gradient_bytes, *state)
    return list(map(Row, ("weights", "gradients", *STATE_ROWS), counted))


def memory_table(
    params: Any,
    opt_state: optax.OptState,
    gradient_bytes: int,
    plans: Mapping[str, CompiledPlan | None],
) -> str:
    """A table of a training step's counted bytes beside full-rank AdamW's, in MiB of 2^20.

    Args:
      params: the weights, or their shapes.
      opt_state: the optimizer's state, or its shapes.
      gradient_bytes: bytes of the gradients, accumulators included.
      plans: the compiler's plans of the steps, by the steps' names; each gets a line.
    """
    adamw_state = jax.eval_shape(optax.adamw(0.0).init, jax.eval_shape(decoded, params))
    columns = [count_rows(params, state, gradient_bytes) for state in (opt_state, adamw_state)]
    for rows in columns:
        state = sum(row.bytes for row in rows if row.name in STATE_ROWS)
        total = sum(row.bytes for row in rows)
        rows += [Row("= optimizer state", state), Row("= total", total)]
    with_codes = {_state_row(x) for x, _ in _leaves_with_fields(opt_state) if x[-1:] == ["codes"]}
    lines = [f"{'memory, counted (MiB)':<24}{'this run':>12}{'full AdamW':>12}"]
    for row, adamw in zip(*columns, strict=True):
        name = f"{row.name}, codes" if row.name in with_codes else row.name
        lines.append(f"{name:<24}{row.bytes / 2**20:>12,.2f}{adamw.bytes / 2**20:>12,.2f}")
    lines += [
        f"{step} compiled for {plan.device}: peak {plan.peak / 2**20:,.1f} MiB"
        f" = arguments {plan.arguments / 2**20:,.1f}"
        f" + outputs {(plan.outputs - plan.aliased) / 2**20:,.1f}"
        f" + temporary {plan.temporary / 2**20:,.1f}"
        for step, plan in plans.items()
        if plan is not None
    ]
    return "\n".join(lines)
