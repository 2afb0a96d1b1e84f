"""Counted bytes against real arrays, and against what the compiler says."""

import jax
import jax.numpy as jnp
import optax
import pytest

from galore_jax import adamw8bit, galore
from galore_jax.memory import StateBytes, compiled_plan, count_state, memory_table, tree_bytes

PARAMS = {"kernel": jnp.zeros((3, 16, 64), jnp.bfloat16), "bias": jnp.zeros((64,), jnp.bfloat16)}


@pytest.mark.parametrize(
    ("inner", "first", "second"),
    [
        (optax.adamw(1.0), 2 * (3 * 4 * 64 + 64), 2 * (3 * 4 * 64 + 64)),
        (optax.sgd(1.0, momentum=0.9), 2 * (3 * 4 * 64 + 64), 0),
        (optax.lion(1.0), 2 * (3 * 4 * 64 + 64), 0),
        (optax.sgd(1.0), 0, 0),
    ],
)
def test_state_by_kind(inner, first, second):
    tx = optax.chain(optax.clip_by_global_norm(1.0), galore(inner, rank=4, target_modules="kernel"))
    state = tx.init(PARAMS)
    counted = count_state(state)
    assert counted.projectors == 2 * 3 * 16 * 4
    assert (counted.first_moments, counted.second_moments) == (first, second)
    assert counted.total == sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    assert counted == count_state(jax.eval_shape(tx.init, PARAMS))


def test_factored_second_moments_are_second_moments():
    params = {"kernel": jnp.zeros((256, 512))}
    counted = count_state(optax.adafactor(1.0).init(params))
    assert counted.second_moments >= 4 * (256 + 512)
    assert counted.first_moments == counted.projectors == 0


def test_compiled_arguments_are_the_counted_bytes():
    tx = galore(optax.adamw(1.0), rank=4, target_modules="kernel")
    state = tx.init(PARAMS)

    def step(params, state, gradients):
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(PARAMS, state, PARAMS).compile()
    plan = compiled_plan(compiled, "cpu")
    kept = tree_bytes(PARAMS) + count_state(state).total
    assert plan.arguments == kept + tree_bytes(PARAMS)
    assert plan.aliased == kept
    assert plan.peak == plan.arguments + plan.outputs - plan.aliased + plan.temporary


def test_table_adds_up():
    state = galore(optax.adamw(1.0), rank=4, target_modules="kernel").init(PARAMS)
    table = memory_table(PARAMS, state, gradient_bytes=2**20, plans={})
    rows = {line[:24].strip(" ="): line[24:].split() for line in table.splitlines()[1:]}
    for column in (0, 1):
        value = {name: float(cells[column]) for name, cells in rows.items()}
        parts = ("projectors", "first moments", "second moments", "other state")
        assert value["optimizer state"] == pytest.approx(sum(map(value.get, parts)), abs=0.02)
        assert value["gradients"] == 1.0
    assert float(rows["first moments"][0]) < float(rows["first moments"][1])
    assert rows["projectors"][1] == "0.00"


def test_nothing_to_count():
    assert count_state(optax.EmptyState()) == StateBytes()


def test_codes_and_scales_are_rows_of_the_table():
    tx = galore(adamw8bit(1.0, min_8bit_size=0), rank=4, target_modules="kernel", projector_bits=4)
    state = tx.init(PARAMS)
    counted = count_state(state)
    # Moments: 3 x (4, 64) and 64 values, a block each. Bases: 3 x (16, 4) values, two to a byte.
    assert counted.first_moments == counted.second_moments == 3 * 4 * 64 + 64
    assert counted.projectors == 3 * 16 * 4 // 2
    assert counted.scales == 4 * (2 * (3 + 1) + 3)
    table = memory_table(PARAMS, state, gradient_bytes=0, plans={})
    for row in ("projectors, codes", "first moments, codes", "quantisation scales"):
        assert f"\n{row} " in table
    compiled = jax.jit(lambda s: s, donate_argnums=0).lower(state).compile()
    assert compiled_plan(compiled, "cpu").arguments == tree_bytes(state)
