"""Kernels of 8-bit integers: products, gradients, and updates by stochastic rounding."""

import dataclasses
import functools
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from galore_jax import galore, linear
from galore_jax.int8_kernels import (
    Int8Kernel,
    add,
    decoded,
    encode,
    float_variables,
    with_float_variables,
)
from galore_jax.projected_grad import gradient_variables, with_variables
from galore_jax.rounding import apply_updates, dithering


def normal(seed, *shape, scale=1.0):
    return scale * jax.random.normal(jax.random.key(seed), shape, jnp.float32)


def equal(a, b):
    return (a.codes == b.codes).all() and (a.scales == b.scales).all()


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (7, 1), (5, 3), (2, 4, 6), (2, 3, 4, 5)])
@pytest.mark.parametrize("per", ["column", "row"])
@pytest.mark.parametrize("scale", [1e-36, 1e-6, 1.0, 1e30])
def test_decoding_is_within_half_a_code(shape, per, scale):
    array = normal(0, *shape, scale=scale)
    kernel = encode(array, per)
    step = jnp.max(jnp.abs(array), -2 if per == "column" else -1, keepdims=True) * 1.125 / 127
    assert kernel.shape == shape
    assert (jnp.abs(kernel.decode() - array) <= step * 0.5001).all()
    assert (kernel.scales > 0).all()


def test_zeros_and_constants_are_exact_to_a_code():
    assert (encode(jnp.zeros((3, 4))).decode() == 0).all()
    for constant in (0.02, -3.0):
        kernel = encode(jnp.full((3, 4), constant))
        np.testing.assert_allclose(kernel.decode(), constant, rtol=0.005)


@pytest.mark.parametrize("per", ["column", "row"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_products_and_gradients_are_those_of_the_decoded_matrix(per, dtype):
    kernel = encode(normal(0, 24, 40), per, dtype=dtype)
    x, weight = normal(1, 2, 5, 24).astype(dtype), kernel.decode()

    def loss(multiply, x, variable):
        return jnp.sum(jnp.sin(multiply(x, variable).astype(jnp.float32)))

    def integers(x, variable):
        return linear(x, dataclasses.replace(kernel, variable=variable))

    def floats(x, variable):
        return linear(x, weight + variable)

    zeros = float_variables(kernel)
    found, wanted = (
        jax.jit(jax.value_and_grad(functools.partial(loss, fn), argnums=(0, 1)))(x, zeros)
        for fn in (integers, floats)
    )
    tolerance = 1e-5 if dtype == jnp.float32 else 0.05
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert a.dtype == b.dtype
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
        np.testing.assert_allclose(a, b, atol=tolerance * float(jnp.abs(b).max()))


@pytest.mark.parametrize("proj_type", ["left", "right", "full"])
def test_projected_gradients(proj_type):
    kernel, x = encode(normal(0, 12, 10)), normal(1, 6, 12)
    params, floats = {"kernel": kernel}, {"kernel": kernel.decode()}
    tx = galore(optax.sgd(0.1), rank=3, proj_type=proj_type)
    grad = {"kernel": normal(2, 12, 10)}
    state = tx.update(grad, tx.init(floats), floats)[1]

    def gradient(params):
        variables = gradient_variables(params, state, proj_type=proj_type)

        def loss(variables):
            nodes = with_variables(params, state, variables)
            return jnp.sum(linear(x, nodes["kernel"]) ** 2)

        return jax.grad(loss)(variables)["kernel"].low_rank

    np.testing.assert_allclose(gradient(params), gradient(floats), rtol=1e-4, atol=1e-4)


def test_a_stack_is_scanned_and_mapped_over():
    stack, x = encode(normal(0, 3, 8, 8)), normal(1, 5, 8)

    def run(variables):
        def layer(x, kernel):
            return jnp.tanh(linear(x, kernel)), None

        return jax.lax.scan(layer, x, with_float_variables(stack, variables))[0].sum()

    one_by_one = functools.reduce(lambda y, i: jnp.tanh(linear(y, stack[i])), range(3), x)
    np.testing.assert_allclose(run(float_variables(stack)), one_by_one.sum(), rtol=1e-5)
    grads = jax.jit(jax.grad(run))(float_variables(stack))
    assert grads.shape == (3, 8, 8)
    assert (jnp.abs(grads).max((1, 2)) > 0).all()
    mapped = jax.vmap(lambda kernel: linear(x, kernel))(stack)
    np.testing.assert_allclose(mapped[1], linear(x, stack[1]), rtol=1e-5, atol=1e-6)


# Updates


@pytest.mark.parametrize(
    "value",
    [0.0, 0.3, 0.5, -0.25, 1.001, 63.7, -99.99, 126.5, -126.99, 1e-3],
    ids=str,
)
def test_the_mean_of_roundings_is_the_sum(value):
    number = 100_000
    # A column whose other entry keeps the scale at 1: codes are the weights.
    codes = jnp.zeros((number, 2, 1), jnp.int8).at[:, 1].set(127)
    kernel = Int8Kernel(codes, jnp.ones((number, 1)))
    update = jnp.zeros((number, 2, 1)).at[:, 0].set(value)
    noise = jax.random.uniform(jax.random.key(zlib.crc32(str(value).encode())), update.shape)
    new = add(kernel, update, noise)
    assert (new.scales == 1).all()
    found = np.asarray(new.codes[:, 0, 0], np.float64)
    part = value - np.floor(value)
    error = max(np.sqrt(part * (1 - part) / number), 1e-12)
    assert abs(found.mean() - np.float32(value)) <= 4 * error + 1e-9
    assert (new.codes[:, 1] == 127).all()


def test_a_new_scale_rounds_without_bias():
    number = 100_000
    codes = jnp.broadcast_to(jnp.array([[-127], [50], [3]], jnp.int8), (number, 3, 1))
    kernel = Int8Kernel(codes, jnp.full((number, 1), 0.01))
    update = jnp.array([[-1.0], [0.0], [0.001]])
    noise = jax.random.uniform(jax.random.key(1), (number, 3, 1))
    new = add(kernel, jnp.broadcast_to(update, codes.shape), noise)
    scale = float(new.scales[0, 0])
    assert scale == pytest.approx(2.27 * 1.125 / 127)
    mean = np.asarray(new.decode(), np.float64).mean(0)[:, 0]
    np.testing.assert_allclose(mean, [-2.27, 0.5, 0.031], atol=4 * scale / 2 / number**0.5)


def test_an_update_of_zero_changes_no_bit():
    kernel = encode(normal(0, 3, 50, 40))
    for count in range(5):
        params = {"kernel": kernel}
        new = apply_updates(params, {"kernel": jnp.zeros((3, 50, 40))}, count)["kernel"]
        assert equal(new, kernel)
        kernel = apply_updates(params, {"kernel": normal(count, 3, 50, 40)}, count)["kernel"]


@pytest.mark.parametrize("sign", [-1, 1])
def test_ten_thousand_tiny_updates_arrive(sign):
    start = encode(normal(0, 64, 64))
    tiny = sign * float(start.scales.mean()) * 1e-3
    update = {"kernel": jnp.full((64, 64), tiny)}

    def step(count, params):
        return apply_updates(params, update, count)

    end = jax.jit(lambda p: jax.lax.fori_loop(0, 10_000, step, p))({"kernel": start})["kernel"]
    moved = np.asarray(end.decode() - start.decode(), np.float64)
    assert moved.mean() == pytest.approx(10_000 * tiny, rel=0.005)
    nearest = jax.jit(lambda p: apply_updates(p, update, 0, "nearest"))({"kernel": start})
    assert equal(nearest["kernel"], start)


@pytest.mark.parametrize("start", ["positive", "negative", "constant", "zero"])
def test_columns_of_one_sign_do_not_collapse(start):
    base = {"positive": 1.0, "negative": -1.0, "constant": 0.5, "zero": 0.0}[start]
    floats = jnp.full((32, 16), base)
    if start in ("positive", "negative"):
        floats = floats * (1 + jax.random.uniform(jax.random.key(0), (32, 16)))
    updates = 1e-3 * jax.random.normal(jax.random.key(1), (500, 32, 16))

    def step(params, both):
        update, count = both
        return apply_updates(params, {"kernel": update}, count), None

    kernel = encode(floats)
    end, _ = jax.jit(lambda p: jax.lax.scan(step, p, (updates, jnp.arange(500))))(
        {"kernel": kernel}
    )
    wanted = kernel.decode() + updates.sum(0)
    error = np.asarray(end["kernel"].decode() - wanted)
    assert np.isfinite(error).all()
    assert abs(error.mean()) < 4 * error.std() / error.size**0.5
    assert error.std() < 6 * float(end["kernel"].scales.max())


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf, 3.4e38])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_matrix_whose_update_is_not_finite_stays(bad, compiled):
    kernel = encode(normal(0, 2, 6, 5))
    update = jnp.ones((2, 6, 5)).at[0, 3, 2].set(bad)
    if bad == 3.4e38:
        kernel = dataclasses.replace(kernel, scales=jnp.full((2, 5), 2.6e36))
        update = update.at[0].set(bad)
    new = (jax.jit(add) if compiled else add)(kernel, update)
    assert equal(new[0], kernel[0])
    assert not (new[1].codes == kernel[1].codes).all() or bad == 3.4e38


def test_weights_that_shrink_get_a_finer_scale():
    kernel = encode(normal(0, 32, 8))
    small = add(kernel, -0.9 * kernel.decode())
    assert (small.scales < 0.3 * kernel.scales).all()
    gone = add(kernel, -kernel.decode())
    assert (gone.codes == 0).all()
    back = add(gone, normal(1, 32, 8, scale=1e-3))
    np.testing.assert_allclose(back.decode(), normal(1, 32, 8, scale=1e-3), atol=2e-5)


def test_noise_differs_by_matrix_layer_and_count_and_is_the_same_again():
    kernel = encode(jnp.broadcast_to(normal(0, 1, 40, 40), (2, 40, 40)))
    params, update = {"a": kernel, "b": kernel}, jnp.full((2, 40, 40), 0.3 * kernel.scales.mean())
    updates = {"a": update, "b": update}
    at = [apply_updates(params, updates, count) for count in (0, 1)]
    differ = lambda x, y: (x.codes != y.codes).mean() > 0.2  # noqa: E731
    assert differ(at[0]["a"], at[0]["b"])
    assert differ(at[0]["a"], at[1]["a"])
    assert differ(at[0]["a"][0], at[0]["a"][1])
    assert equal(apply_updates(params, updates, 1)["a"], at[1]["a"])
    for layer in range(2):
        one = jax.tree.map(lambda x, i=layer: x[i], (params, updates))
        assert equal(apply_updates(*one, 1, layer=layer)["b"], at[1]["b"][layer])


def test_eager_and_compiled_updates_agree():
    kernel, update = encode(normal(0, 33, 17)), normal(1, 33, 17, scale=0.01)
    noise = dithering((33, 17), 3)
    eager, compiled = add(kernel, update, noise), jax.jit(add)(kernel, update, noise)
    np.testing.assert_allclose(eager.scales, compiled.scales, rtol=1e-6)
    assert (eager.codes != compiled.codes).mean() < 0.01
    mapped = jax.vmap(add)(*(jax.tree.map(lambda x: x[None], (kernel, update, noise))))
    assert (mapped.codes[0] != compiled.codes).mean() < 0.01


@pytest.mark.parametrize("per", ["column", "row"])
def test_rows_are_those_of_the_decoded_table(per):
    table, index = encode(normal(0, 7, 5), per), jnp.array([[0, 6, -1], [7, -8, 3]])
    wanted = jnp.take(table.decode(), index, axis=0, mode="fill")
    np.testing.assert_array_equal(table.rows(index, "float32"), wanted)
    assert jnp.isnan(wanted[1, 0]).all()


def test_trees():
    tree = {"kernel": encode(normal(0, 4, 6), dtype=jnp.bfloat16), "bias": jnp.ones(6)}
    assert decoded(tree)["kernel"].dtype == jnp.bfloat16
    zeros = float_variables(tree)
    assert zeros["kernel"].shape == (4, 6)
    assert (with_float_variables(tree, zeros)["bias"] == 1).all()
    transposed = tree["kernel"].T
    np.testing.assert_array_equal(transposed.decode(), tree["kernel"].decode().T)
    assert transposed.T.per == "column"
