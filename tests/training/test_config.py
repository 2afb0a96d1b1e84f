"""Settings: what they refuse, and what they make of an optimizer."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import tiny_config

from galore_jax.errors import UserError
from galore_jax.training.config import check_config
from galore_jax.training.optimizer import aliases, make_optimizer, make_schedule


def optimizer_of(config):
    return make_optimizer(config, make_schedule(config))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("galore.rank", 0, r"config\.galore\.rank=0 must be at least 1"),
        ("galore.update_proj_gap", 0, r"config\.galore\.update_proj_gap=0 must be at least 1"),
        ("galore.proj_type", "sdt", "must be std or .* did you mean std"),
        ("galore.scale", 0.0, "must be greater than 0"),
        ("galore.projector_bits", 2, "must be None or 8 or 4"),
        (
            "param_rounding",
            "stochastc",
            "must be None or nearest or stochastic; did you mean stochastic",
        ),
        ("method", "ful", "must be galore or galore_muon or full or .*; did you mean full"),
        ("batch_size", 3, r"config\.batch_size=3 must be a multiple of .*micro_batch_size=2"),
        ("train_steps", 0, "must be at least 1"),
        ("log_every_steps", 0, "must be at least 1"),
        ("schedule.warmup_steps", 12, r"less than config\.train_steps=12"),
        ("schedule.peak_lr", float("inf"), "must be a finite number"),
        ("optimizer.eps", float("nan"), "must be a finite number"),
        ("optimizer.b1", 1.5, "at least 0 and less than 1"),
        ("dtype", "float8_e4m3fn", "must be bfloat16 or float16 or float32"),
        ("data.seq_len", 1, "must be at least 2"),
        ("model.attention_implementation", "cudnn", "is for GPUs"),
        ("schedule.peak_lr", 0.0, "must be greater than 0"),
        ("schedule.final_lr_ratio", 1.5, "must be from 0 to 1"),
        ("optimizer.clip_norm", -1.0, "must be greater than 0"),
        ("galore.projector_dtype", "nonsense", "must be None or bfloat16 or float16 or float32"),
        ("galore.projector_dtype", "int8", "must be None or bfloat16 or float16 or float32"),
        ("galore.target_modules", ("attn", "mlp("), r"'mlp\('\) is no regular expression: miss"),
    ],
)
def test_bad_values(key, value, message):
    config = tiny_config()
    config.update_from_flattened_dict({key: value})
    with pytest.raises(UserError, match=message) as caught:
        check_config(config)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"optimizer__name": "adamww"}, "no alias.*did you mean adamw"),
        ({"optimizer__name": "lbfgs"}, "no alias"),
        ({"optimizer__name": "sgd", "optimizer__b2": 0.9}, "b2=0.9 is not for sgd"),
        ({"optimizer__name": "sgd", "optimizer__weight_decay": 0.1}, "is not for sgd.*takes b1"),
        # Optax's adafactor would decay by the rate alone, not times the learning rate.
        ({"optimizer__name": "adafactor", "optimizer__weight_decay": 0.1}, "is not for adafactor"),
    ],
)
def test_bad_optimizers(overrides, message):
    with pytest.raises(UserError, match=message):
        optimizer_of(tiny_config(**overrides))


@pytest.mark.parametrize("method", ["galore", "full"])
@pytest.mark.parametrize("name", sorted(aliases()))
def test_every_alias_goes_down(name, method):
    config = tiny_config(f"method={method},optimizer={name}", schedule__warmup_steps=0)
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = {"blocks": {"attn": {"kernel": (2, 6, 10)}}, "embed": (12, 6)}
    draw = lambda key: jax.tree.map(  # noqa: E731
        lambda s: jax.random.normal(key, s), shapes, is_leaf=lambda s: isinstance(s, tuple)
    )
    target, params = draw(keys[0]), draw(keys[1])
    tx = optimizer_of(config)

    def loss(params):
        return optax.tree.norm(jax.tree.map(jnp.subtract, params, target), squared=True)

    @jax.jit
    def step(params, state):
        value, grads = jax.value_and_grad(loss)(params)
        updates, state = tx.update(grads, state, params, value=value)
        return optax.apply_updates(params, updates), state

    before, state = loss(params), tx.init(params)
    for _ in range(4):
        params, state = step(params, state)
    # Distance-adaptive optimizers begin with steps too small to see in float32.
    adaptive = {"dadapt_adamw", "dog", "dowg", "prodigy"}
    assert loss(params) <= before if name in adaptive else loss(params) < before


def test_muon_takes_the_matrices_of_each_layer():
    config = tiny_config("method=full,optimizer=muon", schedule__warmup_steps=0)
    params = {"mlp": {"kernel": jnp.zeros((2, 4, 4))}, "embed": jnp.zeros((8, 4))}
    grads = jax.tree.map(lambda x: jax.random.normal(jax.random.key(0), x.shape), params)
    tx = optimizer_of(config)
    updates, _ = jax.jit(tx.update)(grads, tx.init(params), params)
    for update in updates["mlp"]["kernel"]:  # about a multiple of an orthogonal matrix
        singular = np.linalg.svd(update, compute_uv=False)
        assert singular.max() / singular.min() < 2
    sizes = abs(updates["embed"])  # Adam's first update: one size for all
    np.testing.assert_allclose(sizes, sizes[0, 0], rtol=1e-4)


def test_settings_reach_the_optimizer():
    config = tiny_config(
        schedule__warmup_steps=0, optimizer__b1=0.5, optimizer__b2=0.6, optimizer__eps=1.0,
        optimizer__weight_decay=0.1, optimizer__clip_norm=0.01,
    )  # fmt: skip
    config.method = "full"
    tx = optimizer_of(config)
    rate = make_schedule(config)
    expected = optax.chain(
        optax.clip_by_global_norm(0.01), optax.adamw(rate, 0.5, 0.6, 1.0, weight_decay=0.1)
    )
    params, grads = {"w": np.ones((3, 4), np.float32)}, {"w": np.full((3, 4), 2.0, np.float32)}
    ours, _ = tx.update(grads, tx.init(params), params)
    theirs, _ = expected.update(grads, expected.init(params), params)
    np.testing.assert_array_equal(ours["w"], theirs["w"])
