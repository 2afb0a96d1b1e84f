"""Stacked leaves: each matrix is optimized as it would be in a loop."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

from galore_jax import galore
from galore_jax.projectors import PROJECTOR_METHODS

SCALES = jnp.array([1.0, 10.0, 0.1])[:, None, None]

INNER = {
    "adamw": optax.adamw(0.1, weight_decay=0.1),
    "adafactor": optax.adafactor(0.1, min_dim_size_to_factor=1, momentum=0.9),
    "lamb": optax.lamb(0.1),
    "lars": optax.lars(0.1),
    "novograd": optax.novograd(0.1),
    "muon": optax.contrib.muon(0.1),
    "sm3": optax.sm3(0.1),
    "prodigy": optax.contrib.prodigy(),
    "dog": optax.contrib.dog(),
    "clipped": optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.1)),
    "masked": optax.masked(optax.lamb(0.1), lambda tree: jax.tree.map(lambda x: x.ndim > 1, tree)),
    "injected": optax.inject_hyperparams(optax.lamb)(0.1),
}


def train(tx, params, gradients):
    @jax.jit
    def step(carry, grads):
        params, state = carry
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    (params, state), _ = jax.lax.scan(step, (params, tx.init(params)), gradients)
    return params, state


def apart(tree):
    """The stack as separate leaves, whose leading axis is that of time for gradients."""
    layers = [tree["kernel"][..., i, :, :] for i in range(3)]
    return {"bias": tree["bias"], **{f"kernel{i}": layer for i, layer in enumerate(layers)}}


def example(steps=5):
    keys = jax.random.split(jax.random.key(0), 3)
    params = {
        "bias": jnp.ones(7),
        "kernel": SCALES * jax.random.normal(keys[0], (3, 6, 10)),
    }
    gradients = {
        "bias": jax.random.normal(keys[1], (steps, 7)),
        "kernel": SCALES * jax.random.normal(keys[2], (steps, 3, 6, 10)),
    }
    return params, gradients


def assert_stack_equals_loop(tx):
    params, gradients = example()
    stacked, _ = train(tx, params, gradients)
    loop, _ = train(tx, apart(params), apart(gradients))
    for name, expected in loop.items():
        moved = np.abs(expected - apart(params)[name]).max()
        assert moved > 0
        # Reductions of another shape may add up in another order.
        np.testing.assert_allclose(apart(stacked)[name], expected, rtol=0, atol=2e-5 * moved)


@pytest.mark.parametrize("name", INNER)
def test_stack_equals_loop_for(name):
    assert_stack_equals_loop(galore(INNER[name], rank=3, update_proj_gap=2, target_modules="ker"))


@pytest.mark.parametrize("method", PROJECTOR_METHODS)
def test_stack_equals_loop_with_the_basis(method):
    assert_stack_equals_loop(
        galore(
            optax.adam(0.1), rank=3, update_proj_gap=2, target_modules="kernel", projector=method
        )
    )


def test_a_stack_of_stacks_equals_the_loop():
    key = jax.random.key(1)
    params = {"bias": jnp.ones(3), "w": jax.random.normal(key, (2, 3, 6, 10))}
    gradients = {"bias": jnp.ones((3, 3)), "w": jax.random.normal(key, (3, 2, 3, 6, 10))}
    tx = galore(optax.lamb(0.1), rank=3, update_proj_gap=2, target_modules="w")
    nested, _ = train(tx, params, gradients)
    flat, _ = train(
        tx,
        {**params, "w": params["w"].reshape(6, 6, 10)},
        {**gradients, "w": gradients["w"].reshape(3, 6, 6, 10)},
    )
    np.testing.assert_allclose(nested["w"].reshape(6, 6, 10), flat["w"], rtol=1e-5)


def test_second_moments_are_factored_by_matrix_and_scalars_are_stacked():
    params = {"bias": jnp.ones(7), "kernel": jnp.ones((40, 6, 10))}
    inner = optax.scale_by_factored_rms(min_dim_size_to_factor=1)
    state = galore(inner, rank=3, target_modules="kernel").init(params).inner_state
    assert {state.v_row["kernel"].shape, state.v_col["kernel"].shape} == {(40, 3), (40, 10)}
    assert state.count.shape == ()
    state = galore(optax.novograd(0.1), rank=3, target_modules="kernel").init(params)
    assert state.inner_state[0].nu["kernel"].shape == (40,)


def test_noise_differs_between_the_layers_of_a_stack():
    params = {"bias": jnp.ones(7), "kernel": jnp.zeros((3, 6, 10))}
    inner = optax.chain(optax.add_noise(1.0, 0.0, 0), optax.sgd(1.0))
    tx = galore(inner, rank=3, target_modules="kernel")
    _, state = tx.update({"bias": jnp.ones(7), "kernel": jnp.ones((3, 6, 10))}, tx.init(params))
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), state, params, refresh=False)
    assert not np.allclose(updates["kernel"][0], updates["kernel"][1])


def test_an_init_that_is_a_comprehension_over_the_params():
    # Optax's tree_map_params calls init with a placeholder, which has no items.
    def update(updates, state, params=None):
        state = {k: state[k] + jnp.sum(g**2) for k, g in updates.items()}
        return {k: g / jnp.sqrt(state[k]) for k, g in updates.items()}, state

    init = lambda params: {k: jnp.zeros(()) for k in params}  # noqa: E731
    inner = optax.GradientTransformation(init, update)
    assert_stack_equals_loop(galore(inner, rank=3, update_proj_gap=2, target_modules="ker"))


def test_a_global_norm_before_factored_moments_is_refused_on_stacks():
    params, gradients = example(1)
    inner = optax.chain(
        optax.clip_by_global_norm(1.0), optax.scale_by_factored_rms(min_dim_size_to_factor=1)
    )
    tx = galore(inner, rank=3, target_modules="kernel")
    state = tx.init(params)
    with pytest.raises(ValueError, match=r"put the former before galore"):
        tx.update(jax.tree.map(lambda g: g[0], gradients), state, params)
