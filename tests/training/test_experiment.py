"""Every mode of updating against the plainest one: standard, full gradients, one batch."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from tiny import tiny_config

from galore_jax.errors import UserError
from galore_jax.training.experiment import make_experiment

GAP = 3
UPDATES = 2 * GAP + 3


def batches(config):
    rng = np.random.default_rng(0)
    shape = (UPDATES, config.batch_size, config.data.seq_len)
    tokens = rng.integers(64, size=shape, dtype=np.int32)
    # Rows with different numbers of targets: a mean of means would not be the mean.
    targets = np.where(rng.random(shape) < 0.7, np.roll(tokens, -1, -1), -1)
    return [
        {"tokens": x, "targets": y} for x, y in zip(tokens, targets.astype(np.int32), strict=True)
    ]


def config_of(arg="", **overrides):
    fixed = {
        "model__vocab_size": 64,
        "batch_size": 4,
        "micro_batch_size": 4,
        "schedule__warmup_steps": 0,
        "galore__update_proj_gap": GAP,
    }
    return tiny_config(arg, **{**fixed, **overrides})


def run(config, **mode):
    experiment = with_mode(make_experiment(config), **mode)
    state = jax.jit(experiment.init)(jax.random.key(0))
    compiled = {k: jax.jit(step) for k, step in experiment.train_steps().items()}
    metrics = []
    for count, batch in enumerate(batches(config)):
        state, numbers = compiled[experiment.refreshes(count)](state, batch)
        metrics.append(jax.device_get(numbers))
    return jax.device_get(state), metrics


def with_mode(experiment, **mode):
    return dataclasses.replace(experiment, mode=dataclasses.replace(experiment.mode, **mode))


def check_same(a, b, atol=1e-5):
    """Of float leaves at most ``atol``, and of codes one step."""
    paths = jax.tree_util.tree_leaves_with_path(a)
    for (path, x), y in zip(paths, jax.tree.leaves(b), strict=True):
        tolerance = atol if np.issubdtype(x.dtype, np.floating) else 1
        np.testing.assert_allclose(
            x.astype(np.float64),
            y.astype(np.float64),
            atol=tolerance,
            err_msg=jax.tree_util.keystr(path),
        )


def check_same_metrics(metrics, expected):
    for mine, theirs in zip(metrics, expected, strict=True):
        for key in theirs:
            np.testing.assert_allclose(mine[key], theirs[key], rtol=1e-4)


OPTIMIZERS = {
    "adamw": {"optimizer__weight_decay": 0.1, "optimizer__eps": 1e-3},
    "adamw8bit": {"optimizer__eps": 1e-3},
    "adafactor": {"optimizer__eps": 1e-3},
    "lion": {"schedule__peak_lr": 1e-4},
    "sgd": {"optimizer__b1": 0.9},
}


@functools.cache
def plainest(method, name):
    return run(
        config_of(
            f"method={method},optimizer={name}", projected_gradients=False, **OPTIMIZERS[name]
        )
    )


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in ("adamw", "adamw8bit") else pytest.mark.slow)
        for name in OPTIMIZERS
    ],
)
@pytest.mark.parametrize("method", ["galore", "full"])
def test_layerwise_is_standard(method, name):
    arg = f"method={method},optimizer={name}"
    settings_of = {**OPTIMIZERS[name], "projected_gradients": False}
    state, metrics = run(config_of(arg, updates="layerwise", **settings_of))
    expected, expected_metrics = plainest(method, name)
    check_same(state, expected)
    for mine, theirs in zip(metrics, expected_metrics, strict=True):
        np.testing.assert_allclose(mine["loss"], theirs["loss"], rtol=1e-5)


def test_layerwise_rounds_each_layer_as_standard():
    # Every weight at random, most of them by less than a bfloat16 step: other noise would show.
    shared = {"param_dtype": "bfloat16", "param_rounding": "stochastic", "schedule__peak_lr": 1e-4}
    weights = []
    for updates in ("standard", "layerwise"):
        settings_of = {"updates": updates, "projected_gradients": False, **OPTIMIZERS["adamw"]}
        experiment = make_experiment(config_of("method=full", **{**settings_of, **shared}))
        state = jax.jit(experiment.init)(jax.random.key(0))
        step = jax.jit(experiment.train_steps()[False])
        new, _ = step(state, batches(experiment.config)[0])
        weights.append(jax.device_get(new.params))
        assert any(
            map(np.any, jax.tree.leaves(jax.tree.map(np.not_equal, new.params, state.params)))
        )
    for kernel in jax.tree.leaves(jax.tree.map(np.equal, *weights)):
        assert kernel.mean() > 0.98


@pytest.mark.slow
@pytest.mark.parametrize("method", ["galore", "full"])
def test_layerwise_muon_with_a_rate_of_the_matrices_is_standard(method):
    arg = f"method={method},optimizer=muon"
    shared = {"optimizer__matrix_lr_scale": 0.5, "projected_gradients": False}
    state, _ = run(config_of(arg, updates="layerwise", **shared))
    expected, _ = run(config_of(arg, **shared))
    check_same(state, expected, atol=1e-4)


@pytest.mark.parametrize("updates", ["standard", "layerwise"])
@pytest.mark.parametrize(
    "name",
    [pytest.param(x, marks=[] if x == "adamw8bit" else pytest.mark.slow) for x in OPTIMIZERS],
)
def test_projected_is_standard(name, updates):
    state, metrics = run(config_of(f"optimizer={name}", updates=updates, **OPTIMIZERS[name]))
    expected, expected_metrics = plainest("galore", name)
    check_same(state, expected)
    for count, (mine, theirs) in enumerate(zip(metrics, expected_metrics, strict=True)):
        np.testing.assert_allclose(mine["loss"], theirs["loss"], rtol=1e-5)
        assert ("grad_norm" in mine) == (count % GAP == 0)
        if "grad_norm" in mine:
            np.testing.assert_allclose(mine["grad_norm"], theirs["grad_norm"], rtol=1e-4)
            assert mine["projected_grad_norm"] < mine["grad_norm"]


@pytest.mark.parametrize(
    "arg", [pytest.param("", marks=pytest.mark.slow), "method=full", "optimizer=adamw8bit"]
)
def test_a_block_in_halves_is_the_block(arg):
    shared = {"updates": "layerwise", "model__tie_embeddings": True, **OPTIMIZERS["adamw"]}
    state, metrics = run(config_of(arg, remat=True, micro_batch_size=2, **shared))
    expected, expected_metrics = run(config_of(arg, **shared))
    check_same(state, expected)
    check_same_metrics(metrics, expected_metrics)


@pytest.mark.parametrize(
    ("arg", "updates", "side_by_side"),
    [
        ("", "standard", True),
        ("", "layerwise", True),
        ("", "layerwise", False),
        ("method=full", "layerwise", True),
    ],
)
def test_micro_batches_are_one_batch(arg, updates, side_by_side):
    settings_of = {"updates": updates, **OPTIMIZERS["adamw"]}
    state, metrics = run(
        config_of(arg, micro_batch_size=1, **settings_of), side_by_side=side_by_side
    )
    expected, expected_metrics = run(config_of(arg, **settings_of))
    check_same(state, expected)
    check_same_metrics(metrics, expected_metrics)


@pytest.mark.parametrize("updates", ["standard", "layerwise"])
def test_a_basis_from_a_micro_batch_is_that_of_its_gradient(updates):
    shared = {"updates": updates, **OPTIMIZERS["adamw"]}
    whole = make_experiment(config_of(**shared))
    parts = make_experiment(
        config_of(micro_batch_size=1, galore__refresh_from="micro_batch", **shared)
    )
    parts = with_mode(parts, side_by_side=False)
    state = jax.jit(whole.init)(jax.random.key(0))
    on_whole = jax.jit(whole.train_steps()[True])
    batch = batches(whole.config)[0]
    from_first, _ = on_whole(state, jax.tree.map(lambda x: x[:1], batch))
    from_whole, expected = on_whole(state, batch)
    from_parts, metrics = jax.jit(parts.train_steps()[True])(state, batch)
    projector = lambda s: jax.device_get(s.opt_state.projector)  # noqa: E731
    check_same(projector(from_parts), projector(from_first))
    with pytest.raises(AssertionError):
        check_same(projector(from_parts), projector(from_whole))
    # The update itself is of the whole batch.
    np.testing.assert_allclose(metrics["loss"], expected["loss"], rtol=1e-6)
    head = lambda s: s.opt_state.inner_state[0].mu["lm_head"]["kernel"]  # noqa: E731
    np.testing.assert_allclose(head(from_parts), head(from_whole), atol=1e-7)


def test_micro_batches_go_side_by_side_while_that_takes_less_memory():
    # Inputs of 2 blocks, 4 x 16 x 16 tokens of float32; sums of some 2 x 1,024 + 2 x 64 x 16.
    few, many = config_of(updates="layerwise"), config_of(updates="layerwise", batch_size=4096)
    full = config_of("method=full", updates="layerwise", batch_size=4096)
    assert make_experiment(few).mode.side_by_side
    assert not make_experiment(many).mode.side_by_side
    assert make_experiment(full).mode.side_by_side


@pytest.mark.parametrize(
    ("arg", "overrides", "named"),
    [
        ("", {"optimizer__clip_norm": 1.0}, "clip_norm"),
        ("optimizer=prodigy", {}, "prodigy"),
        ("method=full,optimizer=noisy_sgd", {}, "noisy_sgd"),
    ],
)
def test_what_layerwise_cannot_do_is_refused_by_name(arg, overrides, named):
    config = config_of(arg, updates="layerwise", **overrides)
    with pytest.raises(UserError, match=named):
        make_experiment(config)
