"""The transformation against the authors' numbers, closed forms and loops."""

import re
import subprocess
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import galore_jax
from galore_jax import galore, galore_adamw, projectors

SHAPES = {"wide": (6, 10), "tall": (10, 6), "square": (8, 8), "stack": (3, 6, 10)}


def random_tree(seed, shapes=SHAPES, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(seed), len(shapes))
    return {
        name: jax.random.normal(key, shape, dtype)
        for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }


def test_full_rank_with_sgd_is_sgd():
    params, grads = random_tree(0), random_tree(1)
    tx = galore(optax.sgd(0.1), rank=64, scale=1.0, target_modules=".")
    updates, _ = tx.update(grads, tx.init(params), params)
    for name, gradient in grads.items():
        np.testing.assert_allclose(updates[name], -0.1 * gradient, atol=1e-6)


def test_update_is_scaled_projection_onto_top_singular_vectors():
    gradient = random_tree(1)["wide"]
    tx = galore(optax.sgd(1.0), rank=2, scale=0.25)
    updates, _ = tx.update({"w": gradient}, tx.init({"w": gradient}))
    u, s, vh = np.linalg.svd(gradient)
    best = (u[:, :2] * s[:2]) @ vh[:2]
    np.testing.assert_allclose(updates["w"], -0.25 * best, atol=1e-6)


def test_basis_changes_only_at_multiples_of_the_gap():
    tx = galore(optax.sgd(1.0), rank=2, update_proj_gap=3)
    params = random_tree(0, {"w": (6, 10)})
    state, bases = tx.init(params), []
    for step in range(7):
        _, state = tx.update(random_tree(step + 1, {"w": (6, 10)}), state, params)
        bases.append(np.asarray(state.projector["w"]))
    changed = [i for i in range(1, 7) if not np.array_equal(bases[i], bases[i - 1])]
    assert changed == [3, 6]


def test_moments_are_low_rank_and_projectors_masked():
    params = random_tree(0, {**SHAPES, "bias": (10,)})
    tx = galore_adamw(1e-3, rank=2, target_modules=".")
    state = tx.init(params)
    assert {n: p.shape for n, p in state.projector.items() if n != "bias"} == {
        "wide": (6, 2), "tall": (6, 2), "square": (8, 2), "stack": (3, 6, 2)
    }  # fmt: skip
    assert state.projector["bias"] == optax.MaskedNode()
    adam = state.inner_state[0]
    assert {n: m.shape for n, m in adam.mu.items()} == {
        "wide": (2, 10), "tall": (10, 2), "square": (2, 8), "stack": (3, 2, 10), "bias": (10,)
    }  # fmt: skip


def test_stack_equals_loop():
    stacked = {"w": (3, 6, 10)}
    tx = galore_adamw(0.1, rank=2, update_proj_gap=2, target_modules="w", weight_decay=0.1)
    params = random_tree(0, stacked)
    state = tx.init(params)
    loop = [{"w": params["w"][i]} for i in range(3)]
    states = [tx.init(p) for p in loop]
    for step in range(5):
        grads = random_tree(step + 1, stacked)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        for i in range(3):
            u, states[i] = tx.update({"w": grads["w"][i]}, states[i], loop[i])
            loop[i] = optax.apply_updates(loop[i], u)
    np.testing.assert_allclose(params["w"], jnp.stack([p["w"] for p in loop]), atol=1e-6)


@pytest.mark.parametrize(
    "alias", [optax.adamw, optax.nadamw, optax.lion, optax.adamaxw, optax.adan]
)
@pytest.mark.parametrize("masked", [False, True])
def test_decay_acts_on_the_whole_weight_without_scale(alias, masked):
    wd, lr = 0.1, optax.linear_schedule(0.1, 0.02, 4)
    mask = {"wide": True, "tall": False, "stack": True} if masked else None
    kept = {"wide": 1, "tall": not masked, "stack": 1}
    shapes = {name: SHAPES[name] for name in kept}
    kwargs = {"rank": 2, "update_proj_gap": 2, "target_modules": "."}
    decayed = galore(alias(lr, weight_decay=wd, mask=mask), **kwargs)
    plain = galore(alias(lr, weight_decay=0.0), **kwargs)
    a = b = random_tree(0, shapes)
    state_a, state_b = decayed.init(a), plain.init(b)
    update_a, update_b = jax.jit(decayed.update), jax.jit(plain.update)
    for step in range(4):
        grads = random_tree(step + 1, shapes)
        updates, state_a = update_a(grads, state_a, a)
        a = optax.apply_updates(a, updates)
        updates, state_b = update_b(grads, state_b, b)
        b = {n: b[n] + updates[n] - lr(step) * wd * kept[n] * b[n] for n in b}
        for name in shapes:
            np.testing.assert_allclose(a[name], b[name], atol=2e-6)


def test_zero_decay_costs_no_projection_of_the_weights():
    params = random_tree(0, {"w": (6, 10)})

    def products(weight_decay):
        tx = galore_adamw(0.1, rank=2, weight_decay=weight_decay)
        compiled = jax.jit(tx.update).lower(params, tx.init(params), params).compile()
        return len(re.findall(r"\bdot\(|__cublas|onednn|custom-call.*matmul", compiled.as_text()))

    assert products(0.1) == products(0.0) + 1


def test_non_finite_gradient_keeps_that_matrix_basis():
    shapes = {"good": (6, 10), "stack": (2, 6, 10)}
    params = random_tree(0, shapes)
    tx = galore(optax.sgd(0.1), rank=2, update_proj_gap=1, target_modules=".")
    _, before = tx.update(random_tree(1, shapes), tx.init(params), params)
    grads = random_tree(2, shapes)
    grads["stack"] = grads["stack"].at[1, 0, 0].set(jnp.nan)
    _, after = tx.update(grads, before, params)
    assert np.array_equal(after.projector["stack"][1], before.projector["stack"][1])
    assert not np.array_equal(after.projector["stack"][0], before.projector["stack"][0])
    assert not np.array_equal(after.projector["good"], before.projector["good"])


def test_zero_gradient_gives_no_nan():
    params = random_tree(0)
    tx = galore_adamw(0.1, rank=2, target_modules=".", weight_decay=0.1)
    updates, state = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves((updates, state)))


def test_bfloat16_stays_and_the_basis_is_that_of_float32():
    params, grads = random_tree(0, dtype=jnp.bfloat16), random_tree(1, dtype=jnp.bfloat16)
    tx = galore_adamw(0.1, rank=2, target_modules=".", weight_decay=0.1)
    state = tx.init(params)
    updates, new = jax.jit(tx.update)(grads, state, params)
    assert all(u.dtype == jnp.bfloat16 for u in updates.values())
    shapes_of = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)  # noqa: E731
    assert shapes_of(new) == shapes_of(state)
    exact = projectors.svd_projector(grads["wide"].astype(jnp.float32), 2, "left")
    assert np.array_equal(new.projector["wide"], exact.astype(jnp.bfloat16))


def test_three_spellings():
    params, grads = random_tree(0), random_tree(1)
    wrapped = optax.chain(optax.clip_by_global_norm(1.0), galore(optax.adamw(0.1), rank=2))
    chained = galore_jax.chain(optax.clip_by_global_norm(1.0), galore(rank=2), optax.adamw(0.1))
    a, state_a = wrapped.update(grads, wrapped.init(params), params)
    b, state_b = chained.update(grads, chained.init(params), params)
    for name in params:
        np.testing.assert_allclose(a[name], b[name], rtol=1e-6)
    bytes_of = lambda state: sum(x.nbytes for x in jax.tree.leaves(state))  # noqa: E731
    assert bytes_of(state_a) == bytes_of(state_b)

    plain = optax.chain(galore(rank=2, scale=0.5), optax.sgd(1.0))
    with pytest.warns(UserWarning, match="galore_jax.chain") as caught:
        state = plain.init(params)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plain.init(params)
    updates, _ = plain.update(grads, state, params)
    u = np.linalg.svd(grads["wide"])[0][:, :2]
    np.testing.assert_allclose(updates["wide"], -0.5 * u @ u.T @ grads["wide"], atol=1e-6)


def test_scan_and_no_recompilation():
    params = random_tree(0)
    tx = galore_adamw(optax.linear_schedule(0.1, 0.0, 5), rank=2, update_proj_gap=2)
    grads = jax.tree.map(lambda *g: jnp.stack(g), *(random_tree(i + 1) for i in range(5)))
    traces = 0

    @jax.jit
    def step(carry, gradient):
        nonlocal traces
        traces += 1
        params, state = carry
        updates, state = tx.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), None

    carry = (params, tx.init(params))
    for i in range(5):
        carry, _ = step(carry, jax.tree.map(lambda g, i=i: g[i], grads))
    assert traces == 1
    (scanned, _), _ = jax.lax.scan(step, (params, tx.init(params)), grads)
    for name in params:
        np.testing.assert_allclose(scanned[name], carry[0][name], atol=1e-6)


def test_signs_do_not_depend_on_the_solver():
    matrix = np.asarray(random_tree(3)["tall"])
    for side in ("left", "right"):
        basis = np.asarray(projectors.svd_projector(jnp.asarray(matrix), 4, side))
        flipped = np.asarray(projectors.svd_projector(jnp.asarray(-matrix), 4, side))
        np.testing.assert_allclose(basis, flipped, atol=1e-6)
        assert (np.take_along_axis(basis, np.abs(basis).argmax(0)[None], 0) > 0).all()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"rank": 0}, ValueError, "rank must be an int of at least 1, got 0"),
        ({"rank": 2.0}, TypeError, r"rank must be an int of at least 1, got 2\.0"),
        ({"rank": True}, TypeError, "rank must be an int"),
        ({"update_proj_gap": 0}, ValueError, "update_proj_gap must be an int of at least 1, got 0"),
        ({"scale": 0.0}, ValueError, r"scale must be a number greater than 0, got 0\.0"),
        ({"seed": -1}, ValueError, "seed must be an int of at least 0, got -1"),
        ({"power_iterations": 0}, ValueError, "power_iterations must be an int of at least 1"),
        ({"rotate_moments": "yes"}, TypeError, "rotate_moments must be a bool, got 'yes'"),
        ({"projector_dtype": "int8"}, ValueError, "projector_dtype must be a float dtype.*'int8'"),
        ({"projector_dtype": "float33"}, TypeError, "projector_dtype must be .*'float33'"),
        ({"projector": "svdd"}, ValueError, "projector must be one of .* did you mean 'svd'"),
        ({"scale": "1"}, TypeError, "scale must be a number greater than 0, got '1'"),
        ({"proj_type": "diagonal"}, ValueError, "proj_type .*'diagonal'"),
        ({"projector": "qr"}, ValueError, "projector .*'qr'"),
        ({"target_modules": "("}, ValueError, "no regular expression"),
        ({"target_modules": 3}, TypeError, "must be a regular expression.*got 3"),
        ({"optimizer": 128}, TypeError, "optimizer must be .*got int"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        galore(**{"optimizer": optax.sgd(1.0), **arguments})


def test_bad_chains_and_targets():
    with pytest.raises(ValueError, match="at the end of a chain"):
        galore_jax.chain(optax.clip(1.0), galore(rank=2))
    with pytest.raises(ValueError, match="one bare galore"):
        galore_jax.chain(galore(rank=2), galore(rank=2), optax.sgd(1.0))
    with pytest.raises(ValueError, match=r"target_modules='attention' matches no leaf.*wide"):
        galore(optax.sgd(1.0), rank=2, target_modules="attention").init(random_tree(0))


def test_copies_of_the_weights_follow_the_basis():
    # z = W + scale P (V_z - V) outside and inside: a schedule-free run whose learning rate is 0
    # leaves the weights where they are, whatever the bases do.
    params = random_tree(0)
    tx = galore(optax.contrib.schedule_free_sgd(1e-12), rank=2, update_proj_gap=1)
    state, update = tx.init(params), jax.jit(tx.update)
    seen = params
    for i in range(4):
        updates, state = update(random_tree(i + 1), state, seen)
        seen = optax.apply_updates(seen, updates)
    for name in params:
        np.testing.assert_allclose(seen[name], params[name], atol=1e-5)
    low = state.projector["wide"].T @ seen["wide"] / 0.25
    np.testing.assert_allclose(state.inner_state.z["wide"], low, atol=1e-5)


def test_a_state_that_is_a_function_of_the_weights_is_refused():
    inner = optax.GradientTransformation(
        lambda params: jax.tree.map(jnp.square, params), lambda u, s, p=None: (u, s)
    )
    with pytest.raises(ValueError, match="function of the weights' values"):
        galore(inner, rank=2).init(random_tree(0))


def test_inject_hyperparams_of_the_scale():
    make = optax.inject_hyperparams(galore_adamw, static_args="rank")
    params, grads = random_tree(0), random_tree(1)
    tx = make(learning_rate=0.1, rank=2, scale=0.5)
    updates, state = tx.update(grads, tx.init(params), params)
    expected = galore_adamw(0.1, rank=2, scale=0.5)
    others, _ = expected.update(grads, expected.init(params), params)
    np.testing.assert_allclose(updates["wide"], others["wide"], rtol=1e-5)
    assert float(state.hyperparams["scale"]) == 0.5


def test_integer_and_empty_leaves_pass_through():
    params = {"w": jnp.ones((4, 6)), "empty": jnp.ones((0, 6)), "id": jnp.arange(3)}
    grads = {**params, "id": jnp.zeros(3, jnp.int32)}
    tx = galore(optax.sgd(1.0), rank=2)
    updates, _ = tx.update(grads, tx.init(params), params)
    assert updates["id"].shape == (3,)
    assert updates["empty"].shape == (0, 6)


def test_the_core_needs_jax_and_optax_alone():
    code = "import galore_jax, galore_jax.memory, sys; print(sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for package in ("flax", "orbax", "grain", "tensorflow_datasets", "ml_collections", "rich"):
        assert f"'{package}'" not in done.stdout
