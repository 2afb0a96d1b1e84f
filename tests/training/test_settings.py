"""Configs: what they declare, what they refuse, and that each of them builds."""

import functools
import importlib
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
from tiny import ROOT, tiny_config

from galore_jax.errors import UserError
from galore_jax.memory import count_state, tree_bytes
from galore_jax.training import settings, steps
from galore_jax.training.optimizers import make_optimizer

CONFIGS = sorted(path.stem for path in Path(ROOT / "configs").glob("*.py") if path.stem != "base")
ARGS = ["", "method=galore", "method=full", "optimizer=adafactor", "method=full,optimizer=lion"]


def abstract(config):
    model, tx = settings.model_config(config), make_optimizer(config)
    state = jax.eval_shape(functools.partial(steps.init_state, model, tx), jax.random.key(0))
    return model, tx, state


@pytest.mark.parametrize("arg", ARGS)
@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_builds_and_steps(name, arg):
    config = importlib.import_module(f"configs.{name}").get_config(arg)
    settings.check_config(config)
    model, tx, state = abstract(config)
    micro_batches = config.batch_size // config.micro_batch_size
    step = steps.make_train_step(
        model, tx, settings.learning_rate(config), micro_batches=micro_batches
    )
    rows = jax.ShapeDtypeStruct((config.batch_size, config.data.seq_len), np.int32)
    new, _ = jax.eval_shape(step, state, {"tokens": rows, "targets": rows})
    same = lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype)  # noqa: E731
    assert all(jax.tree.leaves(jax.tree.map(same, new, state)))


# design: optimizer state in bfloat16, MiB of 2^20; the published table's roundings.
@pytest.mark.parametrize(
    ("name", "params", "adamw", "galore"),
    [
        ("llama_60m", 58_073_600, 0.216 * 1024, 0.152 * 1024),
        ("llama_130m", 134_105_856, 0.500 * 1024, 0.319 * 1024),
        ("llama_350m", 367_969_280, 1.371 * 1024, 0.608 * 1024),
        ("llama_1b", 1_339_082_752, 4.988 * 1024, 1988.34),
        ("llama_7b", 6_738_415_616, 25.10 * 1024, 8.759 * 1024),
    ],
)
def test_state_bytes_of_the_papers_models(name, params, adamw, galore):
    module = importlib.import_module(f"configs.{name}")
    for arg, expected in (("", galore), ("method=full", adamw)):
        _, _, state = abstract(module.get_config(arg))
        assert tree_bytes(state.params) == 2 * params
        counted = count_state(state.opt_state).total / 2**20
        assert counted == pytest.approx(expected, abs=0.005 if expected == 1988.34 else 5.2)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("galore.rank", 0, r"config\.galore\.rank=0 must be at least 1"),
        ("galore.update_proj_gap", 0, r"config\.galore\.update_proj_gap=0 must be at least 1"),
        ("galore.proj_type", "sdt", "must be std; did you mean std"),
        ("galore.scale", 0.0, "must be greater than 0"),
        ("method", "ful", "must be galore or full; did you mean full"),
        ("batch_size", 3, r"config\.batch_size=3 must be a multiple of .*micro_batch_size=2"),
        ("train_steps", 0, "must be at least 1"),
        ("log_every_steps", 0, "must be at least 1"),
        ("schedule.warmup_steps", 12, r"less than config\.train_steps=12"),
        ("schedule.peak_lr", 0.0, "must be greater than 0"),
        ("schedule.final_lr_ratio", 1.5, "must be from 0 to 1"),
        ("optimizer.clip_norm", -1.0, "must be greater than 0"),
    ],
)
def test_bad_values(key, value, message):
    config = tiny_config()
    config.update_from_flattened_dict({key: value})
    with pytest.raises(UserError, match=message) as caught:
        settings.check_config(config)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"optimizer__name": "adamww"}, "no alias.*did you mean adamw"),
        ({"optimizer__name": "lbfgs"}, "no alias"),
        ({"optimizer__name": "sgd", "optimizer__b2": 0.9}, "b2=0.9 is not for sgd"),
        ({"optimizer__name": "sgd", "optimizer__weight_decay": 0.1}, "is not for sgd"),
    ],
)
def test_bad_optimizers(overrides, message):
    with pytest.raises(UserError, match=message):
        make_optimizer(tiny_config(**overrides))


@pytest.mark.parametrize("method", ["galore", "full"])
@pytest.mark.parametrize(
    "name", ["adam", "adamw", "adafactor", "lion", "sgd", "rmsprop", "momo_adam", "muon", "prodigy"]
)
def test_aliases_train(name, method):
    config = tiny_config(f"method={method},optimizer={name}", schedule__warmup_steps=0)
    model, tx, state = abstract(config)
    step = steps.make_train_step(model, tx, settings.learning_rate(config), micro_batches=1)
    rows = jax.ShapeDtypeStruct((config.batch_size, config.data.seq_len), np.int32)
    new, _ = jax.eval_shape(step, state, {"tokens": rows, "targets": rows})
    assert jax.tree.structure(new) == jax.tree.structure(state)


def test_settings_reach_the_optimizer():
    config = tiny_config(
        schedule__warmup_steps=0, optimizer__b1=0.5, optimizer__b2=0.6, optimizer__eps=1.0,
        optimizer__weight_decay=0.1, optimizer__clip_norm=0.01,
    )  # fmt: skip
    config.method = "full"
    tx = make_optimizer(config)
    rate = settings.learning_rate(config)
    expected = optax.chain(
        optax.clip_by_global_norm(0.01), optax.adamw(rate, 0.5, 0.6, 1.0, weight_decay=0.1)
    )
    params, grads = {"w": np.ones((3, 4), np.float32)}, {"w": np.full((3, 4), 2.0, np.float32)}
    ours, _ = tx.update(grads, tx.init(params), params)
    theirs, _ = expected.update(grads, expected.init(params), params)
    np.testing.assert_array_equal(ours["w"], theirs["w"])
