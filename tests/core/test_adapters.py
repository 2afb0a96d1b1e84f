"""LoRA, ReLoRA and low-rank kernels against their definitions."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from galore_jax import linear
from galore_jax.adapters import (
    LoRAKernel,
    LowRankKernel,
    add_lora,
    factorize,
    merge,
    restart,
    trainable,
    with_trainable,
)

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture
def params():
    keys = jax.random.split(jax.random.key(0), 3)
    return {
        "blocks": {"kernel": jax.random.normal(keys[0], (3, 16, 24))},
        "head": jax.random.normal(keys[1], (24, 40)),
        "scale": jnp.ones(24),
    }


def lora(params, **options):
    options = {"rank": 4, "alpha": 8.0, "target_modules": "kernel", **options}
    return add_lora(params, jax.random.key(1), stacked_modules="^blocks/", **options)


def randomized(params):
    """The same with a B that is not zero."""

    def fill(path, leaf):
        last = path[-1]
        is_b = getattr(last, "name", None) == "b"
        return jax.random.normal(jax.random.key(2), leaf.shape) if is_b else leaf

    return jax.tree_util.tree_map_with_path(fill, params)


def model(params, x):
    def block(x, layer):
        return x, jnp.tanh(linear(x, layer["kernel"]))

    _, h = jax.lax.scan(block, x, params["blocks"])
    return linear(h.sum(0) * params["scale"], params["head"])


def test_with_a_new_low_rank_part_the_model_is_the_base_model_exactly(params):
    x = jax.random.normal(jax.random.key(3), (5, 16))
    np.testing.assert_array_equal(model(lora(params), x), model(params, x))


def test_a_lora_kernel_multiplies_as_the_paper_has_it(params):
    node = randomized(lora(params))["blocks"]["kernel"]
    assert isinstance(node, LoRAKernel)
    assert node.scale == 2.0  # alpha / r
    layer = jax.tree.map(lambda leaf: leaf[1], node)
    x = jax.random.normal(jax.random.key(3), (5, 16))
    wide = [np.asarray(v, np.float64) for v in (x, layer.kernel, layer.a, layer.b)]
    expected = wide[0] @ wide[1] + 2.0 * (wide[0] @ wide[2]) @ wide[3]
    np.testing.assert_allclose(linear(x, layer), expected, rtol=1e-5, atol=1e-5)


def test_merged_kernels_compute_the_same(params):
    x = jax.random.normal(jax.random.key(3), (5, 16))
    for adapted in (randomized(lora(params)), factorize(params, jax.random.key(1), rank=4)):
        plain = merge(adapted)
        shapes = jax.tree.map(jnp.shape, (plain, params))
        assert shapes[0] == shapes[1]
        np.testing.assert_allclose(model(plain, x), model(adapted, x), rtol=2e-5, atol=2e-4)


def test_a_restart_keeps_the_function_and_draws_anew(params):
    before = randomized(lora(params))
    after = restart(before, jax.random.key(5))
    x = jax.random.normal(jax.random.key(3), (5, 16))
    np.testing.assert_allclose(model(after, x), model(before, x), rtol=2e-5, atol=2e-4)
    new, old = after["blocks"]["kernel"], before["blocks"]["kernel"]
    assert not new.b.any()
    assert (new.a != old.a).mean() > 0.99
    assert np.abs(new.a).max() <= 16**-0.5
    assert jnp.std(new.a) == pytest.approx(16**-0.5 / 3**0.5, rel=0.1)  # of a uniform number


def test_frozen_kernels_have_neither_gradient_nor_state(params):
    adapted = lora(params)
    x = jax.random.normal(jax.random.key(3), (5, 16))

    def loss(trained):
        return jnp.square(model(with_trainable(adapted, trained), x)).sum()

    trained = trainable(adapted)
    grads = jax.grad(loss)(trained)
    assert len(jax.tree.leaves(grads)) == 4  # A, B, the head and the scale
    state = optax.adam(0.1).init(trained)
    assert sum(leaf.size for leaf in jax.tree.leaves(state[0].mu)) == 3 * 4 * 40 + 24 * 40 + 24
    # No product of the kernel's gradient's shape is computed on the way.
    text = str(jax.make_jaxpr(jax.grad(loss))(trained))
    assert "f32[16,24] = dot_general" not in text
    full = str(jax.make_jaxpr(jax.grad(lambda p: jnp.square(model(p, x)).sum()))(params))
    assert "f32[16,24] = dot_general" in full.replace("f32[24,16] = dot", "f32[16,24] = dot")


def test_training_moves_the_low_rank_part_alone(params):
    adapted = lora(params)
    x = jax.random.normal(jax.random.key(3), (5, 16))
    tx = optax.adam(0.05)
    state, losses = tx.init(trainable(adapted)), []
    for _ in range(30):

        def loss(trained):
            return jnp.square(model(with_trainable(adapted, trained), x) - 1).mean()  # noqa: B023

        value, grads = jax.value_and_grad(loss)(trainable(adapted))
        updates, state = tx.update(grads, state)
        new = optax.apply_updates(trainable(adapted), updates)
        adapted = with_trainable(adapted, new)
        losses.append(float(value))
    assert losses[-1] < losses[0] / 5
    np.testing.assert_array_equal(adapted["blocks"]["kernel"].kernel, params["blocks"]["kernel"])


def test_dropout_drops_inputs_of_the_low_rank_part_alone(params):
    adapted = randomized(lora(params, dropout=0.5))
    x = jax.random.normal(jax.random.key(3), (4000, 16))
    keyed = with_trainable(adapted, trainable(adapted), jax.random.key(7))
    layer = jax.tree.map(lambda leaf: leaf[0], keyed["blocks"]["kernel"])
    plain = jax.tree.map(lambda leaf: leaf[0], adapted["blocks"]["kernel"])
    dropped = linear(x, layer) - x @ layer.kernel
    kept = linear(x, plain) - x @ plain.kernel
    assert jnp.abs(dropped - kept).max() > 0.1
    # Right on average over the rows: E[x kept / (1 - p)] = x.
    gap = (dropped - kept).mean(0)
    assert jnp.abs(gap).max() < 5 * jnp.std(dropped - kept) / 4000**0.5
    keys = jax.random.key_data(keyed["blocks"]["kernel"].dropout_key)
    assert len(np.unique(keys, axis=0)) == 3  # each layer its own
    again = with_trainable(adapted, trainable(adapted), jax.random.key(7))
    np.testing.assert_array_equal(model(again, x[:5]), model(keyed, x[:5]))


def test_factors_have_the_variance_of_the_kernels(params):
    kernels = {"w": 0.02 * params["blocks"]["kernel"]}
    nodes = factorize(kernels, jax.random.key(1), rank=12, stacked_modules="w")
    assert isinstance(nodes["w"], LowRankKernel)
    assert jnp.std(merge(nodes)["w"]) == pytest.approx(0.02, rel=0.15)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank must be at least 1, got 0"),
        ({"alpha": 0.0}, "alpha must be greater than 0"),
        ({"dropout": 1.0}, "dropout must be at least 0 and less than 1"),
        ({"target_modules": "nothing"}, "matches no"),
    ],
)
def test_bad_options(params, options, message):
    with pytest.raises(ValueError, match=message):
        lora(params, **options)


def test_equals_qwix():
    """Outputs, gradients, ten updates of Adam, and what is merged in the end, as qwix has them."""
    golden = np.load(GOLDEN / "qwix_lora.npz")

    def weights(when):
        plain = {k: golden[f"{when}/{k}/kernel"] for k in ("up", "down", "head")}
        options = {"rank": int(golden["rank"]), "alpha": float(golden["alpha"])}
        params = add_lora(plain, jax.random.key(0), target_modules="up|down", **options)
        for name in ("up", "down"):
            a, b = (golden[f"{when}/{name}/kernel_lora_{x}"] for x in "ab")
            params[name] = dataclasses.replace(params[name], a=a, b=b)
        return jax.tree.map(jnp.asarray, params)

    def outputs(params):
        x = golden["x"]
        hidden = jax.nn.silu(linear(x, params["up"]))
        return linear(x + linear(hidden, params["down"]), params["head"])

    def loss(trained):
        return jnp.mean((outputs(with_trainable(params, trained)) - golden["y"]) ** 2)

    params = weights("start")
    np.testing.assert_allclose(outputs(params), golden["outputs"], atol=1e-5)
    trained = trainable(params)
    grads = jax.grad(loss)(trained)
    for name in ("up", "down"):
        for part in "ab":
            expected = golden[f"grad/{name}/kernel_lora_{part}"]
            np.testing.assert_allclose(getattr(grads[name], part), expected, atol=1e-5)
    adapters = lambda tree: {name: tree[name] for name in ("up", "down")}  # noqa: E731
    tx = optax.adam(1e-2)
    state = tx.init(adapters(trained))
    for _ in range(10):
        updates, state = tx.update(adapters(jax.grad(loss)(trained)), state)
        trained = {**trained, **optax.apply_updates(adapters(trained), updates)}
    end = with_trainable(params, trained)
    for name in ("up", "down"):  # entries of Adam's first updates are of 1e-2
        for part in "ab":
            expected = golden[f"end/{name}/kernel_lora_{part}"]
            np.testing.assert_allclose(getattr(end[name], part), expected, atol=1e-4)
    np.testing.assert_allclose(outputs(end), golden["end_outputs"], atol=1e-3)
    np.testing.assert_allclose(outputs(merge(weights("end"))), golden["end_outputs"], atol=1e-5)
