"""The plan of a structure: found once, for each structure, and never of another one."""

import threading
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

from galore_jax import galore, galore_adamw, projected_value_and_grad

PARAMS = {"stack": jnp.arange(144.0).reshape(3, 6, 8) % 7, "w": jnp.arange(48.0).reshape(6, 8) % 5}


class Counted:
    """An optimizer that counts how often it is asked."""

    def __init__(self):
        self.inits = self.updates = 0
        inner = optax.adamw(0.1, weight_decay=0.1)

        def init(params):
            self.inits += 1
            return inner.init(params)

        def update(updates, state, params=None):
            self.updates += 1
            return inner.update(updates, state, params)

        self.tx = optax.GradientTransformation(init, update)


def as_dtype(tree, dtype):
    return jax.tree.map(lambda x: x.astype(dtype), tree)


def test_an_update_asks_the_wrapped_optimizer_once():
    inner = Counted()
    tx = galore(inner.tx, rank=2, target_modules=".", rotate_moments=True)
    state = tx.init(PARAMS)
    inner.inits = 0
    jax.make_jaxpr(tx.update)(PARAMS, state, PARAMS)
    assert (inner.inits, inner.updates) == (0, 1)
    # A state that comes from elsewhere, as from a checkpoint.
    other = Counted()
    jax.make_jaxpr(galore(other.tx, rank=2, target_modules=".").update)(PARAMS, state, PARAMS)
    assert other.inits <= 2


def test_gradients_of_another_dtype_have_a_plan_of_their_own():
    inner = Counted()
    tx = galore(inner.tx, rank=2, target_modules=".")
    params = as_dtype(PARAMS, jnp.bfloat16)
    state = tx.init(params)
    inner.inits = 0
    for _ in range(2):
        updates, _ = tx.update(PARAMS, state, params)
        assert updates["w"].dtype == jnp.float32
    assert inner.inits == 2  # copies of weights, owners of arrays
    assert tx.update(params, state, params)[0]["w"].dtype == jnp.bfloat16


def test_projected_gradients_have_the_plan_of_full_ones():
    inner = Counted()
    tx = galore(inner.tx, rank=2)
    state = tx.refresh(PARAMS, tx.init(PARAMS), PARAMS)
    loss = lambda params: jnp.sum(params["stack"])  # noqa: E731
    _, grads = projected_value_and_grad(loss)(PARAMS, state)
    inner.inits = 0
    tx.update(grads, state, PARAMS, refresh=False)
    assert inner.inits == 0


class Pair(NamedTuple):
    a: jax.Array
    b: jax.Array


def test_equal_shapes_under_other_names_are_another_structure():
    tx = galore(optax.adam(0.1), rank=2, target_modules=["a$", "^1$"])
    first, second = PARAMS["w"], PARAMS["w"] + 1
    projected = lambda params: [  # noqa: E731
        not isinstance(x, optax.MaskedNode)
        for x in jax.tree.structure(params).flatten_up_to(tx.init(params).projector)
    ]
    assert projected(Pair(first, second)) == [True, False]
    assert projected((first, second)) == [False, True]
    assert projected({"x": first, "xa": second}) == [False, True]
    assert projected({"x": first, "m": optax.MaskedNode(), "xa": None, "a": second})[0] is True


def test_a_function_for_the_rank_is_asked_about_each_leaf_again():
    tx = galore(optax.adam(0.1), rank=lambda path, leaf: 2 if float(leaf[0, 1]) else 3)
    assert tx.init({"w": PARAMS["w"]}).projector["w"].shape == (6, 2)
    assert tx.init({"w": jnp.zeros((6, 8))}).projector["w"].shape == (6, 3)


@pytest.mark.parametrize(
    "inner", [optax.adamw(0.1), pytest.param(optax.contrib.prodigy(), marks=pytest.mark.slow)]
)
def test_no_tracer_is_kept(inner):
    tx = galore(inner, rank=2, target_modules=".", update_proj_gap=1)
    injected = optax.inject_hyperparams(galore_adamw, static_args=("rank",))(0.1, rank=2)
    with jax.checking_leaks():
        for each in (tx, injected):
            step = lambda params, tx=each: tx.update(params, tx.init(params), params)  # noqa: E731
            jax.eval_shape(step, PARAMS)
            jax.make_jaxpr(jax.vmap(step))(jax.tree.map(lambda x: x[None], PARAMS))
    eager, _ = tx.update(PARAMS, tx.init(PARAMS), PARAMS)
    compiled, _ = jax.jit(step, static_argnames="tx")(PARAMS, tx)
    np.testing.assert_allclose(eager["w"], compiled["w"], rtol=1e-4, atol=1e-6)


def test_threads_share_a_transformation():
    tx = galore(optax.contrib.prodigy(), rank=2, target_modules=".")
    failures = []

    def work(columns):
        params = {"w": jnp.ones((3, 6, columns))}
        try:
            jax.eval_shape(lambda p: tx.update(p, tx.init(p), p), params)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(8 + i % 40,)) for i in range(80)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
