"""8-bit Adam against Adam, in Optax's wrappers, in GaLore, on disk."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import serialization
from orbax.checkpoint import v1 as ocp

from galore_jax import adamw8bit, galore, galore_adamw, galore_adamw8bit, scale_by_adam8bit
from galore_jax.memory import count_state, tree_bytes
from galore_jax.quantization import FirstMoment, Quantized, dequantize, is_quantized
from galore_jax.rounding import apply_updates

N = 1024


def heavy_tailed(key):
    return jax.random.t(key, 2.0, (N,)) * 10 ** jnp.linspace(-2, 0, N)


def sparse(key):
    where, what = jax.random.split(key)
    return jnp.where(jax.random.uniform(where, (N,)) < 0.02, jax.random.normal(what, (N,)), 0.0)


def vanishing(key):
    return jax.random.normal(key, (N,)) * 10 ** jnp.linspace(-2, 0, N)


@pytest.mark.parametrize("draw", [heavy_tailed, sparse, vanishing])
def test_follows_adam_for_2000_updates(draw):
    # As the paper has it (the second moment itself in 8 bits, to nearest) the error is a
    # hundredfold on the first two of these: small second moments round to zero.
    exact, ours = optax.scale_by_adam(), scale_by_adam8bit(min_8bit_size=0)

    def step(states, t):
        gradient = draw(jax.random.fold_in(jax.random.key(0), t))
        if draw is vanishing:  # every other value falls by four decades beside its neighbours
            gradient *= 10.0 ** (-4 * t / 2000 * (jnp.arange(N) % 2))
        (a, exact_state), (b, our_state) = (
            tx.update(gradient, state) for tx, state in zip((exact, ours), states, strict=True)
        )
        error = jnp.linalg.norm(b - a) / jnp.linalg.norm(a)
        return (exact_state, our_state), (error, jnp.vdot(a, b) / jnp.vdot(a, a))

    start = exact.init(jnp.zeros(N)), ours.init(jnp.zeros(N))
    _, (error, slope) = jax.jit(lambda s: jax.lax.scan(step, s, jnp.arange(2000)))(start)
    assert error.max() < 0.17  # of the update's norm; 0.12 is its mean
    assert error[1500:].mean() < error[100:500].mean() + 0.03
    assert abs(slope[1500:].mean() - 1) < 0.02  # neither too large nor too small


# The largest update and the error of each of 100 updates of bitsandbytes' Adam8bit, on gradients
# from ``spread``; the error is in parts of the norm of the update of torch.optim.Adam.
BITSANDBYTES = np.load(Path(__file__).parents[1] / "golden" / "bitsandbytes.npz")
SPREADS = ["columns_1e6", "columns_1e8", "lognormal"]


def spread(name, t):
    """Gradients whose values differ by many decades within each block."""
    normal = np.random.default_rng([t, 7]).standard_normal((64, 256)).astype(np.float32)
    if name == "lognormal":
        return normal * np.exp(4 * np.random.default_rng(5).standard_normal((64, 256)), dtype="f4")
    return normal * np.logspace(0, int(name[-1]), 256, dtype=np.float32)


@pytest.mark.parametrize("name", SPREADS)
def test_follows_adam_where_values_in_a_block_differ_by_decades(name):
    # In the published map the lowest second moments of a block become zero, and updates 1e2 to 1e6.
    exact, ours = optax.adam(1.0), adamw8bit(1.0, weight_decay=0.0)

    @jax.jit
    def step(gradient, states):
        (a, exact_state), (b, our_state) = (
            tx.update(gradient, state, gradient)
            for tx, state in zip((exact, ours), states, strict=True)
        )
        largest = jnp.abs(a).max(), jnp.abs(b).max()
        return (exact_state, our_state), (*largest, jnp.linalg.norm(b - a) / jnp.linalg.norm(a))

    states = exact.init(jnp.zeros((64, 256))), ours.init(jnp.zeros((64, 256)))
    found = []
    for t in range(100):
        states, numbers = step(jnp.asarray(spread(name, t)), states)
        found.append([float(x) for x in numbers])
    exact_largest, largest, error = np.array(found).T
    theirs_largest, theirs_error = (BITSANDBYTES[f"{name}/{x}"] for x in ("largest", "error"))
    assert largest.max() < 1.1 * exact_largest.max()
    assert largest.max() < theirs_largest.max()
    assert error.max() < 0.17
    assert error.mean() < min(0.12, theirs_error.mean() / 6)


def test_follows_adam_in_galore_on_a_gradient_of_low_rank():
    # The projected gradient has rows that are zero but for rounding, in a block with large ones.
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((512, 2)) @ rng.standard_normal((2, 64)), jnp.float32)
    target = x @ jnp.asarray(rng.standard_normal((64, 64)) / 8, jnp.float32)
    loss = lambda w: jnp.sum(jnp.square(x @ w - target))  # noqa: E731
    found = []
    for inner in (optax.adamw(1e-2), adamw8bit(1e-2, min_8bit_size=0)):
        tx = galore(inner, rank=16)

        @jax.jit
        def several(carry, tx=tx):
            def step(carry, _):
                weights, state = carry
                updates, state = tx.update(jax.grad(loss)(weights), state, weights)
                weights = optax.apply_updates(weights, updates)
                return (weights, state), jnp.abs(updates).max()

            (weights, _), largest = jax.lax.scan(step, carry, length=190)
            return loss(weights), largest.max()

        weights = jnp.zeros((64, 64))
        found.append(several((weights, tx.init(weights))))
    (exact_loss, exact_largest), (our_loss, largest) = found
    assert largest < 2 * exact_largest
    assert our_loss < 1.5 * exact_loss


@jax.jit
def every_noise(number):
    """Noise of shape (2**12, 257), in 16 calls all of its 2**24 values but for column 0."""
    values = jax.lax.iota(jnp.int32, 2**20) + number * 2**20
    noise = values.reshape(-1, 256).astype(jnp.float32) * jnp.float32(2.0**-24)
    return jnp.pad(noise, ((0, 0), (1, 0)), constant_values=0.5)


def test_zero_stays_zero_for_every_noise(monkeypatch):
    tx = scale_by_adam8bit(block_size=257)
    gradient = jnp.zeros((2**12, 257)).at[:, 0].set(1.0)  # one value that moves in every block

    @jax.jit
    def twice(gradient, noise):
        monkeypatch.setattr("galore_jax.adam8bit.dithering", lambda *_: noise)
        _, state = tx.update(gradient, tx.init(gradient))
        updates, state = tx.update(gradient, state)
        return [x[:, 1:].any() for x in (updates, state.mu.codes, state.nu.codes)]

    for number in range(16):
        assert not any(twice(gradient, every_noise(number)))


@pytest.mark.parametrize("bits", [None, 8, 4])
def test_flax_writes_and_reads_a_quantised_state(bits):
    tx = galore(adamw8bit(0.01, min_8bit_size=0), rank=16, projector_bits=bits)
    weights, state = run(tx, 2)
    back = serialization.from_bytes(tx.init(weights), serialization.to_bytes(state))
    assert jax.tree.structure(back) == jax.tree.structure(state)
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(back), strict=True):
        assert a.dtype == b.dtype
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_a_moment_without_gradient_goes_to_zero():
    # To nearest the first moment sticks at small codes, and is divided by ever less.
    tx = scale_by_adam8bit(min_8bit_size=0)
    first = jnp.ones(256).at[1:].set(1e-3)  # one block, whose scale stays
    state = tx.init(first)
    _, state = tx.update(first, state)
    only_first = jnp.zeros(256).at[0].set(1.0)
    for _ in range(300):
        updates, state = jax.jit(tx.update)(only_first, state)
    assert jnp.abs(updates[1:]).max() < 1e-6
    assert jnp.abs(dequantize(state.mu)[1:]).max() == 0


def params():
    rng = np.random.default_rng(0)
    shapes = {"wide": (48, 100), "stack": (3, 32, 64), "bias": (100,), "scalar": ()}
    return {k: jnp.asarray(rng.standard_normal(s), jnp.float32) for k, s in shapes.items()}


def run(tx, steps=6, start=None, **kwargs):
    weights, state = start or (params(), None)
    state = tx.init(weights) if state is None else state
    update = jax.jit(tx.update)
    for i in range(steps):
        gradients = jax.tree.map(lambda w, i=i: jnp.sin((i + 1) * 7 * w), params())
        updates, state = update(gradients, state, weights)
        weights = optax.apply_updates(weights, updates)
    return weights, state


@pytest.mark.parametrize("nesterov", [False, True])
def test_small_leaves_are_exactly_optax(nesterov):
    decay = {
        "weight_decay": 0.1,
        "mask": {"wide": True, "stack": True, "bias": False, "scalar": False},
    }
    schedule = optax.linear_schedule(0.1, 0.01, 5)
    ours, state = run(adamw8bit(schedule, min_8bit_size=10**6, nesterov=nesterov, **decay))
    theirs, _ = run(optax.adamw(schedule, nesterov=nesterov, **decay))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6), ours, theirs)
    assert not any(map(is_quantized, jax.tree.leaves(state, is_leaf=is_quantized)))


def test_bytes_are_one_a_value_and_four_a_block():
    state = adamw8bit(0.1, min_8bit_size=4096).init(params())
    mu = state[0].mu
    assert isinstance(mu["wide"], Quantized)
    assert isinstance(mu["stack"], Quantized)
    assert tree_bytes(mu["wide"]) == 4800 + 4 * 24  # blocks of two rows of 100
    assert tree_bytes(mu["stack"]) == 3 * 2048 + 4 * 3 * 8
    assert mu["bias"].dtype == mu["scalar"].dtype == jnp.float32
    assert count_state(state).total == sum(x.nbytes for x in jax.tree.leaves(state))
    assert tree_bytes(jnp.zeros((3, 5), jnp.int4)) == 8


def test_optax_wrappers():
    static = ("block_size", "min_8bit_size")
    injected = optax.inject_hyperparams(adamw8bit, static_args=static)(0.1)
    run(injected)
    (a, _), (b, _) = run(injected, 1), run(adamw8bit(0.1), 1)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), a, b)
    with pytest.raises(TypeError, match=r"block_size sets shapes: .* static_args"):
        optax.inject_hyperparams(adamw8bit)(0.1).init(params())
    tx = adamw8bit(0.1)
    state = tx.init(params())
    same = optax.tree_utils.tree_map_params(tx, lambda x: x, state)
    assert jax.tree.structure(same) == jax.tree.structure(state)
    masked = optax.masked(adamw8bit(0.1), lambda p: {k: k != "bias" for k in p})
    run(masked)


@pytest.mark.parametrize("bits", [None, 8, 4])
def test_in_galore_state_is_low_rank_and_follows_float32(bits):
    options = {
        "rank": 16,
        "update_proj_gap": 3,
        "rotate_moments": True,
        "target_modules": ("wide", "stack"),
    }
    weights, state = run(
        galore_adamw8bit(0.01, projector_bits=bits, min_8bit_size=0, scale=1.0, **options), 8
    )
    exact, exact_state = run(galore_adamw(0.01, scale=1.0, **options), 8)
    assert state.inner_state[0].mu["stack"].codes.shape == (3, 16, 64)
    assert is_quantized(state.projector["stack"]) == (bits is not None)
    if bits is not None:
        basis = dequantize(state.projector["wide"])
        error = jnp.linalg.norm(basis - exact_state.projector["wide"]) / 4.0
        assert error < {8: 0.02, 4: 0.2}[bits]
    moved = optax.tree.norm(optax.tree.sub(exact, params()))
    gap = optax.tree.norm(optax.tree.sub(weights, exact)) / moved
    assert gap < {None: 0.2, 8: 0.2, 4: 0.4}[bits]


def test_transport_rotates_a_quantised_moment():
    tx = galore(adamw8bit(0.1, min_8bit_size=0), rank=8, rotate_moments=True)
    gradient = {"w": jax.random.normal(jax.random.key(0), (32, 64))}
    state = tx.init(gradient)
    for i in range(10):  # second moments of one gradient are as uneven as its squares are
        gradient = {"w": jax.random.normal(jax.random.key(i), (32, 64))}
        _, state = tx.update(gradient, state, gradient)
    other = {"w": jax.random.normal(jax.random.key(10), (32, 64))}
    _, turned = tx.update(other, state, gradient, refresh=True)
    old, new = state.projector["w"], turned.projector["w"]
    before = dequantize(FirstMoment(state.inner_state[0].mu["w"], state.inner_state[0].nu["w"]))
    expected = 0.9 * new.T @ old @ before + 0.1 * new.T @ other["w"]
    after = FirstMoment(turned.inner_state[0].mu["w"], turned.inner_state[0].nu["w"])
    error = dequantize(after) - expected
    assert jnp.linalg.norm(error) < 0.05 * jnp.linalg.norm(expected)


def test_a_projector_is_kept_between_refreshes_and_over_nans():
    tx = galore(optax.sgd(0.1), rank=8, update_proj_gap=2, projector_bits=4)
    gradient = {"w": jax.random.normal(jax.random.key(0), (32, 64))}
    _, first = tx.update(gradient, tx.init(gradient), gradient)
    _, second = tx.update({"w": gradient["w"][::-1]}, first, gradient)
    _, third = tx.update({"w": gradient["w"].at[0, 0].set(jnp.nan)}, second, gradient)
    for state in (second, third):
        np.testing.assert_array_equal(
            np.asarray(state.projector["w"].codes, np.int32),
            np.asarray(first.projector["w"].codes, np.int32),
        )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"projector_bits": 2}, "projector_bits must be 8, 4 or None, got 2"),
        ({"projector_bits": 8, "projector_dtype": "float32"}, "exclude each other"),
    ],
)
def test_bad_bits(arguments, message):
    with pytest.raises(ValueError, match=message):
        galore(optax.sgd(0.1), **arguments)


@pytest.mark.parametrize("bits", [8, 4])
def test_resumed_from_disk_it_is_the_same_bit_for_bit(bits, tmp_path):
    tx = galore_adamw8bit(
        0.01, rank=16, update_proj_gap=2, projector_bits=bits, min_8bit_size=0,
        target_modules=("wide", "stack"), projector="subspace_iteration",
    )  # fmt: skip
    weights, state = run(tx, 3)
    ocp.save(tmp_path / "state", {"weights": weights, "state": state})
    shapes = jax.eval_shape(lambda: {"weights": weights, "state": state})
    back = ocp.load(tmp_path / "state", shapes)
    expected, resumed = run(tx, 3, (weights, state)), run(tx, 3, (back["weights"], back["state"]))
    for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(resumed), strict=True):
        assert a.dtype == b.dtype
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_donated_state_in_a_scan():
    tx = adamw8bit(0.1)
    gradients = jax.tree.map(lambda x: jnp.stack([x] * 4), params())

    def several(state):
        return jax.lax.scan(lambda s, g: (tx.update(g, s, params())[1], None), state, gradients)[0]

    compiled = jax.jit(several, donate_argnums=0).lower(tx.init(params())).compile()
    assert compiled.memory_analysis().alias_size_in_bytes >= tree_bytes(tx.init(params())) - 64
    after = compiled(tx.init(params()))
    assert after[0].count == 4


def test_stochastic_rounding_keeps_what_nearest_loses():
    update = {"w": jnp.full((64, 64), 2.0**-12, jnp.float32)}
    start = {"w": jnp.ones((64, 64), jnp.bfloat16)}
    after = {}
    for rounding in ("nearest", "stochastic"):
        weights = start
        for count in range(256):
            weights = apply_updates(weights, update, count, rounding)
        assert weights["w"].dtype == jnp.bfloat16
        after[rounding] = weights["w"].astype(jnp.float32)
    assert (after["nearest"] == 1).all()
    np.testing.assert_allclose(after["stochastic"].mean(), 1 + 256 * 2.0**-12, atol=5e-4)
    float32 = apply_updates({"w": jnp.ones(3)}, {"w": jnp.full(3, 1e-6)}, 0, "stochastic")
    np.testing.assert_array_equal(float32["w"], np.float32(1) + np.float32(1e-6))
