"""What Optax asks of the optimizers contributed to it, and its own tests of GaLore, adapted."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from float64 import float64_types

from galore_jax import galore, galore_adamw

NUMBERS = optax.contrib.GaLoreDimensionNumbers()
SHAPES = {"wide": (6, 10), "tall": (9, 5), "bias": (10,)}


def tree(seed, dtype="float32"):
    rng = np.random.default_rng(seed)
    return {k: jnp.asarray(rng.standard_normal(s), dtype) for k, s in SHAPES.items()}


def close(a, b, **tolerance):
    tolerance = tolerance or {"rtol": 1e-5, "atol": 1e-6}
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), a, b)


def stacked(trees):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def types(tree):
    return jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), tree)


def test_unexpected_arguments_a_second_call_and_a_scan():
    tx = galore_adamw(0.1, rank=2, update_proj_gap=2)
    traces = 0

    @jax.jit
    def step(carry, gradient):
        nonlocal traces
        traces += 1
        params, state = carry
        updates, state = tx.update(gradient, state, params, nobody_expects_this=1)
        return (optax.apply_updates(params, updates), state), None

    carry = start = (tree(0), tx.init(tree(0)))
    for i in range(5):
        carry, _ = step(carry, tree(i + 1))
    # A count or a moment that came back with another type would be traced again.
    assert traces == 1
    scanned, _ = jax.lax.scan(step, start, stacked([tree(i + 1) for i in range(5)]))
    close(scanned, carry)


def test_vmap_over_runs_equals_a_loop():
    # The refresh becomes a select, the SVD a batched one.
    tx = galore_adamw(0.1, rank=2, update_proj_gap=2, weight_decay=0.1)

    def run(params, first, second):
        state = tx.init(params)
        for gradient in (first, second, first):
            updates, state = tx.update(gradient, state, params)
            params = optax.apply_updates(params, updates)
        return params, state

    runs = [(tree(i), tree(10 + i), tree(20 + i)) for i in range(3)]
    batched = jax.jit(jax.vmap(run))(*stacked(runs))
    close(batched, stacked([run(*of) for of in runs]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("optimizer", ["adamw", "polyak_sgd"])
def test_types_of_state_and_updates_are_stable(dtype, optimizer):
    inner = {
        "adamw": optax.adamw(optax.linear_schedule(0.1, 0.0, 9), weight_decay=0.1),
        "polyak_sgd": optax.polyak_sgd(),
    }[optimizer]
    tx = galore(inner, rank=2, update_proj_gap=2)
    with float64_types(dtype == "float64"):
        params, grads = tree(0, dtype), tree(1, dtype)
        state = tx.init(params)
        # A loss of another dtype than the params must not leak into the updates.
        value = jnp.asarray(1.0, "float16" if dtype != "float16" else "bfloat16")
        updates, new = jax.jit(tx.update)(grads, state, params, value=value)
        assert {u.dtype for u in updates.values()} == {jnp.dtype(dtype)}
        assert types(new) == types(state)
        assert state.projector["wide"].dtype == dtype
        kept = jax.jit(jax.lax.cond, static_argnums=(1, 2))(
            jnp.bool_(True), lambda a, b: a, lambda a, b: b, state, new
        )
        assert types(kept) == types(state)
        assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves((updates, new)))


@pytest.mark.parametrize("order", [False, True])
def test_a_constant_schedule_is_that_constant(order):
    def train(learning_rate):
        tx = galore_adamw(
            learning_rate, rank=2, update_proj_gap=2, weight_decay=0.1, galore_torch_order=order
        )
        params = tree(0)
        state, update = tx.init(params), jax.jit(tx.update)
        for i in range(3):
            updates, state = update(tree(i + 1), state, params)
            params = optax.apply_updates(params, updates)
        return params

    close(train(optax.constant_schedule(1e-2)), train(1e-2))


@pytest.mark.parametrize("traced", [False, True])
def test_refresh_overrides_the_schedule_for_one_call(traced):
    tx = galore(optax.sgd(0.1), rank=2, update_proj_gap=3)
    update = jax.jit(tx.update) if traced else tx.update
    state, changed = tx.init(tree(0)), []
    # By the schedule updates 0, 3 and 6 change the basis.
    for i, refresh in enumerate([None, True, None, False, None, None, None]):
        given = {} if refresh is None else {"refresh": refresh}
        _, new = update(tree(i + 1), state, tree(0), **given)
        changed.append(not np.array_equal(new.projector["wide"], state.projector["wide"]))
        state = new
    assert changed == [True, True, False, False, False, False, True]
    assert int(state.count) == 7


def test_a_static_refresh_compiles_without_the_other_case():
    tx = galore_adamw(0.1, rank=2)
    state = tx.init(tree(0))

    def compiled(**refresh):
        update = jax.jit(lambda g, s, p: tx.update(g, s, p, **refresh))
        return update.lower(tree(1), state, tree(0)).compile().as_text()

    decomposes = lambda text: "gesdd" in text or "gesvd" in text  # noqa: E731
    assert not decomposes(compiled(refresh=False))
    assert decomposes(compiled(refresh=True))
    assert "conditional" not in compiled(refresh=True)
    assert decomposes(compiled())


def test_the_loss_reaches_an_optimizer_that_asks_for_it():
    # Polyak's step is value / |g|^2 times g, here of what the optimizer sees: P^T G.
    tx = galore(optax.polyak_sgd(max_learning_rate=1e6), rank=2, scale=1.0)
    wide = {"wide": tree(1)["wide"]}
    updates, state = tx.update(wide, tx.init(wide), wide, value=jnp.float32(3.0))
    p = np.asarray(state.projector["wide"])
    low = p.T @ np.asarray(wide["wide"])
    close(updates["wide"], -3.0 / (low**2).sum() * p @ low, rtol=1e-4)
    momo = galore(optax.contrib.momo(0.1), rank=2)
    state = momo.init(wide)
    small, _ = momo.update(wide, state, wide, value=jnp.float32(0.01))
    large, _ = momo.update(wide, state, wide, value=jnp.float32(100.0))
    assert optax.tree.norm(small) < 0.5 * optax.tree.norm(large)


@pytest.mark.parametrize(
    ("shape", "rank", "projector", "moments"),
    [
        ((32, 64), 8, (64, 8), (32, 8)),
        ((64, 32), 8, (64, 8), (8, 32)),
        ((64, 64), 8, (64, 8), (8, 64)),
        ((10, 3), 999, (10, 3), (3, 3)),
    ],
)
def test_shapes_of_the_state_in_reverse_std_are_those_of_optax(shape, rank, projector, moments):
    params = jnp.zeros(shape)
    state = galore(optax.adam(0.1), rank=rank, proj_type="reverse_std").init(params)
    theirs = optax.contrib.galore(0.1, rank=rank).init(params)[0]
    assert state.projector.shape == theirs.projector.shape == projector
    adam = state.inner_state[0]
    assert adam.mu.shape == adam.nu.shape == theirs.base_optimizer_state.mu.shape == moments


def test_projectors_are_orthonormal_and_keep_to_the_gap():
    params = jax.random.normal(jax.random.key(0), (16, 32))
    gradients = [jax.random.normal(jax.random.key(i), (16, 32)) for i in (1, 2)]
    for gap, same in ((1000, True), (1, False)):
        tx = galore(optax.adam(0.1), rank=4, update_proj_gap=gap, proj_type="reverse_std")
        _, first = tx.update(gradients[0], tx.init(params), params)
        _, second = tx.update(gradients[1], first, params)
        close(second.projector.T @ second.projector, np.eye(4), atol=1e-5)
        assert np.array_equal(first.projector, second.projector) == same


def test_mu_dtype_is_that_of_the_optimizer_and_updates_have_the_params():
    params = {"w": jnp.ones((16, 32), "bfloat16"), "conv": jnp.ones((3, 3, 8), "bfloat16")}
    links = optax.scale_by_adam(mu_dtype="float32"), optax.scale_by_learning_rate(0.1)
    tx = galore(optax.chain(*links), rank=4)
    state = tx.init(params)
    updates, new = jax.jit(tx.update)(params, state, params)
    assert types(new) == types(state)
    assert {m.dtype for m in new.inner_state[0].mu.values()} == {jnp.dtype("float32")}
    assert {v.dtype for v in new.inner_state[0].nu.values()} == {jnp.dtype("bfloat16")}
    assert {u.dtype for u in optax.apply_updates(params, updates).values()} == {
        jnp.dtype("bfloat16")
    }


@pytest.mark.parametrize(
    "selected",
    [
        {"target_modules": "wide"},
        {"rank": lambda path, leaf: 2 if path == "wide" else None},
        {"weight_dimension_numbers": {"wide": NUMBERS, "tall": None, "bias": None}},
        {"weight_dimension_numbers": lambda p: {**dict.fromkeys(p), "wide": NUMBERS}},
    ],
)
def test_init_takes_a_placeholder_without_leaves(selected):
    # optax.tree_utils.tree_map_params calls it so, whatever selects the leaves.
    tx = galore(optax.adam(0.1), **{"rank": 2, **selected})
    state = tx.init(tree(0))
    close(optax.tree_utils.tree_map_params(tx, lambda v: v, state), state)
