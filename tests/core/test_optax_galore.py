"""Step for step against optax.contrib.galore, which is GaLore with one of these settings."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax.contrib import GaLoreDimensionNumbers

from galore_jax import galore

SHAPES = {"tall": (12, 7), "wide": (7, 12), "square": (8, 8), "bias": (5,)}
LR, RANK, GAP = 0.05, 3, 3


def tree(seed, shapes):
    rng = np.random.default_rng(seed)
    return {k: jnp.asarray(rng.standard_normal(s), jnp.float32) for k, s in shapes.items()}


def ours(**kwargs):
    inner = optax.chain(optax.scale_by_adam(), optax.scale_by_learning_rate(LR))
    kwargs = {"scale": 1.0, "proj_type": "reverse_std", **kwargs}
    return galore(inner, rank=RANK, update_proj_gap=GAP, **kwargs)


def theirs(**kwargs):
    return optax.contrib.galore(LR, rank=RANK, update_proj_gap=GAP, **kwargs)


def train(tx, shapes, steps):
    """(params, projectors, mu, nu) after each update, of either library."""
    params = tree(0, shapes)
    state, update = tx.init(params), jax.jit(tx.update)
    for step in range(steps):
        updates, state = update(tree(step + 1, shapes), state, params)
        params = optax.apply_updates(params, updates)
        galore_state = state if hasattr(state, "inner_state") else state[0]
        inner = getattr(galore_state, "inner_state", None)
        adam = inner[0] if inner is not None else galore_state.base_optimizer_state
        yield jax.device_get((params, galore_state.projector, adam.mu, adam.nu))


@pytest.fixture
def signed_svd(monkeypatch):
    # A matrix determines its singular vectors up to their signs. Optax takes LAPACK's, and moments
    # are carried over a refresh, so that two programs part there if one vector of one of them has
    # the other sign. Here LAPACK's answer gets the signs that galore_jax chooses: in each vector
    # the entry of largest magnitude is positive. Of left vectors or of right ones alone, and Optax
    # uses only either, that is as good an answer as the one before. Nothing else is changed.
    svd = jnp.linalg.svd

    def signs(columns):
        peaks = jnp.argmax(jnp.abs(columns), axis=0)
        return jnp.sign(columns[peaks, jnp.arange(columns.shape[1])])

    def signed(matrix, full_matrices=True):
        u, s, vh = svd(matrix, full_matrices=full_matrices)
        return u * signs(u), s, vh * signs(vh.T)[:, None]

    monkeypatch.setattr(jnp.linalg, "svd", signed)


def test_weights_and_state_are_equal_over_refreshes(signed_svd):
    # Guards the side of each shape, the schedule of refreshes (counted from 0), moments that are
    # neither reset nor rotated, Adam on the coordinates and the learning rate's place.
    steps = 2 * GAP + 3
    pairs = zip(train(ours(), SHAPES, steps), train(theirs(), SHAPES, steps), strict=True)
    for mine, other in pairs:
        for name in SHAPES:
            for a, b in zip(mine, other, strict=True):
                if isinstance(a[name], np.ndarray):
                    # Both are the same float32 operations in the same order but for how XLA fuses.
                    np.testing.assert_allclose(a[name], b[name], rtol=1e-4, atol=2e-6)


def test_up_to_signs_nothing_differs_until_the_first_change_of_basis():
    # The same without a patch. With P D for P (D diagonal, of signs) the coordinates are D R, Adam
    # acts on each entry and is odd: its first moment is D mu, its second one and P N are the same.
    for mine, other in zip(train(ours(), SHAPES, GAP), train(theirs(), SHAPES, GAP), strict=True):
        for name in SHAPES:
            close = {"rtol": 1e-4, "atol": 2e-6}
            np.testing.assert_allclose(mine[0][name], other[0][name], **close)
            np.testing.assert_allclose(mine[3][name], other[3][name], **close)
            if name == "bias":
                np.testing.assert_allclose(mine[2][name], other[2][name], **close)
                continue
            signs = np.sign((mine[1][name] * other[1][name]).sum(0))
            np.testing.assert_allclose(mine[1][name], other[1][name] * signs, **close)
            turn = signs[:, None] if mine[2][name].shape[0] == RANK else signs
            np.testing.assert_allclose(mine[2][name], other[2][name] * turn, **close)


@pytest.mark.parametrize("shape", [(7, 3, 4), (12, 2, 3)])
def test_leaves_of_three_axes_are_the_matrices_that_optax_takes(signed_svd, shape):
    # Guards the order of the axes in a merged side: heads before what is in a head.
    numbers = {"weight_dimension_numbers": GaLoreDimensionNumbers(0, (1, 2))}
    shapes = {"attn": shape, "bias": (4,)}
    pairs = zip(
        train(ours(**numbers), shapes, GAP + 2), train(theirs(**numbers), shapes, GAP + 2),
        strict=True,
    )  # fmt: skip
    for mine, other in pairs:
        for a, b in zip(mine, other, strict=True):
            np.testing.assert_allclose(a["attn"], b["attn"], rtol=1e-4, atol=2e-6)
        np.testing.assert_allclose(mine[0]["bias"], other[0]["bias"], rtol=1e-5)
