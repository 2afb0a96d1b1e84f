"""Wrong numbers, crashes and hazards that adversarial tests of the core once found."""

import gc
import resource
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from galore_jax import galore, galore_adafactor, linear, projected_value_and_grad
from galore_jax.kernels import detached
from galore_jax.projected_grad import project_gradients
from galore_jax.projection import ProjectedGradient
from galore_jax.weights import leaf_path, matrix_specs


def draw(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


PARAMS = {"w1": draw(12, 20, seed=1) / 4, "w2": draw(20, 8, seed=2) / 4, "b": jnp.zeros(8)}
X = draw(16, 12, seed=3)


def loss_fn(params, x=X):
    return jnp.mean((linear(jnp.tanh(linear(x, params["w1"])), params["w2"]) + params["b"]) ** 2)


def refreshed(params=PARAMS, loss=loss_fn, **options):
    tx = galore(optax.adam(1e-2), rank=4, **options)
    return tx, tx.refresh(jax.grad(loss)(params), tx.init(params), params)


def assert_close(a, b, atol=1e-5):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=atol), a, b)


# Projected gradients: every use of a kernel gives the right gradient or an error.


@pytest.mark.parametrize("penalized", ["kernel", "tree"])
def test_a_penalty_over_the_params_is_an_error_and_right_for_kernels_left_out(penalized):
    def loss(params):
        leaves = [params["w1"]] if penalized == "kernel" else params
        return loss_fn(params) + 0.1 * sum(jnp.vdot(q, q) for q in jax.tree.leaves(leaves))

    _, state = refreshed(loss=loss)
    with pytest.raises(ValueError, match=r"otherwise than by galore_jax.linear"):
        projected_value_and_grad(loss)(PARAMS, state)
    if penalized == "kernel":
        value, grads = projected_value_and_grad(loss, kernels="w2")(PARAMS, state)
        np.testing.assert_allclose(value, loss(PARAMS), rtol=1e-6)
        assert_close(grads["w1"], jax.grad(loss)(PARAMS)["w1"])


def test_a_penalty_in_the_auxiliary_data_is_an_error_too():
    _, state = refreshed()
    norm = lambda params: (loss_fn(params), {"norm": optax.tree.norm(params)})  # noqa: E731
    with pytest.raises(ValueError, match=r"otherwise than by galore_jax.linear"):
        projected_value_and_grad(norm, has_aux=True)(PARAMS, state)


@pytest.mark.parametrize("proj_type", ["std", "reverse_std", "full"])
def test_a_gradient_penalty_has_the_projection_of_its_full_gradient(proj_type):
    def penalty(params):
        return jnp.mean(jax.vmap(jax.grad(lambda x: loss_fn(params, x[None])))(X) ** 2)

    _, state = refreshed(loss=penalty, proj_type=proj_type)
    _, grads = projected_value_and_grad(penalty, proj_type=proj_type)(PARAMS, state)
    full = jax.grad(penalty)(PARAMS)
    expected = project_gradients(full, state, proj_type=proj_type)
    assert float(jnp.abs(expected["w1"].low_rank).max()) > 1e-6
    assert_close(grads, expected, atol=1e-7)


def test_a_third_derivative_is_right():
    scalar = lambda x, params: loss_fn(params, x[None, None] * X)  # noqa: E731
    twice = jax.grad(jax.grad(scalar))
    loss = lambda params: twice(1.0, params) ** 2  # noqa: E731
    _, state = refreshed(loss=loss)
    _, grads = projected_value_and_grad(loss)(PARAMS, state)
    assert_close(grads, project_gradients(jax.grad(loss)(PARAMS), state), atol=1e-6)


def test_a_custom_vjp_takes_part_once_its_kernel_is_detached():
    @jax.custom_vjp
    def product(x, kernel):
        return linear(x, kernel)

    def forward(x, kernel):
        y, pull_back = jax.vjp(linear, x, kernel)
        return y, pull_back

    product.defvjp(forward, lambda pull_back, dy: pull_back(dy))
    loss = lambda params: jnp.sum(product(X, detached(params["w1"])) ** 2)  # noqa: E731
    _, state = refreshed()
    _, grads = projected_value_and_grad(loss)(PARAMS, state)
    assert_close(grads, project_gradients(jax.grad(loss)(PARAMS), state), atol=1e-4)


def test_swapped_axes_of_a_square_kernel_are_an_error():
    swapped = optax.contrib.GaLoreDimensionNumbers(reduction_axis=1, output_axis=0)
    params = {"w": draw(12, 12)}
    loss = lambda params: jnp.sum(linear(X, params["w"]) ** 2)  # noqa: E731
    tx, state = refreshed(params, loss, weight_dimension_numbers=swapped)
    _, grads = projected_value_and_grad(loss)(params, state)
    with pytest.raises(ValueError, match="weight_dimension_numbers names others"):
        tx.update(grads, state, params, refresh=False)


@pytest.mark.parametrize("wrap", [lambda tx: optax.MultiSteps(tx, 2), optax.apply_if_finite])
def test_wrappers_that_cannot_take_projected_gradients_say_what_to_do(wrap):
    tx = galore(optax.adam(1e-2), rank=4)
    state = wrap(tx).init(PARAMS) if wrap is not optax.apply_if_finite else wrap(tx, 3).init(PARAMS)
    with pytest.raises(ValueError, match=r"use jax.value_and_grad with it"):
        projected_value_and_grad(loss_fn)(PARAMS, state)


def test_a_link_before_galore_is_told_that_its_norm_is_another():
    tx = optax.chain(optax.clip_by_global_norm(1.0), galore(optax.adam(1e-2), rank=4))
    with pytest.warns(UserWarning, match="low-rank gradients"):
        projected_value_and_grad(loss_fn)(PARAMS, tx.init(PARAMS))


def test_projected_gradients_inside_shard_map_with_its_checks():
    _, state = refreshed()
    mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,))

    def step(params, state, x):
        _, grads = projected_value_and_grad(loss_fn)(params, state, x)
        return grads  # the sum over the devices, as for any replicated weight

    sharded = jax.shard_map(step, mesh=mesh, in_specs=(P(), P(), P("data")), out_specs=P())
    _, expected = projected_value_and_grad(loss_fn)(PARAMS, state)
    found = jax.jit(sharded)(PARAMS, state, X)
    assert_close(found, expected)


@pytest.mark.parametrize("shape", [(0, 12), (3, 0, 12)])
def test_an_empty_batch(shape):
    assert linear(jnp.ones(shape), jnp.ones((12, 5))).shape == (*shape[:-1], 5)


# The transformation.


def test_centered_rmsprop_stays_finite_with_rotated_moments():
    params = {"w": draw(8, 12)}
    inner = optax.rmsprop(0.01, centered=True)
    tx = galore(inner, rank=3, update_proj_gap=2, rotate_moments=True)
    with pytest.warns(UserWarning, match="does nothing here"):
        state = tx.init(params)
    for i in range(6):
        updates, state = tx.update({"w": draw(8, 12, seed=i)}, state, params)
        assert bool(jnp.isfinite(updates["w"]).all())


@pytest.mark.parametrize("make", [optax.lamb, optax.adafactor, optax.fromage, optax.lars])
@pytest.mark.parametrize("options", [{"proj_type": "full", "rank": 1},
                                     {"proj_type": "reverse_std", "rank": 8}])  # fmt: skip
def test_one_element_is_not_taken_for_decayed(make, options):
    # Against the same inner optimizer by hand, on the projection and without any decay.
    shape = (64, 1) if options["proj_type"] == "reverse_std" else (6, 9)
    params, grads = {"w": draw(*shape)}, {"w": draw(*shape, seed=1)}
    tx = galore(make(1e-2), scale=1.0, **options)
    updates, state = tx.update(grads, tx.init(params), params)
    p = state.projector["w"]
    left, right = p if isinstance(p, tuple) else (p, jnp.eye(1))
    low = lambda x: {"w": left.T @ x["w"] @ right}  # noqa: E731
    inner = make(1e-2)
    step, _ = inner.update(low(grads), inner.init(low(params)), low(params))
    np.testing.assert_allclose(updates["w"], left @ step["w"] @ right.T, atol=1e-6)


def test_decay_of_one_element_is_decay():
    params, zeros = {"w": draw(6, 9)}, {"w": jnp.zeros((6, 9))}
    tx = galore(optax.adamw(0.1, weight_decay=0.5), proj_type="full", rank=1)
    _, state = tx.update({"w": draw(6, 9, seed=1)}, tx.init(params), params)
    decayed, _ = tx.update(zeros, state, params)
    plain, _ = galore(optax.adamw(0.1, weight_decay=0.0), proj_type="full", rank=1).update(
        zeros, state, params
    )
    np.testing.assert_allclose(decayed["w"] - plain["w"], -0.05 * params["w"], atol=1e-6)


def test_complex_leaves_are_refused_by_name():
    with pytest.raises(ValueError, match="w is complex64: GaLore projects real matrices"):
        galore(optax.adam(0.1), rank=2).init({"w": jnp.ones((4, 6), jnp.complex64)})


def test_adafactor_in_galore_torchs_order_decays_before_the_update():
    # galore_torch/adafactor.py: p.add_(p, alpha=-weight_decay * lr), then p.add_(-update).
    params = {"w": draw(8, 12)}
    trained = []
    for order in (False, True):
        tx = galore_adafactor(0.1, rank=4, weight_decay=0.1, galore_torch_order=order)
        weights, state = params, tx.init(params)
        for i in range(20):
            updates, state = tx.update({"w": draw(8, 12, seed=i)}, state, weights)
            weights = optax.apply_updates(weights, updates)
        trained.append(weights)
    assert_close(*trained, atol=1e-5)


class Projection(NamedTuple):
    weight: jax.Array


class Model(NamedTuple):
    blocks: Projection
    weight: jax.Array


@pytest.mark.parametrize("inner", [optax.adamw(0.1, weight_decay=0.1), optax.novograd(0.1)])
def test_attribute_keys_with_equal_names_at_two_depths(inner):
    params = Model(Projection(draw(3, 6, 10)), draw(6, 10, seed=1))
    tx = galore(inner, rank=2, target_modules="weight", stacked_modules="blocks")
    state = tx.init(params)
    grads = jax.tree.map(jnp.sin, params)
    updates, _ = tx.update(grads, state, params)
    alone = galore(inner, rank=2)
    for i in range(3):
        expected, _ = alone.update(
            {"w": grads.blocks.weight[i]}, alone.init({"w": params.blocks.weight[i]}),
            {"w": params.blocks.weight[i]},
        )  # fmt: skip
        np.testing.assert_allclose(updates.blocks.weight[i], expected["w"], rtol=1e-4, atol=1e-6)


def test_a_bare_array_that_is_a_stack():
    params = draw(3, 6, 10)
    tx = galore(optax.novograd(0.1), rank=2, target_modules=".*")
    updates, _ = tx.update(jnp.sin(params), tx.init(params), params)
    assert updates.shape == (3, 6, 10)


@pytest.mark.parametrize("dtype", ["int32", "bool"])
def test_matrices_of_integers_are_left_to_the_optimizer(dtype):
    params = {"w": draw(6, 10), "ids": jnp.ones((4, 4), dtype)}
    grads = {"w": draw(6, 10, seed=1), "ids": jnp.zeros((4, 4), dtype)}
    tx = galore(optax.sgd(0.1), rank=2)
    state = tx.init(params)
    assert state.projector["ids"] == optax.MaskedNode()
    updates, _ = tx.update(grads, state, params)
    assert bool(jnp.isfinite(updates["w"]).all())


def test_a_first_update_without_a_refresh_is_refused_or_makes_one():
    params, grads = {"w": draw(6, 10)}, {"w": draw(6, 10, seed=1)}
    tx = galore(optax.sgd(0.1), rank=2)
    state = tx.init(params)
    with pytest.raises(ValueError, match="the first update"):
        tx.update(grads, state, params, refresh=False)
    traced, new = jax.jit(tx.update)(grads, state, params, refresh=jnp.bool_(False))
    expected, _ = tx.update(grads, state, params)
    assert_close(traced, expected)
    assert float(jnp.abs(new.projector["w"]).sum()) > 0
    static = jax.jit(lambda g, s, p: tx.update(g, s, p, refresh=False))
    assert bool(jnp.isnan(static(grads, state, params)[0]["w"]).all())


def test_projected_gradients_of_a_new_state_are_never_a_silent_zero():
    tx = galore(optax.sgd(0.1), rank=4)
    state = tx.init(PARAMS)
    _, grads = projected_value_and_grad(loss_fn)(PARAMS, state)
    assert isinstance(grads["w1"], ProjectedGradient)
    with pytest.raises(ValueError, match="the first update"):
        tx.update(grads, state, PARAMS, refresh=False)


def test_a_zero_projector_of_one_leaf_is_loud():
    params = {"a": draw(6, 10), "b": draw(6, 10, seed=1)}
    tx = galore(optax.sgd(0.1), rank=2)
    _, state = tx.update(params, tx.init(params), params)
    broken = state._replace(projector={**state.projector, "b": jnp.zeros((6, 2))})
    updates, _ = tx.update(params, broken, params, refresh=False)
    assert bool(jnp.isnan(updates["b"]).all())
    assert bool(jnp.isfinite(updates["a"]).all())


@pytest.mark.parametrize("method", ["svd", "eigh", "subspace_iteration", "randomized", "random"])
def test_a_zero_gradient_at_a_refresh_keeps_projector_and_momentum(method):
    params = {"w": draw(6, 10), "stack": draw(2, 6, 10)}
    tx = galore(optax.sgd(0.1, momentum=0.9), rank=2, update_proj_gap=1, rotate_moments=True,
                projector=method, target_modules=".")  # fmt: skip
    grads = {"w": draw(6, 10, seed=1), "stack": draw(2, 6, 10, seed=2)}
    _, state = tx.update(grads, tx.init(params), params)
    idle = {"w": jnp.zeros((6, 10)), "stack": grads["stack"].at[1].set(0.0)}
    _, after = tx.update(idle, state, params)
    np.testing.assert_array_equal(after.projector["w"], state.projector["w"])
    np.testing.assert_array_equal(after.projector["stack"][1], state.projector["stack"][1])
    trace = lambda state: state.inner_state[0].trace["w"]  # noqa: E731
    np.testing.assert_array_equal(trace(after), 0.9 * trace(state))


def test_a_zero_gradient_at_the_first_refresh_is_no_dead_end():
    params = {"w": draw(6, 10)}
    tx = galore(optax.sgd(0.1), rank=2)
    _, state = tx.update({"w": jnp.zeros((6, 10))}, tx.init(params), params)
    updates, _ = tx.update({"w": draw(6, 10, seed=1)}, state, params)
    assert float(jnp.abs(updates["w"]).max()) > 1e-3


def test_a_global_norm_on_stacks_takes_gradients_of_another_dtype():
    params = {"s": draw(3, 6, 10).astype(jnp.bfloat16), "w": draw(6, 10).astype(jnp.bfloat16)}
    inner = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.1))
    tx = galore(inner, rank=2, target_modules=".")
    grads = jax.tree.map(lambda x: x.astype(jnp.float32), params)
    updates, _ = tx.update(grads, tx.init(params), params)
    assert bool(jnp.isfinite(updates["s"]).all())


def test_moments_turn_where_a_whole_subtree_is_masked():
    params = {"a": {"w": draw(4, 5), "v": draw(4, 6)}, "b": {"w": draw(4, 5, seed=1)}}
    inner = optax.partition(
        {"x": optax.sgd(0.1, momentum=0.9), "y": optax.adam(0.1)}, {"a": "x", "b": "y"}
    )
    tx = galore(inner, rank=2, rotate_moments=True, update_proj_gap=1)
    _, state = tx.update(params, tx.init(params), params)
    updates, _ = tx.update(jax.tree.map(jnp.sin, params), state, params)
    assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(updates))


class Gaussian(NamedTuple):
    mu: jax.Array
    sigma: jax.Array


def test_a_param_that_is_called_mu_is_no_first_moment():
    params = Gaussian(draw(6, 10), draw(6, 10, seed=1))
    tx = galore(optax.adam(0.1), rank=2, rotate_moments=True, update_proj_gap=1)
    _, first = tx.update(params, tx.init(params), params)
    grads = jax.tree.map(jnp.sin, params)
    _, second = tx.update(grads, first, params)
    low = second.projector.mu.T @ grads.mu
    nu = 0.999 * first.inner_state[0].nu.mu + 0.001 * low**2
    np.testing.assert_allclose(second.inner_state[0].nu.mu, nu, rtol=1e-4)


def test_functions_of_the_params_see_full_shapes_beside_projected_gradients():
    numbers = optax.contrib.GaLoreDimensionNumbers(0, 1)
    tx = galore(
        optax.adam(1e-2),
        rank=lambda path, leaf: 2 * leaf.ndim,
        weight_dimension_numbers=lambda params: jax.tree.map(
            lambda x: numbers if x.ndim == 2 else None, params
        ),
    )
    state = tx.refresh(jax.grad(loss_fn)(PARAMS), tx.init(PARAMS), PARAMS)
    _, grads = projected_value_and_grad(loss_fn)(PARAMS, state)
    updates, _ = tx.update(grads, state, PARAMS, refresh=False)
    assert jax.tree.map(jnp.shape, updates) == jax.tree.map(jnp.shape, PARAMS)


def test_refresh_on_an_explicit_mesh():
    mesh = jax.make_mesh((1,), ("x",), axis_types=(AxisType.Explicit,))
    params = {"w": jax.device_put(draw(6, 10), NamedSharding(mesh, P("x", None)))}
    tx = galore(optax.adam(0.1), rank=2)
    state = tx.refresh(params, tx.init(params), params)
    assert float(jnp.abs(state.projector["w"]).sum()) > 0


@pytest.mark.parametrize("target", ["attn", None])
def test_biases_stacked_over_layers_are_not_projected(target):
    params = {"blocks": {"attn": {"kernel": draw(3, 6, 10), "bias": draw(3, 16)}}}
    specs = matrix_specs(params, rank=2, target_modules=target, stacked_modules="^blocks/")
    assert specs["blocks"]["attn"]["bias"] is None
    assert specs["blocks"]["attn"]["kernel"].stack == (0,)


def test_paths_of_nnx_states_are_those_of_their_modules():
    state = nnx.state(nnx.Linear(4, 6, rngs=nnx.Rngs(0)), nnx.Param)
    paths = {leaf_path(path) for path, _ in jax.tree_util.tree_leaves_with_path(state)}
    assert paths == {"kernel", "bias"}


def test_an_eager_update_compiles_nothing_anew():
    params = {"w": draw(16, 24), "stack": draw(3, 16, 24), "b": jnp.zeros(24)}
    tx = galore(optax.adamw(1e-3), rank=4, target_modules=("w", "stack"))
    state, compiled = tx.init(params), []
    listen = lambda name, *_, **__: compiled.append(name)  # noqa: E731
    for _ in range(3):
        _, state = tx.update(params, state, params)
    gc.collect()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        for _ in range(5):
            _, state = tx.update(params, state, params)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert not [name for name in compiled if "backend_compile" in name]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2000  # KiB in five updates
