"""The noise of rounding: even in time, and without resonance with periodic gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from galore_jax.rounding import apply_updates, dithering

VALUES = 4096
PERIODS = [8, 13, 16, 21, 34, 55, 64, 89, 144, 233, 377, 610, 987, 1000, 1024, 1597, 2584]


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_no_period_resonates(share):
    counts = 777 + jnp.asarray(PERIODS)[:, None] * jnp.arange(60)
    noise = jax.jit(jax.vmap(jax.vmap(lambda count: dithering((VALUES,), count))))(counts)
    gone_up = np.asarray(noise < share).sum(axis=1) - 60 * share
    independent = np.sqrt(60 * share * (1 - share))
    assert (np.sqrt(np.square(gone_up).mean(axis=1)) < 1.15 * independent).all()


@pytest.mark.parametrize("period", [377, 987, 1597])
def test_a_weight_updated_once_in_a_while_moves_by_its_updates(period):
    update = jnp.full(VALUES, 0.3 * 2.0**-7)
    step = jax.jit(lambda weights, count: apply_updates(weights, update, count))
    weights = jnp.ones(VALUES, jnp.bfloat16)
    for i in range(60):
        weights = step(weights, 777 + period * i)
    moved = (np.asarray(weights, np.float32) - 1) * 2**7
    assert abs(moved.mean() - 60 * 0.3) < 0.3
    assert moved.std() < 1.15 * np.sqrt(60 * 0.3 * 0.7)


def test_every_64_counts_the_noise_covers_all_parts():
    noise = jax.vmap(lambda count: dithering((10, 10), count))(jnp.arange(128, 192))
    parts = np.sort(np.floor(np.asarray(noise) * 64), axis=0)
    np.testing.assert_array_equal(parts[:, 3, 5], np.arange(64))
    assert (parts == np.arange(64)[:, None, None]).all()
    assert noise.max() < 1


def test_leaves_and_layers_have_noise_of_their_own_whether_stacked_or_one_by_one():
    ones = lambda *shape: {"a": jnp.ones(shape, jnp.bfloat16), "b": jnp.ones(shape, jnp.bfloat16)}  # noqa: E731
    half = jax.tree.map(lambda x: jnp.full(x.shape, 2.0**-8), ones(4, 32, 32))
    stacked = apply_updates(ones(4, 32, 32), half, 5)
    layer = jax.jit(
        lambda i: apply_updates(ones(32, 32), {k: half[k][0] for k in half}, 5, layer=i)
    )
    for i in range(4):
        jax.tree.map(np.testing.assert_array_equal, layer(i), {k: stacked[k][i] for k in stacked})
    up = np.stack([np.asarray(stacked[k] > 1) for k in "ab"]).reshape(8, -1)
    # Each goes up with probability 1/2; two that agree by chance do so in half of 1,024 values.
    agree = (up[:, None] == up[None]).mean(axis=-1)[~np.eye(8, dtype=bool)]
    assert agree.min() > 0.42
    assert agree.max() < 0.58
