"""galore inside and around Optax's wrappers, Flax's and nnx's: what each of them should mean."""

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState

from galore_jax import GaLoreState, galore, galore_adamw

SHAPES = {"wide": (6, 10), "tall": (9, 5), "bias": (10,)}
GAP = 2


def tree(seed, names=tuple(SHAPES)):
    rng = np.random.default_rng(seed)
    every = {k: jnp.asarray(rng.standard_normal(s), jnp.float32) for k, s in SHAPES.items()}
    return {name: every[name] for name in names}


def make(learning_rate=0.1, **kwargs):
    return galore_adamw(learning_rate, rank=2, update_proj_gap=GAP, weight_decay=0.1, **kwargs)


def train(tx, grads, params=None, jit=False):
    params = tree(0) if params is None else params
    state, update = tx.init(params), jax.jit(tx.update) if jit else tx.update
    for gradient in grads:
        updates, state = update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def grads(count, names=tuple(SHAPES)):
    return [tree(i + 1, names) for i in range(count)]


def close(a, b, **tolerance):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    tolerance = tolerance or {"rtol": 1e-5, "atol": 1e-6}
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), a, b)


def test_chains_clip_before_and_scale_after():
    # Clipping must see whole gradients, what follows whole updates.
    norm = lambda g: float(optax.tree.norm(g))  # noqa: E731
    clipped = [jax.tree.map(lambda x, g=g: x / norm(g), g) for g in grads(3)]
    alone, _ = train(make(), clipped)
    links = [("clip", optax.clip_by_global_norm(1.0)), ("galore", make())]
    close(train(optax.chain(*(link for _, link in links)), grads(3))[0], alone)
    named, state = train(optax.named_chain(*links), grads(3), jit=True)
    close(named, alone)
    assert isinstance(state["galore"], GaLoreState)
    halved, _ = train(optax.chain(make(), optax.scale(0.5)), grads(1))
    whole, _ = train(make(), grads(1))
    close(halved, jax.tree.map(lambda a, b: (a + b) / 2, tree(0), whole))


def test_masked_leaves_are_not_seen_and_the_others_as_without_a_mask():
    # MaskedNode in params and gradients: an index into the flat tree could be off by one.
    mask = {"wide": False, "tall": True, "bias": True}
    params, state = train(optax.masked(make(), mask), grads(3), jit=True)
    seen = ("tall", "bias")
    alone, _ = train(make(), grads(3, seen), tree(0, seen))
    close({name: params[name] for name in seen}, alone)
    # Updates that optax.masked masks out are the gradients as they came.
    close(params["wide"], tree(0)["wide"] + sum(g["wide"] for g in grads(3)))
    assert state.inner_state.projector["wide"] == optax.MaskedNode()


def test_masked_inside_galore_masks_whole_leaves():
    # A mask given to the wrapped optimizer is by leaf, also where that leaf is low-rank.
    mask = {"wide": True, "tall": False, "bias": False}
    inner = optax.chain(optax.masked(optax.scale(0.5), mask), optax.sgd(0.1))
    halved, _ = train(galore(inner, rank=2), grads(1))
    whole, _ = train(galore(optax.sgd(0.1), rank=2), grads(1))
    start = tree(0)
    close(halved["wide"] - start["wide"], 0.5 * (whole["wide"] - start["wide"]))
    close({k: halved[k] for k in ("tall", "bias")}, {k: whole[k] for k in ("tall", "bias")})


def test_partition_gives_each_label_its_optimizer():
    labels = {"wide": "low", "tall": "low", "bias": "plain"}
    tx = optax.partition({"low": make(), "plain": optax.adam(0.3)}, labels)
    params, state = train(tx, grads(3), jit=True)
    low, plain = ("wide", "tall"), ("bias",)
    close({k: params[k] for k in low}, train(make(), grads(3, low), tree(0, low))[0])
    close(params["bias"], train(optax.adam(0.3), grads(3, plain), tree(0, plain))[0]["bias"])
    adam = state.inner_states["low"].inner_state.inner_state[0]
    assert adam.mu["tall"].shape == (9, 2)


def test_frozen_leaves_stay_and_the_others_do_not_care():
    frozen = {"wide": True, "tall": False, "bias": False}
    params, _ = train(optax.chain(make(), optax.transforms.freeze(frozen)), grads(3))
    alone, _ = train(make(), grads(3))
    np.testing.assert_array_equal(params["wide"], tree(0)["wide"])
    close({k: params[k] for k in ("tall", "bias")}, {k: alone[k] for k in ("tall", "bias")})


def test_multi_steps_is_one_update_of_the_mean():
    # Its counter must not reach galore's: GAP counts updates, not gradients.
    k = 3
    every = grads(k * 3)
    means = [jax.tree.map(lambda *g: sum(g) / k, *every[i : i + k]) for i in range(0, 3 * k, k)]
    multi = optax.MultiSteps(make(), every_k_schedule=k)
    params, state = train(multi.gradient_transformation(), every, jit=True)
    alone, expected = train(make(), means)
    close(params, alone)
    assert int(state.inner_opt_state.count) == 3
    close(state.inner_opt_state.projector, expected.projector)


def test_bad_gradients_change_nothing_in_wrappers_that_skip_them():
    # A refresh is due at the bad gradient: neither the basis nor the count may move.
    bad = {**tree(7), "wide": tree(7)["wide"].at[0, 0].set(jnp.nan)}
    good = grads(2)
    alone, expected = train(make(), [*good, tree(3)])
    finite = optax.apply_if_finite(make(), max_consecutive_errors=5)
    params, state = train(finite, [*good, bad, tree(3)], jit=True)
    close(params, alone)
    close(state.inner_state, expected)
    multi = optax.MultiSteps(make(), 1, should_skip_update_fn=optax.skip_not_finite)
    params, state = train(multi.gradient_transformation(), [*good, bad, tree(3)], jit=True)
    close(params, alone)
    close(state.inner_opt_state, expected)


def test_injected_hyperparams_are_those_of_a_plain_call():
    # learning_rate is a schedule, update_proj_gap and scale arrive as arrays.
    schedule = optax.linear_schedule(0.1, 0.0, 5)
    injected = optax.inject_hyperparams(galore_adamw, static_args=("rank",))(
        learning_rate=schedule, rank=2, update_proj_gap=GAP, weight_decay=0.1
    )
    params, state = train(injected, grads(4), jit=True)
    alone, expected = train(make(schedule), grads(4))
    close(params, alone)
    close(state.inner_state.projector, expected.projector)
    assert int(state.hyperparams["update_proj_gap"]) == GAP
    # A gap changed from outside holds from the next update on: 4 % 3 is no refresh, 4 % 2 is.
    state.hyperparams["update_proj_gap"] = jnp.asarray(3, jnp.int32)
    _, later = injected.update(tree(9), state, params)
    np.testing.assert_array_equal(
        later.inner_state.projector["wide"], state.inner_state.projector["wide"]
    )


def test_lookahead_steps_back_towards_the_slow_weights():
    period, size = 3, 0.5
    params = optax.LookaheadParams.init_synced(tree(0))
    params, _ = train(optax.lookahead(make(), period, size), grads(period), params)
    fast, _ = train(make(), grads(period))
    slow = jax.tree.map(lambda a, b: a + size * (b - a), tree(0), fast)
    close(params.slow, slow)
    close(params.fast, slow)


def test_copies_of_weights_move_at_a_refresh_alone():
    tx = galore(optax.contrib.schedule_free_adamw(0.1), rank=2)
    params = {"w": tree(0)["wide"]}
    state = tx.init(params)

    def products(refresh):
        step = lambda grads, state: tx.update(grads, state, params, refresh=refresh)  # noqa: E731
        return str(jax.make_jaxpr(step)(params, state)).count("dot_general")

    assert products(False) == 3  # P^T G, P^T W and P N
    assert products(True) > 3


def test_schedule_free_around_galore_averages_its_weights():
    # By hand (Defazio et al. 2024): z is trained by galore, x is the mean of the z, and gradients
    # are taken at y = (1 - b1) z + b1 x.
    lr, b1, count = 0.1, 0.9, 4
    base = galore(optax.sgd(lr), rank=2, update_proj_gap=GAP)
    tx = optax.contrib.schedule_free(base, lr, b1=b1)
    y, state = train(tx, grads(count), jit=True)
    z, inner, zs = tree(0), base.init(tree(0)), []
    for gradient in grads(count):
        updates, inner = base.update(gradient, inner, z)
        z = optax.apply_updates(z, updates)
        zs.append(z)
    mean = jax.tree.map(lambda *of: sum(of) / count, *zs)
    close(optax.contrib.schedule_free_eval_params(state, y), mean, rtol=1e-4, atol=1e-5)
    close(y, jax.tree.map(lambda x, z: b1 * x + (1 - b1) * z, mean, z), rtol=1e-4, atol=1e-5)


def test_tree_map_params_finds_what_is_like_params():
    # It calls init with a placeholder without arrays: that must not raise, nor mix up counts.
    _, state = train(make(), grads(2))
    close(optax.tree_utils.tree_map_params(make(), lambda v: v, state), state)
    marked = optax.tree_utils.tree_map_params(
        make(), lambda v: "param", state, transform_non_params=lambda v: "other"
    )
    assert marked.count == marked.inner_state[0].count == "other"
    assert set(marked.inner_state[0].mu.values()) == {"param"}
    assert marked.projector["wide"] == marked.projector["tall"] == "param"


def test_train_state_of_flax():
    state = TrainState.create(apply_fn=lambda p, x: x @ p["wide"], params=tree(0), tx=make())
    for gradient in grads(3):
        state = jax.jit(TrainState.apply_gradients)(state, grads=gradient)
    close(state.params, train(make(), grads(3))[0])
    assert int(state.step) == int(state.opt_state.count) == 3


@pytest.mark.skipif(
    flax.__version__ < "0.12", reason="its nnx.Optimizer fails on optax.MaskedNode, galore or not"
)
def test_nnx_optimizer_trains_with_low_rank_moments():
    class MLP(nnx.Module):
        def __init__(self, rngs):
            self.up, self.down = nnx.Linear(8, 16, rngs=rngs), nnx.Linear(16, 8, rngs=rngs)

        def __call__(self, x):
            return self.down(nnx.relu(self.up(x)))

    model = MLP(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, galore_adamw(1e-2, rank=2, scale=1.0), wrt=nnx.Param)
    x = jax.random.normal(jax.random.key(1), (32, 8))

    @nnx.jit
    def step(model, optimizer):
        loss, grads = nnx.value_and_grad(lambda m: jnp.mean((m(x) - x) ** 2))(model)
        optimizer.update(model, grads)
        return loss

    losses = [float(step(model, optimizer)) for _ in range(20)]
    assert losses[-1] < 0.8 * losses[0]
    mu = nnx.to_pure_dict(nnx.state(optimizer))["opt_state"]["inner_state"][0]["mu"]
    assert jnp.shape(mu["up"]["kernel"]) == (2, 16)
    assert jnp.shape(mu["down"]["kernel"]) == (16, 2)
    assert jnp.shape(mu["up"]["bias"]) == (16,)
