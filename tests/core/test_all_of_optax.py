"""Every optimizer alias of optax and optax.contrib, inside galore."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

from galore_jax import galore

SHAPES = {"tall": (12, 6), "wide": (6, 12), "square": (8, 8), "stack": (3, 6, 10), "bias": (10,)}
PROJECTED = ("tall", "wide", "square", "stack")
FULL_SIZES = {SHAPES[name] for name in PROJECTED}

# Their signatures ask for more than a learning rate; why they cannot be used inside galore.
EXCLUDED = {
    "lbfgs": "its line search calls the loss with the weights, whose coordinates it has",
    "sophia": "its Hessian estimate calls the loss with the weights, whose coordinates it has",
    "dpsgd": "it takes one gradient for each example",
    "galore": "it is what is compared with, in test_optax_galore.py",
}
LEARNING_RATE = {"adadelta": 1.0, "fromage": 0.01, "lars": 1.0, "sm3": 0.1}
MORE = {
    "noisy_sgd": {"eta": 1e-4, "key": 0},
    "muon": {"weight_decay": 0.01},
}


def aliases():
    found = {}
    for module in (optax, optax.contrib):
        for name, make in inspect.getmembers(module, inspect.isfunction):
            first = next(iter(inspect.signature(make).parameters), "")
            if first.endswith("learning_rate") and not name.startswith(("scale_by_", "_")):
                found[name] = make
    return found


ALIASES = aliases()


def test_the_list_is_that_of_optax():
    assert {"adamw", "sgd", "lion", "prodigy", "schedule_free_adamw", "polyak_sgd"} <= set(ALIASES)
    assert set(EXCLUDED) <= set(ALIASES)


def make(name):
    arguments = dict(MORE.get(name, {}))
    parameter = next(iter(inspect.signature(ALIASES[name]).parameters.values()))
    if name in LEARNING_RATE or parameter.default is inspect.Parameter.empty:
        arguments[parameter.name] = LEARNING_RATE.get(name, 0.05)
    return ALIASES[name](**arguments)


def quadratic(params):
    return sum(jnp.sum((x - 0.5) ** 2) for x in jax.tree.leaves(params))


def start():
    keys = jax.random.split(jax.random.key(0), len(SHAPES))
    return {
        name: jax.random.normal(key, shape)
        for key, (name, shape) in zip(keys, SHAPES.items(), strict=True)
    }


@pytest.mark.parametrize("recovery", [None, pytest.param("column", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", sorted(set(ALIASES) - set(EXCLUDED)))
def test_state_is_low_rank_and_a_quadratic_goes_down(name, recovery):
    options = {"target_modules": PROJECTED, "recovery": recovery}
    tx = galore(make(name), rank=3, update_proj_gap=4, scale=0.5, **options)
    params = start()
    state = tx.init(params)
    assert not FULL_SIZES & {x.shape for x in jax.tree.leaves(state.inner_state)}

    @jax.jit
    def step(carry, _):
        params, state = carry
        loss, grads = jax.value_and_grad(quadratic)(params)
        updates, state = tx.update(grads, state, params, value=loss)
        return (optax.apply_updates(params, updates), state), loss

    (params, after), losses = jax.lax.scan(step, (params, state), length=60)
    shapes = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)  # noqa: E731
    assert shapes(after) == shapes(state)
    assert np.isfinite(losses).all()
    assert losses[-1] < 0.99 * losses[0]
