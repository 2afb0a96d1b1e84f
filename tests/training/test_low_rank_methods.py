"""The methods lora, relora and low_rank in the trainer."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import tiny_config

from galore_jax.adapters import LoRAKernel, merge
from galore_jax.errors import UserError
from galore_jax.models.llama import apply, init_params
from galore_jax.training.experiment import make_experiment
from galore_jax.training.loop import train
from galore_jax.training.optimizer import make_schedule
from galore_jax.training.saved_run import open_run
from galore_jax.training.step import restart_state


def config_of(method, **overrides):
    overrides = {"lora__rank": 4, "relora__merge_every_steps": 4, **overrides}
    return tiny_config(f"method={method}", **overrides)


def batch_of(experiment):
    tokens = jax.random.randint(jax.random.key(1), (4, 16), 0, 8192)
    return {"tokens": tokens, "targets": jnp.roll(tokens, -1, 1)}


def one_step(experiment, state, batch, refresh=False):
    return jax.jit(experiment.train_steps()[refresh])(state, batch)


def test_the_first_loss_is_that_of_the_frozen_model():
    losses = []
    for method in ("full", "lora"):
        experiment = make_experiment(config_of(method))
        state = experiment.first_state()
        losses.append(one_step(experiment, state, batch_of(experiment))[1]["loss"])
    np.testing.assert_allclose(*losses, rtol=1e-6)


@pytest.mark.parametrize(
    "optimizer", ["adamw8bit", pytest.param("adafactor", marks=pytest.mark.slow)]
)
def test_frozen_weights_stay_and_have_no_state(optimizer):
    experiment = make_experiment(config_of("lora", optimizer__name=optimizer))
    state = experiment.first_state()
    full = make_experiment(config_of("full", optimizer__name=optimizer)).abstract_state()
    size = lambda tree: sum(x.size for x in jax.tree.leaves(tree))  # noqa: E731
    assert size(state.opt_state) < size(full.opt_state)
    before = state
    for _ in range(3):
        state, _ = one_step(experiment, state, batch_of(experiment))
    old, new = (s.params["blocks"]["mlp"]["up_proj"]["kernel"] for s in (before, state))
    assert isinstance(new, LoRAKernel)
    np.testing.assert_array_equal(old.kernel, new.kernel)
    assert new.b.any()
    assert (before.params["embed"]["embedding"] != state.params["embed"]["embedding"]).any()


@pytest.mark.slow
def test_micro_batches_make_the_gradient_of_the_whole_batch():
    params = []
    for micro in (4, 2):
        experiment = make_experiment(config_of("lora", micro_batch_size=micro, lora__dropout=0.0))
        state = experiment.first_state()
        for _ in range(2):
            state, _ = one_step(experiment, state, batch_of(experiment))
        params.append(state.params)
    for a, b in zip(*map(jax.tree.leaves, params), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-5)


def test_dropout_differs_from_update_to_update_and_is_not_in_evaluation():
    experiment = make_experiment(config_of("lora", lora__dropout=0.5))
    state, batch = experiment.first_state(), batch_of(experiment)
    for _ in range(3):  # until B is not zero
        state, _ = one_step(experiment, state, batch)
    losses = [
        float(one_step(experiment, state._replace(step=jnp.int32(step)), batch)[1]["loss"])
        for step in (3, 3, 4)
    ]
    assert losses[0] == losses[1] != losses[2]
    held_out = experiment.task.loss(experiment.stages.forward(state.params, batch), batch)
    plain = experiment.task.loss(experiment.stages.forward(merge(state.params), batch), batch)
    assert held_out == pytest.approx(float(plain), rel=1e-5)


@pytest.mark.parametrize("optimizer", ["adamw8bit"])
def test_a_merge_keeps_the_function_and_prunes_moments(optimizer):
    experiment = make_experiment(config_of("relora", optimizer__name=optimizer))
    state, batch = experiment.first_state(), batch_of(experiment)
    for _ in range(3):
        state, _ = one_step(experiment, state, batch)
    after = restart_state(state, 0.9)
    loss = lambda s: experiment.task.loss(experiment.stages.forward(s.params, batch), batch)  # noqa: E731
    assert float(loss(after)) == pytest.approx(float(loss(state)), rel=1e-6)
    is_lora = lambda x: isinstance(x, LoRAKernel)  # noqa: E731
    moments = [x for x in jax.tree.leaves(after.opt_state, is_leaf=is_lora) if is_lora(x)]
    assert len(moments) == 2 * 7  # of the seven kernels of a block
    for first, second in zip(moments[:7], moments[7:], strict=True):
        first, second = (
            np.concatenate([np.ravel(getattr(x, "codes", x)) for x in (node.a, node.b)]) != 0
            for node in (first, second)
        )
        assert 0.02 < second.mean() < 0.25  # a tenth is kept
        assert not (first & ~second).any()  # no first moment beside a second one of zero
    same = jax.tree.map(np.array_equal, after.params["embed"], state.params["embed"])
    assert all(jax.tree.leaves(same))


def test_the_rate_rises_again_after_a_merge():
    config = config_of("relora", train_steps=100, schedule__warmup_steps=10)
    config.relora.merge_every_steps, config.relora.restart_warmup_steps = 40, 5
    rates = np.array([float(make_schedule(config)(t)) for t in range(100)])
    plain = config.copy_and_resolve_references()
    plain.method = "lora"
    cosine = np.array([float(make_schedule(plain)(t)) for t in range(100)])
    np.testing.assert_allclose(rates[:40], cosine[:40], rtol=1e-6)
    np.testing.assert_allclose(rates[40:45], cosine[40:45] * np.arange(5) / 5, rtol=1e-5)
    np.testing.assert_allclose(rates[45:80], cosine[45:80], rtol=1e-6)
    assert rates[80] == 0


def test_low_rank_at_full_rank_can_be_any_matrix():
    experiment = make_experiment(config_of("low_rank", lora__rank=16))
    kernel = experiment.first_state().params["blocks"]["attn"]["q_proj"]["kernel"]
    assert kernel.a.shape == (2, 16, 16)
    assert (np.linalg.matrix_rank(np.asarray(merge({"w": kernel})["w"])) == 16).all()


@pytest.mark.parametrize("method", ["lora", "low_rank"])
def test_a_run_is_opened_merged(method, tmp_path):
    train(config_of(method, train_steps=6, checkpoint_every_steps=0), tmp_path / "run")
    run = open_run(tmp_path / "run")
    graphdef, like = init_params(run.model, jax.random.key(0))
    assert jax.tree.map(jnp.shape, run.params) == jax.tree.map(jnp.shape, like)
    tokens = jnp.arange(16)[None]
    assert jnp.isfinite(apply(graphdef, run.params).logits(tokens)).all()


@pytest.mark.slow
def test_factors_have_a_rate_of_their_own():
    updates = []
    for scale in (1.0, 0.5):
        config = config_of("lora", optimizer__matrix_lr_scale=scale, schedule__warmup_steps=0)
        experiment = make_experiment(config)
        state = experiment.first_state()
        new, _ = one_step(experiment, state, batch_of(experiment))
        updates.append(optax.tree.sub(new.params, state.params))
    whole, half = (u["blocks"]["mlp"]["up_proj"]["kernel"].b for u in updates)
    np.testing.assert_allclose(half, 0.5 * whole, rtol=1e-4, atol=1e-9)
    whole, half = (u["embed"]["embedding"] for u in updates)
    np.testing.assert_allclose(half, whole, rtol=1e-5)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"lora__rank": 0}, "config.lora.rank=0 must be at least 1"),
        ({"lora__alpha": 0.0}, "config.lora.alpha=0.0 must be greater than 0"),
        ({"lora__dropout": 1.0}, "config.lora.dropout=1.0 must be at least 0 and less than 1"),
        ({"lora__target_modules": ("atn",)}, "atn"),
        ({"updates": "layerwise"}, "'standard' with config.method='lora'"),
        ({"projected_gradients": True}, "None or False with config.method='lora'"),
        ({"method": "loar"}, "did you mean lora"),
    ],
)
def test_bad_settings_are_one_line(overrides, message):
    config = config_of("lora", **{k: v for k, v in overrides.items() if k != "method"})
    config.method = overrides.get("method", "lora")
    with pytest.raises(UserError, match=message.replace("(", r"\(")) as caught:
        make_experiment(config)
    assert "\n" not in str(caught.value)
