"""GaLore with orthogonalised momentum: against exact decompositions, Optax's Muon, and loops."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

from galore_jax import galore_muon
from galore_jax.muon import orthogonalize, scale_by_orthogonal_momentum
from galore_jax.quantization import Quantized, dequantize

PARAMS = {"wide": (48, 96), "tall": (96, 48), "bias": (48,)}


def _tree(seed=0, shapes=PARAMS, scale=1.0):
    rng = np.random.default_rng(seed)
    return {k: jnp.asarray(rng.normal(size=s) * scale, jnp.float32) for k, s in shapes.items()}


def _cosine(a, b):
    return jnp.vdot(a, b) / jnp.linalg.norm(a) / jnp.linalg.norm(b)


@pytest.mark.parametrize("shape", [(8, 32), (32, 8), (3, 8, 32), (1, 16), (16, 1), (1, 1)])
def test_orthogonalize_keeps_the_vectors_and_evens_the_values(shape):
    """U and V are those of the SVD, and every value is near one."""
    matrix = jax.random.normal(jax.random.key(0), shape)
    out = orthogonalize(matrix)
    u, _, vt = jnp.linalg.svd(matrix, full_matrices=False)
    values = jnp.matrix_transpose(u) @ out @ jnp.matrix_transpose(vt)
    diagonal = jnp.diagonal(values, axis1=-2, axis2=-1)
    assert ((diagonal > 0.65) & (diagonal < 1.25)).all()
    off = values - diagonal[..., None] * jnp.eye(values.shape[-1])
    assert jnp.abs(off).max() < 1e-4


@pytest.mark.parametrize("scale", [1e-30, 1e-10, 1e30])
def test_orthogonalize_does_not_see_the_scale(scale):
    matrix = jax.random.normal(jax.random.key(0), (8, 32))
    np.testing.assert_allclose(orthogonalize(scale * matrix), orthogonalize(matrix), atol=1e-4)


def test_orthogonalize_zeros():
    assert (orthogonalize(jnp.zeros((4, 6))) == 0).all()


def test_full_rank_is_muon_of_optax():
    """At full rank the subspace is the whole space, and the update is Muon's, but for its start:
    Optax corrects the bias of the momentum."""
    shapes = {"wide": (12, 24), "tall": (24, 12)}
    params, base = _tree(1, shapes), _tree(2, shapes)
    ours = galore_muon(0.1, rank=99, update_proj_gap=100, projector="svd", beta=0.6)
    optaxs = optax.contrib.muon(0.1, beta=0.6)
    states = ours.init(params), optaxs.init(params)

    @jax.jit
    def update(states, gradients):
        pairs = zip((ours, optaxs), states, strict=True)
        found = [tx.update(gradients, state, params) for tx, state in pairs]
        return [updates for updates, _ in found], tuple(state for _, state in found)

    for seed in range(30):  # the correction of the bias is gone
        gradients = jax.tree.map(lambda x, y: x + 0.1 * y, base, _tree(10 + seed, shapes))
        (a, b), states = update(states, gradients)
    for name in shapes:
        assert _cosine(a[name], b[name]) > 0.9999
        np.testing.assert_allclose(jnp.linalg.norm(a[name]), jnp.linalg.norm(b[name]), rtol=1e-2)


def test_update_is_low_rank_with_even_singular_values_and_the_rest_is_adam():
    params, gradients = _tree(0), _tree(1)
    tx = galore_muon(0.1, rank=4, adam_learning_rate=0.01, b2=0.99)
    adam = optax.nadam(0.01, b2=0.99)
    state, plain = tx.init(params), adam.init(params)
    for _ in range(3):
        updates, state = tx.update(gradients, state, params)
        expected, plain = adam.update(gradients, plain, params)
    np.testing.assert_allclose(updates["bias"], expected["bias"], rtol=1e-6)
    for name, factor in (("wide", 2**0.5), ("tall", 1.0)):
        values = jnp.linalg.svd(updates[name])[1]
        assert (values[4:] < 1e-5).all()
        assert ((values[:4] > 0.65 * 0.1 * factor) & (values[:4] < 1.25 * 0.1 * factor)).all()


def test_size_of_an_update_does_not_depend_on_the_rank():
    params, gradients = _tree(0), _tree(1)
    norms = []
    for rank in (2, 8, 32):
        tx = galore_muon(0.1, rank=rank)
        updates, _ = tx.update(gradients, tx.init(params), params)
        norms.append(float(jnp.linalg.norm(updates["wide"], 2)))
    assert max(norms) < 1.5 * min(norms)


def test_state_has_one_moment_a_matrix():
    state = galore_muon(0.1, rank=4).init(_tree())
    sizes = sorted(x.size for x in jax.tree.leaves(state))
    # P and M of each matrix, both moments of the bias, three counts.
    assert sizes == sorted([4 * 48, 4 * 96] * 2 + [48, 48] + [1] * len(sizes[:-6]))
    assert sum(sizes) < 2 * 4 * (48 + 96) + 2 * 48 + 10


def test_decay_is_of_the_whole_weight_at_each_leafs_own_rate():
    params, zeros = _tree(0), jax.tree.map(jnp.zeros_like, _tree(0))
    tx = galore_muon(0.1, rank=4, adam_learning_rate=0.01, weight_decay=0.5)
    updates, _ = tx.update(zeros, tx.init(params), params)
    for name, rate in (("wide", 0.1), ("tall", 0.1), ("bias", 0.01)):
        np.testing.assert_allclose(updates[name], -rate * 0.5 * params[name], rtol=1e-5, atol=1e-8)


def test_momentum_turns_with_the_projector():
    """After a refresh the momentum in the whole space is the old one's part in the new subspace."""
    params = _tree(0)
    tx = galore_muon(0.1, rank=4, update_proj_gap=2)
    state = tx.init(params)
    for seed in (1, 2):
        _, state = tx.update(_tree(seed), state, params)
    old = state
    _, state = tx.update(jax.tree.map(jnp.zeros_like, params), state, params, refresh=False)
    _, turned = tx.update(_tree(3), state, params, refresh=True)
    mu = lambda s: s.inner_state[0].inner_states["matrices"].inner_state[0].mu["wide"]  # noqa: E731
    old_p, new_p = old.projector["wide"], turned.projector["wide"]
    kept = new_p.T @ (old_p @ (0.95 * mu(old)))
    expected = 0.95 * kept + 0.05 * new_p.T @ _tree(3)["wide"]
    np.testing.assert_allclose(mu(turned), expected, atol=1e-5)


def test_momentum_of_8_bits_follows_that_of_32():
    shapes = {"w": (64, 128)}
    plain, coded = (scale_by_orthogonal_momentum(0.95, bits=bits) for bits in (None, 8))
    params = _tree(0, shapes)
    states = plain.init(params), coded.init(params)
    assert isinstance(states[1].mu["w"], Quantized)
    assert states[1].mu["w"].codes.dtype == jnp.int8
    for seed in range(100):
        gradients = _tree(seed, shapes)
        a, first = plain.update(gradients, states[0])
        b, second = coded.update(gradients, states[1])
        states = first, second
    error = jnp.linalg.norm(dequantize(states[1].mu["w"]) - states[0].mu["w"])
    # A code is a 127th of a block's largest value, some three deviations; its rounding error, of
    # half a code's variance at most, adds up over some twenty updates.
    assert error < 0.06 * jnp.linalg.norm(states[0].mu["w"])
    assert _cosine(a["w"], b["w"]) > 0.99


def test_a_constant_gradient_reaches_a_momentum_of_8_bits():
    """Steps below half a code (1 - beta is a twentieth, the last ones far less) do not get lost."""
    tx = scale_by_orthogonal_momentum(0.99, bits=8)
    gradient = _tree(0, {"w": (64, 128)})
    state = tx.init(gradient)
    for _ in range(900):
        _, state = tx.update(gradient, state)
    error = jnp.linalg.norm(dequantize(state.mu["w"]) - gradient["w"])
    assert error < 0.1 * jnp.linalg.norm(gradient["w"])


def test_stack_equals_the_loop():
    shapes = {"blocks": {"kernel": (3, 48, 96)}, "head": (48,)}
    rng = np.random.default_rng(0)
    draw = lambda: {  # noqa: E731
        "blocks": {"kernel": jnp.asarray(rng.normal(size=(3, 48, 96)), jnp.float32)},
        "head": jnp.ones(48),
    }
    assert shapes["head"] == (48,)
    params = draw()
    options = {"rank": 4, "target_modules": "blocks", "projector": "svd", "bits": 8}
    whole = galore_muon(0.1, stacked_modules="blocks", **options)
    single = galore_muon(0.1, **options)
    one = lambda tree, i: {**tree, "blocks": {"kernel": tree["blocks"]["kernel"][i]}}  # noqa: E731
    state, states = whole.init(params), [single.init(one(params, i)) for i in range(3)]
    for _ in range(3):
        gradients = draw()
        updates, state = whole.update(gradients, state, params)
        for i in range(3):
            alone, states[i] = single.update(one(gradients, i), states[i], one(params, i))
            np.testing.assert_allclose(
                updates["blocks"]["kernel"][i], alone["blocks"]["kernel"], atol=1e-4
            )


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e15])
def test_extreme_gradients_give_no_nan(scale):
    params = _tree(0)
    for bits in (None, 8):
        tx = galore_muon(0.1, rank=4, update_proj_gap=2, bits=bits, most_growth=1.01)
        state = tx.init(params)
        for seed in range(4):
            gradients = _tree(seed, scale=scale if seed else 1.0)
            updates, state = tx.update(gradients, state, params)
            assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(updates))


def test_leaves_without_a_rank_go_to_adam():
    params = _tree(0)
    tx = galore_muon(0.1, rank={"wide": 4, "": None}, adam_learning_rate=0.01)
    adam = optax.nadam(0.01)
    updates, _ = tx.update(_tree(1), tx.init(params), params)
    expected, _ = adam.update(_tree(1), adam.init(params), params)
    np.testing.assert_allclose(updates["tall"], expected["tall"], rtol=1e-6)
    assert jnp.linalg.matrix_rank(updates["wide"]) == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"beta": 1.0}, "beta must be at least 0 and less than 1, got 1.0"),
        ({"rounds": 0}, "rounds must be an int of at least 1"),
        ({"bits": 4}, "bits must be 8 or None, got 4"),
        ({"rank": 0}, "rank must be an int of at least 1"),
        ({"most_growth": 1.0}, "most must be a number greater than 1"),
        ({"rank": {}}, "has no pattern"),
        ({"beta": None}, "beta must be at least 0 and less than 1, got None"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        galore_muon(0.1, **arguments).init(_tree())


def test_leaves_whose_joined_paths_coincide():
    params = {"a/b": jnp.ones(3), "a": {"b": jnp.ones((6, 10))}}
    tx = galore_muon(0.1, rank=2)
    updates, _ = tx.update(params, tx.init(params), params)
    assert updates["a/b"].shape == (3,)


def test_unknown_options_are_named():
    with pytest.raises(TypeError, match="unexpected keyword argument 'scal'"):
        galore_muon(0.1, scal=1)


def test_hyperparameters_may_be_injected():
    with pytest.raises(TypeError, match="name it in static_args"):
        optax.inject_hyperparams(galore_muon, static_args="rank")(learning_rate=0.1, rank=2).init(
            _tree()
        )
    make = optax.inject_hyperparams(galore_muon, static_args=("rank", "rounds"))
    tx = make(learning_rate=0.1, rank=2)
    updates, _ = tx.update(_tree(1), tx.init(_tree()), _tree())
    plain = galore_muon(0.1, rank=2)
    expected, _ = plain.update(_tree(1), plain.init(_tree()), _tree())
    np.testing.assert_allclose(updates["wide"], expected["wide"], atol=1e-6)


@pytest.mark.parametrize("largest", [9e37, 3e38])
def test_orthogonalize_the_largest_floats(largest):
    np.testing.assert_allclose(
        orthogonalize(largest * jnp.eye(3)), orthogonalize(jnp.eye(3)), rtol=1e-5
    )
