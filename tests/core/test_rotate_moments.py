"""First moments that follow the basis."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from float64 import float64_types

from galore_jax import galore, projection


@pytest.fixture
def float64():
    with float64_types():
        yield


def run(tx, params, steps, gradient_of):
    state, update = tx.init(params), jax.jit(tx.update)
    for step in range(steps):
        updates, state = update(gradient_of(step), state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def in_one_subspace(step, rank, shape=(7, 9)):
    """Gradients with one column space, whose singular vectors turn from step to step."""
    columns = jax.random.orthogonal(jax.random.key(99), 7, dtype=jnp.float64)[:, :rank]
    return {"w": columns @ jax.random.normal(jax.random.key(step), (rank, shape[1]), jnp.float64)}


@pytest.mark.parametrize("inner", [{"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}])
@pytest.mark.parametrize("method", ["svd", "eigh", "subspace_iteration", "randomized"])
def test_a_basis_that_turns_in_its_subspace_does_not_show(float64, inner, method):
    params = {"w": jnp.zeros((7, 9), jnp.float64)}
    gradients = lambda step: in_one_subspace(step, rank=3)  # noqa: E731
    trained = {
        (gap, rotate_moments): run(
            galore(
                optax.sgd(0.1, **inner),
                rank=3,
                update_proj_gap=gap,
                rotate_moments=rotate_moments,
                scale=1.0,
                projector=method,
            ),
            params,
            9,
            gradients,
        )[0]["w"]
        for gap in (2, 100)
        for rotate_moments in (False, True)
    }
    np.testing.assert_allclose(trained[2, True], trained[100, True], rtol=0, atol=1e-12)
    assert not np.allclose(trained[2, False], trained[100, False], rtol=0, atol=1e-3)


def test_at_full_rank_momentum_with_transport_is_plain_momentum(float64):
    params = {"w": jnp.ones((5, 8), jnp.float64), "stack": jnp.ones((2, 8, 5), jnp.float64)}

    def gradients(step):
        keys = jax.random.split(jax.random.key(step))
        return {
            name: jax.random.normal(key, leaf.shape, jnp.float64)
            for key, (name, leaf) in zip(keys, params.items(), strict=True)
        }

    plain = optax.sgd(0.1, momentum=0.9)
    expected, _ = run(plain, params, 7, gradients)
    for proj_type in ("std", "full"):
        tx = galore(
            plain,
            rank=5,
            scale=1.0,
            update_proj_gap=2,
            rotate_moments=True,
            target_modules=".",
            proj_type=proj_type,
        )
        found, _ = run(tx, params, 7, gradients)
        # full sees min(m, n)^2 coordinates: the rest of the longer side is projected away.
        names = params if proj_type == "std" else ()
        for name in names:
            np.testing.assert_allclose(found[name], expected[name], rtol=0, atol=1e-12)


def test_the_moment_is_rotated_and_the_second_moment_stays():
    params = {"w": jnp.zeros((6, 10))}
    tx = galore(optax.adam(0.1), rank=3, update_proj_gap=1, rotate_moments=True)
    grads = [{"w": jax.random.normal(jax.random.key(i), (6, 10))} for i in range(2)]
    _, first = tx.update(grads[0], tx.init(params), params)
    _, second = tx.update(grads[1], first, params)
    new, old = second.projector["w"], first.projector["w"]
    low = new.T @ grads[1]["w"]
    moved = new.T @ old @ first.inner_state[0].mu["w"]
    np.testing.assert_allclose(
        second.inner_state[0].mu["w"], 0.9 * moved + 0.1 * low, rtol=1e-4, atol=1e-6
    )
    np.testing.assert_allclose(
        second.inner_state[0].nu["w"],
        0.999 * first.inner_state[0].nu["w"] + 0.001 * low**2,
        rtol=1e-4,
    )


def test_a_basis_that_is_kept_keeps_the_moment_as_it_is():
    params = {"w": jnp.zeros((6, 10), jnp.bfloat16)}
    tx = galore(optax.sgd(0.1, momentum=0.5), rank=3, update_proj_gap=1, rotate_moments=True)
    _, state = tx.update({"w": jnp.ones((6, 10), jnp.bfloat16)}, tx.init(params), params)
    bad = {"w": jnp.full((6, 10), jnp.nan, jnp.bfloat16)}
    moved, kept = (
        tx.update(bad, state, params, refresh=refresh)[1].inner_state[0].trace["w"]
        for refresh in (True, False)
    )
    assert moved.shape == kept.shape == (3, 10)
    _, after = tx.update({"w": jnp.zeros((6, 10), jnp.bfloat16)}, state, params, refresh=False)
    assert np.array_equal(after.inner_state[0].trace["w"], 0.5 * state.inner_state[0].trace["w"])


def test_masked_and_injected_moments_are_found():
    params = {"w": jnp.zeros((6, 10)), "bias": jnp.zeros(10)}
    for inner in (
        optax.masked(optax.adam(0.1), {"w": True, "bias": False}),
        optax.inject_hyperparams(optax.adam)(0.1),
        optax.chain(optax.clip_by_global_norm(1.0), optax.lion(0.1)),
        optax.contrib.schedule_free(optax.adam(0.1), 0.1),
    ):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            galore(inner, rank=3, rotate_moments=True).init(params)


@pytest.mark.parametrize("inner", [optax.sgd(0.1), optax.rmsprop(0.1)])
def test_no_first_moment_is_said(inner):
    with pytest.warns(UserWarning, match="rotate_moments=True does nothing here"):
        galore(inner, rank=3, rotate_moments=True).init({"w": jnp.zeros((6, 10))})


def test_coordinates_of_what_lies_in_both_bases_bring_back_the_same_matrix():
    keys = jax.random.split(jax.random.key(0), 3)
    old = projection.TwoSided(
        *(jax.random.orthogonal(k, n) for k, n in zip(keys, (6, 8), strict=False))
    )
    new = projection.TwoSided(old.left[:, ::-1], -old.right)
    low = jax.random.normal(keys[2], (6, 8))
    moved = projection.rotate(low, old, new, "both")
    np.testing.assert_allclose(
        projection.project_back(moved, new, "both"),
        projection.project_back(low, old, "both"),
        atol=1e-5,
    )
