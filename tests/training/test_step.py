"""One update against the same thing written out."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import tiny_config

from galore_jax.models import llama
from galore_jax.training.experiment import make_experiment
from galore_jax.training.step import make_train_step, sum_over_parts


def start(config):
    experiment = make_experiment(config)
    return experiment, jax.jit(experiment.init)(jax.random.key(0))


def random_batch(config, seed=0):
    rng = np.random.default_rng(seed)
    shape = (config.batch_size, config.data.seq_len)
    tokens = rng.integers(config.model.vocab_size, size=shape, dtype=np.int32)
    # Rows of very different numbers of targets: a mean of means would not be the mean.
    targets = np.where(np.arange(shape[1]) < [[15], [2], [9], [1]], np.roll(tokens, -1, 1), -1)
    return {"tokens": tokens, "targets": targets.astype(np.int32)}


def run_step(config, micro_batches, seed=0):
    experiment, state = start(config)
    of = experiment
    mode = dataclasses.replace(of.mode, projected=False, micro_batches=micro_batches)
    step = make_train_step(of.stages, of.task, of.optimizer, of.schedule, mode, refresh=True)
    return jax.jit(step)(state, random_batch(config, seed))


def test_loss_and_norm_are_those_of_the_mean_over_targets():
    config = tiny_config(schedule__warmup_steps=0)
    experiment, state = start(config)
    batch = random_batch(config)
    graphdef, _ = llama.init_params(experiment.model, jax.random.key(0))

    def mean_loss(params):
        logits = llama.apply(graphdef, params).logits(batch["tokens"])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, abs(batch["targets"]))
        return jnp.sum(losses * (batch["targets"] >= 0)) / 27

    loss, grads = jax.jit(jax.value_and_grad(mean_loss))(state.params)
    new, metrics = run_step(config, micro_batches=1)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-6)
    np.testing.assert_allclose(metrics["grad_norm"], optax.tree.norm(grads), rtol=1e-5)
    np.testing.assert_allclose(metrics["learning_rate"], config.schedule.peak_lr, rtol=1e-6)
    assert metrics["tokens"] == 27
    assert new.step == 1


@pytest.mark.parametrize("arg", ["", "method=full"])
def test_micro_batches_equal_one_batch(arg):
    config = tiny_config(arg, schedule__warmup_steps=0, optimizer__eps=1e-3)
    one, metrics_one = run_step(config, micro_batches=1)
    four, metrics_four = run_step(config, micro_batches=4)
    for key in metrics_one:
        np.testing.assert_allclose(metrics_one[key], metrics_four[key], rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), one.params, four.params)


def test_micro_batch_gradients_add_up_in_float32():
    # 4096 equal bfloat16 terms added in bfloat16 stall at 256.
    params = jnp.ones((), jnp.bfloat16)
    parts = {"tokens": jnp.ones((4096, 1)), "targets": jnp.ones((4096, 1))}
    grad = jax.value_and_grad(lambda p, part: (p * part["tokens"].sum()).astype(jnp.float32))
    _, total = sum_over_parts(grad, params, parts)
    assert total == 4096
    assert total.dtype == jnp.float32


def test_matrix_lr_scale_is_for_the_matrices_that_galore_projects():
    plain, _ = run_step(tiny_config("method=full", schedule__warmup_steps=0), 1)
    scaled, _ = run_step(
        tiny_config("method=full", schedule__warmup_steps=0, optimizer__matrix_lr_scale=0.5), 1
    )
    first = start(tiny_config("method=full"))[1].params
    change = lambda state: jax.tree.map(lambda a, b: a - b, state.params, first)  # noqa: E731
    ratios = jax.tree.map(
        lambda a, b: float(jnp.sum(b * a) / jnp.sum(a * a)), change(plain), change(scaled)
    )
    for path, ratio in jax.tree_util.tree_leaves_with_path(ratios):
        name = jax.tree_util.keystr(path)
        expected = 0.5 if "attn" in name or "mlp" in name else 1.0
        assert ratio == pytest.approx(expected, rel=1e-3), name


def test_schedule_is_warmup_then_cosine():
    config = tiny_config(train_steps=110, schedule__warmup_steps=10, schedule__peak_lr=1.0)
    rate = make_experiment(config).schedule
    assert [float(rate(step)) for step in (0, 5, 10)] == pytest.approx([0.0, 0.5, 1.0])
    assert float(rate(60)) == pytest.approx(0.1 + 0.9 / 2)
    assert float(rate(110)) == pytest.approx(0.1)


@pytest.mark.parametrize(("dtype", "param_dtype"), [("float16", "float32"), ("float16", "float16")])
@pytest.mark.parametrize("implementation", [None, "xla"])
def test_float16_trains_on_a_cpu(dtype, param_dtype, implementation):
    of_float32 = tiny_config(schedule__warmup_steps=0)
    config = tiny_config(
        schedule__warmup_steps=0,
        dtype=dtype,
        param_dtype=param_dtype,
        model__attention_implementation=implementation,
    )
    _, metrics = run_step(config, micro_batches=2)
    _, expected = run_step(of_float32, micro_batches=2)
    np.testing.assert_allclose(metrics["loss"], expected["loss"], rtol=1e-3)
    np.testing.assert_allclose(metrics["grad_norm"], expected["grad_norm"], rtol=1e-2)


def test_bfloat16_state_keeps_its_dtypes():
    config = tiny_config(dtype="bfloat16", param_dtype="bfloat16")
    _, state = start(config)
    new, metrics = run_step(config, micro_batches=2)
    dtypes = lambda tree: jax.tree.map(lambda x: x.dtype, tree)  # noqa: E731
    assert dtypes(new) == dtypes(state)
    assert {leaf.dtype for leaf in jax.tree.leaves(new.params)} == {jnp.dtype(jnp.bfloat16)}
    assert metrics["loss"].dtype == jnp.float32
