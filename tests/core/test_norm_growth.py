"""Clipping by the growth of norms, and ranks by patterns."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from galore_jax import galore
from galore_jax.norm_growth import clip_by_norm_growth
from galore_jax.per_layer import per_layer
from galore_jax.projection import norm_over


def _norms(most, sizes):
    tx = clip_by_norm_growth(most)
    state = tx.init({"w": jnp.zeros(4)})
    found = []
    for size in sizes:
        updates, state = tx.update({"w": jnp.full(4, size / 2)}, state)
        found.append(float(norm_over(updates["w"])))
    return found


def test_growth_is_bounded_and_shrinking_is_free():
    np.testing.assert_allclose(_norms(1.5, [1, 10, 10, 0.1, 10]), [1, 1.5, 2.25, 0.1, 0.15], 1e-5)


def test_zero_passes_and_leaves_the_norm():
    np.testing.assert_allclose(_norms(1.5, [0, 1, 0, 10]), [0, 1, 0, 1.5], 1e-5)


def test_a_gradient_of_nearly_nothing_leaves_the_norm():
    np.testing.assert_allclose(_norms(1.5, [1, 1e-20, 10])[2], 1.5, 1e-5)


def test_what_is_not_finite_passes_and_leaves_the_norm():
    tx = clip_by_norm_growth(1.5)
    state = tx.init({"w": jnp.zeros(2)})
    _, state = tx.update({"w": jnp.array([1.0, 0.0])}, state)
    for bad in (jnp.nan, jnp.inf):
        updates, state = tx.update({"w": jnp.array([bad, 0.0])}, state)
        assert not jnp.isfinite(updates["w"]).all()
    updates, _ = tx.update({"w": jnp.array([9.0, 0.0])}, state)
    np.testing.assert_allclose(updates["w"], [1.5, 0.0])


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_extreme_norms(size):
    np.testing.assert_allclose(_norms(1.5, [size, 5 * size]), [size, 1.5 * size], rtol=1e-5)


def test_each_layer_of_a_stack_is_clipped_for_itself():
    tx = per_layer(clip_by_norm_growth(1.5), "blocks")
    params = {"blocks": jnp.ones((2, 4))}
    state = tx.init(params)
    _, state = tx.update(params, state)
    updates, _ = tx.update({"blocks": jnp.array([[1.0] * 4, [9.0] * 4])}, state)
    np.testing.assert_allclose(updates["blocks"], [[1.0] * 4, [1.5] * 4], rtol=1e-6)


def test_in_galore_it_sees_the_low_rank_gradient():
    tx = galore(
        optax.chain(clip_by_norm_growth(1.5), optax.sgd(1.0)), rank=1, scale=1.0, update_proj_gap=9
    )
    params = {"w": jnp.zeros((2, 3))}
    state = tx.init(params)
    first = jnp.array([[1.0, 0, 0], [0, 0, 0]])
    _, state = tx.update({"w": first}, state, params)
    updates, _ = tx.update({"w": 9 * first + jnp.array([[0, 0, 0], [9.0, 0, 0]])}, state, params)
    np.testing.assert_allclose(updates["w"], -1.5 * first, atol=1e-6)


@pytest.mark.parametrize("most", [1.0, 0.5, float("nan"), float("inf"), "2", True])
def test_bad_factors(most):
    with pytest.raises((TypeError, ValueError), match="most must be a number greater than 1"):
        clip_by_norm_growth(most)


def test_ranks_by_patterns():
    shapes = {"q_proj": (64, 64), "down_proj": (96, 64), "up_proj": (64, 96), "norm": (64,)}
    params = {k: jnp.ones(s) for k, s in shapes.items()}
    tx = galore(optax.adam(0.1), rank={"q_proj|k_proj": 8, "down_proj": 32, "": 16})
    shapes = jax.tree.map(jnp.shape, tx.init(params).projector)
    assert (shapes["q_proj"], shapes["down_proj"], shapes["up_proj"]) == (
        (64, 8),
        (64, 32),
        (64, 16),
    )
    others = galore(optax.adam(0.1), rank={"q_proj": 8}).init(params)
    assert others.projector["up_proj"].shape == (64, 64)  # 128, and no more than the side
    alone = galore(optax.adam(0.1), rank={"q_proj": 8, "": None}).init(params)
    assert alone.projector["up_proj"] == optax.MaskedNode()


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"v_proj": 8}, "the pattern 'v_proj' matches no projected leaf; their paths are"),
        ({"proj": 8, "q_proj": 4}, "'q_proj' matches no projected leaf that those before it leave"),
        ({"": 0}, r"rank\[''\] must be an int of at least 1"),
        ({"[": 8}, "is no regular expression"),
        ({}, "has no pattern"),
    ],
)
def test_bad_tables_of_ranks(table, message):
    params = {"q_proj": jnp.ones((64, 64)), "bias": jnp.ones(64)}
    with pytest.raises(ValueError, match=message):
        galore(optax.adam(0.1), rank=table).init(params)
