"""Recovery (Fira): against the paper's equations, Optax's aliases, loops, and odd inputs."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from galore_jax import galore, galore_muon, linear, projected_value_and_grad
from galore_jax.per_layer import take_layer

SHAPES = {"wide": (6, 10), "tall": (10, 6), "square": (7, 7)}


def _gradients(count, shapes=SHAPES, seed=0):
    rng = np.random.default_rng(seed)
    return [
        {k: jnp.asarray(rng.normal(size=s), jnp.float32) for k, s in shapes.items()}
        for _ in range(count)
    ]


@pytest.mark.parametrize("kind", ["column", "matrix"])
@pytest.mark.parametrize("name", list(SHAPES))
def test_equals_the_paper_s_equations(kind, name):
    """The update of Adam, with phi of norms and the limiter, in float64 numpy."""
    shape, rank, rate, b1, b2 = SHAPES[name], 2, 0.1, 0.9, 0.999
    tx = galore(optax.adam(rate, b1, b2), rank=rank, update_proj_gap=3, scale=0.5, recovery=kind)
    left = shape[0] <= shape[1]
    params = {"w": jnp.zeros(shape)}
    state = tx.init(params)
    mu = nu = 0.0
    before = None
    for t, gradients in enumerate(_gradients(8, {"w": shape})):
        updates, state = tx.update(gradients, state, params)
        g = np.asarray(gradients["w"], np.float64)
        if not left:
            g = g.T
        p = np.asarray(state.projector["w"], np.float64)
        r = p.T @ g
        mu, nu = b1 * mu + (1 - b1) * r, b2 * nu + (1 - b2) * r * r
        n = -rate * (mu / (1 - b1 ** (t + 1))) / (np.sqrt(nu / (1 - b2 ** (t + 1))) + 1e-8)
        axis = 0 if kind == "column" else None
        phi = np.linalg.norm(n, axis=axis) / np.linalg.norm(r, axis=axis)
        s = -phi * (g - p @ r)
        size = np.linalg.norm(s) / np.linalg.norm(n)
        if before is not None and size > 1.01 * before:
            s, size = s * (1.01 * before / size), 1.01 * before
        before = size
        expected = 0.5 * (p @ n + s)
        np.testing.assert_allclose(
            updates["w"], expected if left else expected.T, atol=2e-5 * np.abs(expected).max()
        )
        np.testing.assert_allclose(state.recovered_norm["w"], before, rtol=1e-4)


def test_limiter_holds_a_spike_back():
    """A gradient that is suddenly large outside the subspace adds 1 % more than the one before."""
    tx = galore(optax.sgd(0.1), rank=1, update_proj_gap=100, recovery="matrix")
    params = {"w": jnp.zeros((2, 2))}
    state = tx.init(params)
    state = tx.update({"w": jnp.array([[4.0, 0], [0, 1]])}, state, params)[1]
    _, state = tx.update({"w": jnp.array([[4.0, 0], [0, 1]])}, state, params)
    updates, state = tx.update({"w": jnp.array([[4.0, 0], [0, 1e4]])}, state, params)
    np.testing.assert_allclose(updates["w"][1, 1], -0.25 * 0.1 * 1.01, rtol=1e-5)


@pytest.mark.parametrize("kind", ["column", "matrix"])
def test_full_rank_equals_the_inner_optimizer(kind):
    params = {k: jnp.ones(s) for k, s in SHAPES.items()}
    plain = optax.adamw(0.1, weight_decay=0.1)
    square = galore(plain, rank=99, scale=1.0, recovery=kind)
    without = galore(plain, rank=99, scale=1.0)
    states = square.init(params), without.init(params)
    for gradients in _gradients(4):
        new, a = square.update(gradients, states[0], params)
        same, b = without.update(gradients, states[1], params)
        states = a, b
        jax.tree.map(np.testing.assert_array_equal, new, same)
    two_sided = galore(optax.sgd(0.1), rank=99, proj_type="full", scale=1.0, recovery=kind)
    gradients = _gradients(1)[0]
    updates, _ = two_sided.update(gradients, two_sided.init(params), params)
    np.testing.assert_allclose(updates["wide"], -0.1 * gradients["wide"], atol=1e-6)


def test_sgd_with_recovery_is_sgd():
    """With N = -rate R every factor is the rate: recovery gives back the whole gradient."""
    params = {k: jnp.ones(s) for k, s in SHAPES.items()}
    for kind in ("column", "matrix"):
        tx = galore(optax.sgd(0.1), rank=2, scale=1.0, recovery=kind)
        gradients = _gradients(1)[0]
        updates, _ = tx.update(gradients, tx.init(params), params)
        jax.tree.map(
            lambda u, g: np.testing.assert_allclose(u, -0.1 * g, atol=1e-6), updates, gradients
        )


def test_decay_of_the_whole_weight_is_as_without():
    """A decay is neither scaled nor recovered: the factors come from the pure update."""
    params = {k: jnp.full(s, 3.0) for k, s in SHAPES.items()}
    gradients = _gradients(1)[0]
    found = []
    for decay in (0.0, 0.5):
        tx = galore(optax.adamw(0.1, weight_decay=decay), rank=2, recovery="column")
        found.append(tx.update(gradients, tx.init(params), params)[0])
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(b - a, -0.1 * 0.5 * 3.0, rtol=1e-5), *found
    )


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e18])
def test_extreme_gradients_give_no_nan(scale):
    params = {k: jnp.ones(s) for k, s in SHAPES.items()}
    for kind in ("column", "matrix"):
        tx = galore(optax.adamw(0.1), rank=2, update_proj_gap=2, recovery=kind)
        state = tx.init(params)
        for t, gradients in enumerate(_gradients(5)):
            factor = scale if t else 1.0
            gradients = jax.tree.map(lambda g, f=factor: g * f, gradients)
            updates, state = tx.update(gradients, state, params)
            assert all(jnp.isfinite(x).all() for x in jax.tree.leaves((updates, state)))


def test_rate_of_zero_in_warm_up_does_not_stop_it():
    """With a first learning rate of zero, the limiter starts from the updates that follow."""
    schedule = optax.linear_schedule(0.0, 0.1, 5)
    params = {"w": jnp.zeros((6, 10))}
    tx = galore(optax.adam(schedule), rank=2, recovery="column")
    state = tx.init(params)
    gradients = _gradients(1, {"w": (6, 10)})[0]
    sizes = []
    for _ in range(6):
        updates, state = tx.update(gradients, state, params)
        p = state.projector["w"]
        sizes.append(float(jnp.linalg.norm(updates["w"] - p @ (p.T @ updates["w"]))))
    assert sizes[0] == 0
    np.testing.assert_allclose(np.array(sizes[1:]) / sizes[1], [1, 2, 3, 4, 5], rtol=1e-3)


def test_stack_equals_the_loop():
    rng = np.random.default_rng(0)
    stack = {"blocks": jnp.asarray(rng.normal(size=(3, 6, 10)), jnp.float32)}
    options = {"rank": 2, "recovery": "column", "target_modules": "blocks"}
    whole = galore(optax.adam(0.1), stacked_modules="blocks", **options)
    single = galore(optax.adam(0.1), **options)
    state = whole.init(stack)
    states = [single.init(take_layer(stack, {"blocks": True}, i)) for i in range(3)]
    for _ in range(3):
        gradients = {"blocks": jnp.asarray(rng.normal(size=(3, 6, 10)), jnp.float32)}
        updates, state = whole.update(gradients, state, stack)
        for i in range(3):
            one = take_layer(gradients, {"blocks": True}, i)
            alone, states[i] = single.update(one, states[i], take_layer(stack, {"blocks": True}, i))
            np.testing.assert_allclose(updates["blocks"][i], alone["blocks"], atol=1e-6)
            norm = states[i].recovered_norm["blocks"]
            np.testing.assert_allclose(state.recovered_norm["blocks"][i], norm, rtol=1e-5)


def test_refuses_projected_gradients():
    params = {"kernel": jnp.ones((6, 10))}
    tx = galore(optax.adam(0.1), rank=2, recovery="column")
    state = tx.init(params)
    _, state = tx.update(params, state, params)

    def loss(params, x):
        return linear(x, params["kernel"]).sum()

    _, grads = projected_value_and_grad(loss)(params, state, jnp.ones((2, 6)))
    with pytest.raises(ValueError, match="recovery needs the full gradient"):
        tx.update(grads, state, params, refresh=False)
    with pytest.raises(ValueError, match="recovery must be one of column, matrix"):
        galore(optax.adam(0.1), recovery="colum")


@pytest.mark.parametrize("kind", ["column", "matrix"])
def test_rounding_is_no_factor(kind):
    """Columns that the projector is orthogonal to leave R with rounding alone, which Adam would
    turn into steps as large as any, and phi into updates of 1e6 times the rate."""
    rng = np.random.default_rng(0)
    gradient = np.zeros((50, 16))
    gradient[:16] = np.diag(np.linspace(2, 1, 16))
    gradient = jnp.asarray(gradient @ np.linalg.qr(rng.normal(size=(16, 16)))[0], jnp.float32)
    tx = galore(optax.adam(1e-3), rank=4, scale=1.0, recovery=kind)
    params = {"w": jnp.zeros((50, 16))}
    state = tx.init(params)
    for _ in range(3):
        updates, state = tx.update({"w": gradient}, state, params)
        assert jnp.abs(updates["w"]).max() < 0.02


def test_a_gradient_inside_the_subspace_is_no_norm_to_grow_from():
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    tx = galore(optax.adam(1e-2), rank=2, update_proj_gap=50, recovery="matrix")
    params = {"w": jnp.zeros((6, 10))}
    _, state = tx.update({"w": draw(6, 1) @ draw(1, 10)}, tx.init(params), params)
    assert state.recovered_norm["w"] == 0
    for _ in range(3):
        _, state = tx.update({"w": draw(6, 10)}, state, params)
    assert state.recovered_norm["w"] > 0.1


def test_overflow_outside_gives_no_infinity():
    tx = galore(optax.adam(0.1), rank=1, recovery="column")
    params = {"w": jnp.zeros((2, 2))}
    state = tx.init(params)
    for row in ([4.0, 0.0], [4.0, 1.0], [4.0, 1e-30]):
        last = 1e10 if row[1] == 1e-30 else 1.0
        updates, state = tx.update({"w": jnp.array([row, [0.0, last]])}, state, params)
        assert jnp.isfinite(updates["w"]).all()


def test_a_column_of_zeros_has_a_derivative():
    tx = galore(optax.adam(0.1), rank=2, recovery="column")
    params = {"w": jnp.ones((6, 10))}
    gradient = _gradients(1, {"w": (6, 10)})[0]
    _, state = tx.update(gradient, tx.init(params), params)

    def size(gradient):
        updates, _ = tx.update({"w": gradient}, state, params, refresh=False)
        return jnp.sum(updates["w"] ** 2)

    assert jnp.isfinite(jax.grad(size)(gradient["w"].at[:, 0].set(0))).all()


def test_float64_keeps_the_state_s_dtypes():
    with jax.enable_x64(True):
        params = {"w": jnp.ones((6, 10), jnp.float64)}
        for tx in (
            galore(optax.adam(0.1), rank=2, recovery="column"),
            galore_muon(0.1, rank=2, most_growth=1.01),
        ):
            state = tx.init(params)
            _, after = tx.update(params, state, params)
            dtypes = lambda tree: jax.tree.map(lambda x: x.dtype, tree)  # noqa: E731
            assert dtypes(after) == dtypes(state)
