"""Projected gradients against projections of full ones, and what the compiler makes of them."""

import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import galore_jax
from galore_jax import galore, linear, projected_value_and_grad
from galore_jax.projected_grad import project_gradients
from galore_jax.projection import ProjectedGradient

ROWS, IN, HIDDEN, OUT = 96, 40, 56, 24  # no two sizes alike: shapes tell arrays apart


def draw(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


PARAMS = {"w1": draw(IN, HIDDEN, seed=1), "w2": draw(HIDDEN, OUT, seed=2), "b": jnp.zeros(OUT)}
X, Y = draw(ROWS, IN, seed=3), draw(ROWS, OUT, seed=4)


def loss_fn(params, x=X, y=Y):
    hidden = jnp.tanh(linear(x, params["w1"]))
    return jnp.mean((linear(hidden, params["w2"]) + params["b"] - y) ** 2)


def with_bases(params=PARAMS, **arguments):
    """An optimizer, and its state with the bases of the first gradient."""
    tx = galore(optax.adam(1e-2, eps=1e-3), rank=8, update_proj_gap=5, **arguments)
    state = tx.refresh(jax.grad(loss_fn)(params), tx.init(params), params)
    return tx, state


@pytest.mark.parametrize("proj_type", ["std", "reverse_std", "left", "right", "full"])
@pytest.mark.parametrize("bits", [None, 8])
def test_is_the_projection_of_the_full_gradient(proj_type, bits):
    tx, state = with_bases(proj_type=proj_type, projector_bits=bits)
    full = jax.grad(loss_fn)(PARAMS)
    loss, grads = projected_value_and_grad(loss_fn, proj_type=proj_type)(PARAMS, state)
    expected = project_gradients(full, state, proj_type=proj_type)
    np.testing.assert_allclose(loss, loss_fn(PARAMS), rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), grads, expected)
    # And the transformation makes the same of them.
    updates, new = tx.update(grads, state, PARAMS, refresh=False)
    expected_updates, expected_new = tx.update(full, state, PARAMS, refresh=False)
    for a, b in ((updates, expected_updates), (new, expected_new)):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), a, b)


def test_the_program_has_no_array_of_a_kernels_size_but_the_kernel():
    _, state = with_bases()
    step = jax.jit(lambda params, state: projected_value_and_grad(loss_fn)(params, state))
    full = jax.jit(jax.grad(loss_fn))

    def of_kernel_size(program):
        """Definitions of arrays with as many values as w1 or w2, parameters of all kinds aside."""
        defined = re.findall(r"= f32\[([\d,]+)\]\S* (\w[\w-]*)\(", program)
        sizes = {IN * HIDDEN, HIDDEN * OUT}
        return [
            op
            for shape, op in defined
            if np.prod([int(n) for n in shape.split(",")]) in sizes
            and op not in ("parameter", "transpose", "bitcast", "copy")
        ]

    assert of_kernel_size(full.lower(PARAMS).compile().as_text())
    assert not of_kernel_size(step.lower(PARAMS, state).compile().as_text())


def test_micro_batches_add_up():
    _, state = with_bases()
    grad_of = lambda x, y: projected_value_and_grad(loss_fn)(PARAMS, state, x, y)[1]  # noqa: E731
    halves = [grad_of(X[i::2], Y[i::2]) for i in range(2)]
    mean = jax.tree.map(lambda a, b: (a + b) / 2, *halves)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), mean, grad_of(X, Y))


def test_kernels_that_are_not_named_get_full_gradients():
    _, state = with_bases()
    _, grads = projected_value_and_grad(loss_fn, kernels="w1")(PARAMS, state)
    assert isinstance(grads["w1"], ProjectedGradient)
    assert grads["w2"].shape == (HIDDEN, OUT)


def test_auxiliary_data_and_clipping_in_a_chain():
    tx = galore_jax.chain(optax.clip_by_global_norm(1e-3), galore(rank=8), optax.adam(1e-2))
    state = tx.init(PARAMS)
    _, state = tx.update(jax.grad(loss_fn)(PARAMS), state, PARAMS, refresh=True)
    with_aux = lambda params: (loss_fn(params), "aux")  # noqa: E731
    (loss, aux), grads = projected_value_and_grad(with_aux, has_aux=True)(PARAMS, state)
    assert aux == "aux"
    updates, _ = tx.update(grads, state, PARAMS, refresh=False)
    assert jax.tree.map(jnp.shape, updates) == jax.tree.map(jnp.shape, PARAMS)
    assert jnp.isfinite(loss)


class LinenNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (IN, HIDDEN))
        return linear(x, kernel)


class NNXNet(nnx.Module):
    def __init__(self, rngs):
        self.kernel = nnx.Param(jax.random.normal(rngs.params(), (IN, HIDDEN)))

    def __call__(self, x):
        return linear(x, self.kernel[...] if isinstance(self.kernel, jax.Array) else value(self))


def value(net):
    variable = net.kernel
    return variable.get_value() if hasattr(variable, "get_value") else variable.value


def linen():
    net = LinenNet()
    params = net.init(jax.random.key(0), X)
    return params, lambda params: jnp.mean(net.apply(params, X) ** 2)


def of_nnx():
    graphdef, state = nnx.split(NNXNet(nnx.Rngs(0)))
    params = nnx.to_pure_dict(state)
    return params, lambda params: jnp.mean(nnx.merge(graphdef, params)(X) ** 2)


@pytest.mark.parametrize("make", [linen, of_nnx])
def test_flax_models_take_part(make):
    params, loss = make()
    tx = galore(optax.sgd(0.1), rank=4)
    full = jax.grad(loss)(params)
    state = tx.refresh(full, tx.init(params), params)
    _, grads = jax.jit(projected_value_and_grad(loss))(params, state)
    updates, _ = tx.update(grads, state, params, refresh=False)
    expected, _ = tx.update(full, state, params, refresh=False)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), updates, expected)


def test_bfloat16_products_are_those_of_the_full_gradient():
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)
    tx = galore(optax.sgd(0.1), rank=8)
    loss = functools.partial(loss_fn, x=X.astype(jnp.bfloat16), y=Y.astype(jnp.bfloat16))
    full = jax.grad(loss)(params)
    state = tx.refresh(full, tx.init(params), params)
    _, grads = projected_value_and_grad(loss)(params, state)
    expected = project_gradients(full, state)
    for name in ("w1", "w2"):
        ours, theirs = grads[name].low_rank, expected[name].low_rank
        assert ours.dtype == jnp.bfloat16
        # bfloat16 has 8 bits: products of rounded factors differ by a few 2^-8 of the norm.
        error = jnp.linalg.norm((ours - theirs).astype(jnp.float32))
        assert error < 0.02 * jnp.linalg.norm(theirs.astype(jnp.float32))


def test_projected_gradients_cannot_change_the_basis():
    tx, state = with_bases()
    _, grads = projected_value_and_grad(loss_fn)(PARAMS, state)
    for refresh in (True, None):  # the first update is due
        with pytest.raises(ValueError, match="refresh=True"):
            tx.update(grads, state, PARAMS, refresh=refresh)
    later = state._replace(count=jnp.int32(1))
    tx.update(grads, later, PARAMS)  # not due: the count is known
    with pytest.raises(ValueError, match="refresh=False"):
        jax.jit(tx.update)(grads, later, PARAMS)  # not known


def test_gradients_of_other_settings_are_refused():
    _, state = with_bases()
    _, grads = projected_value_and_grad(loss_fn)(PARAMS, state)
    other = galore(optax.adam(1e-2), rank=4)
    with pytest.raises(ValueError, match="comes projected"):
        other.update(grads, other.init(PARAMS), PARAMS, refresh=False)
    with pytest.raises(ValueError, match="w1 do not fit"):
        projected_value_and_grad(loss_fn, proj_type="right")(PARAMS, state)
    with pytest.raises(ValueError, match="one GaLoreState"):
        projected_value_and_grad(loss_fn)(PARAMS, optax.adam(1.0).init(PARAMS))


def test_refresh_only_changes_bases_and_what_follows_them():
    tx = galore(optax.adam(1e-2), rank=8, rotate_moments=True)
    grads = jax.grad(loss_fn)(PARAMS)
    _, before = tx.update(grads, tx.init(PARAMS), PARAMS)
    turned = jax.tree.map(jnp.flip, grads)
    after = tx.refresh(turned, before, PARAMS)
    assert after.count == before.count
    assert not np.allclose(after.projector["w1"], before.projector["w1"], atol=1e-2)
    for leaf in ("w1", "w2"):
        mu, nu = after.inner_state[0].mu[leaf], after.inner_state[0].nu[leaf]
        assert not np.allclose(mu, before.inner_state[0].mu[leaf], atol=1e-6)
        np.testing.assert_array_equal(nu, before.inner_state[0].nu[leaf])
    np.testing.assert_array_equal(after.inner_state[0].mu["b"], before.inner_state[0].mu["b"])
