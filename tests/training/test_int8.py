"""Runs with int8 weights and lazy refreshes: modes, resuming, and what is made of a run."""

import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import tiny_config

from galore_jax import export
from galore_jax.errors import UserError
from galore_jax.int8_kernels import Int8Kernel, decoded, is_int8
from galore_jax.models import huggingface
from galore_jax.models.generate import generate
from galore_jax.training.experiment import make_experiment
from galore_jax.training.loop import train
from galore_jax.training.metrics import read_metrics
from galore_jax.training.saved_run import open_model, open_run

INT8 = {"param_dtype": "int8", "optimizer__name": "adamw8bit", "galore__projector_bits": 4}


def config(**overrides):
    return tiny_config(**INT8, **{"galore__lazy_refresh": 0.2, **overrides})


def run_steps(config, count, state=None, first=0):
    experiment = make_experiment(config)
    steps = {kind: jax.jit(step) for kind, step in experiment.train_steps().items()}
    state = experiment.first_state() if state is None else state
    shapes = experiment.abstract_batch(config.batch_size)
    for i in range(first, count):
        rng = np.random.default_rng(i)
        batch = jax.tree.map(lambda x, r=rng: r.integers(0, 99, x.shape).astype(x.dtype), shapes)
        state, metrics = steps[experiment.refreshes(i, state)](state, batch)
    return state, metrics


def codes(state):
    return [x.codes for x in jax.tree.leaves(state.params, is_leaf=is_int8) if is_int8(x)]


SLOW = pytest.mark.slow


@pytest.mark.parametrize("projected", [pytest.param(False, marks=SLOW), True])
@pytest.mark.parametrize("micro_batch_size", [2, pytest.param(4, marks=SLOW)])
def test_all_modes_give_the_same_codes(projected, micro_batch_size):
    plain, _ = run_steps(config(projected_gradients=False, micro_batch_size=4), 5)
    other, metrics = run_steps(
        config(
            updates="layerwise",
            projected_gradients=projected,
            micro_batch_size=micro_batch_size,
            remat=projected,
        ),
        5,
    )
    assert np.isfinite(metrics["loss"])
    for a, b in zip(codes(plain), codes(other), strict=True):
        assert a.dtype == jnp.int8
        assert (a != b).mean() < 0.002
        assert (jnp.abs(a.astype(int) - b.astype(int)) <= 1).mean() > 0.999


def test_no_float_copy_is_kept():
    state = make_experiment(config()).abstract_state()
    kernel = state.params["blocks"]["mlp"]["up_proj"]["kernel"]
    assert (kernel.codes.dtype, kernel.scales.shape) == (jnp.int8, (2, 24))
    assert state.params["embed"]["embedding"].scales.shape == (8192,)
    assert state.params["lm_head"]["kernel"].per == "column"
    large = [x for x in jax.tree.leaves(state) if x.dtype in (jnp.float32, jnp.bfloat16)]
    assert max(x.size for x in large) <= 8192


@SLOW
def test_rounding_to_nearest_is_a_choice_and_loses_small_updates():
    small = {"schedule__peak_lr": 1e-6, "schedule__warmup_steps": 0}
    start = make_experiment(config()).first_state()
    moved = [
        sum(int((a != b).sum()) for a, b in zip(codes(start), codes(state), strict=True))
        for state in (
            run_steps(config(**small), 4)[0],
            run_steps(config(**small, param_rounding="nearest"), 4)[0],
        )
    ]
    assert moved[0] > 100 * (moved[1] + 1)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("int8") / "run"
    train(config(), workdir)
    return workdir


@pytest.mark.parametrize("updates", [pytest.param("standard", marks=SLOW), "layerwise"])
def test_resuming_is_exact(updates, tmp_path):
    settings = config(updates=updates)
    train(settings, tmp_path / "whole")
    half = config(updates=updates, train_steps=12)
    train(half, tmp_path / "cut")
    for folder in ("8", "12"):
        assert (tmp_path / "cut" / "checkpoints" / folder).is_dir()
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "12")
    train(half, tmp_path / "cut")
    whole, cut = (open_run(tmp_path / name).params for name in ("whole", "cut"))
    jax.tree.map(np.testing.assert_array_equal, whole, cut)
    lines = [
        {line["step"]: line["loss"] for line in read_metrics(tmp_path / name) if "loss" in line}
        for name in ("whole", "cut")
    ]
    assert lines[0] == lines[1]


def test_spared_refreshes_are_logged(run):
    last = [line for line in read_metrics(run) if "refreshes" in line][-1]
    matrices = 2 * 7
    assert last["refreshes"] + last["refreshes_spared"] == 4 * matrices


def test_a_run_and_its_export_generate_the_same_text(run):
    saved = open_run(run)
    assert isinstance(saved.params["embed"]["embedding"], Int8Kernel)
    folder = run.parent / "exported"
    assert export.main(["export", f"--workdir={run}", f"--to={folder}"]) == 0
    loaded = open_model(folder)
    jax.tree.map(np.testing.assert_array_equal, loaded.params, decoded(saved.params))
    prompt = saved.tokenizer.encode("Creates a new")[:-1]
    texts = [
        generate(model, params, prompt, 8)
        for model, params in ((saved.model, saved.params), (loaded.config, loaded.params))
    ]
    assert texts[0] == texts[1]
    half = run.parent / "half"
    flags = [f"--workdir={run}", f"--to={half}", "--dtype=bfloat16"]
    assert export.main(["export", *flags]) == 0
    assert huggingface.load(half)[1]["lm_head"]["kernel"].dtype == jnp.bfloat16
    assert json.loads((half / "config.json").read_text())["torch_dtype"] == "bfloat16"


@SLOW
def test_training_goes_on_from_a_folder_of_floats(run):
    folder = run.parent / "floats"
    assert export.main(["export", f"--workdir={run}", f"--to={folder}"]) == 0
    experiment = make_experiment(config(init_from=str(folder)))
    state, floats = experiment.first_state(), huggingface.load(folder)[1]
    assert jax.tree.structure(state) == jax.tree.structure(experiment.abstract_state())
    found = decoded(state.params)
    for node in (("blocks", "attn", "q_proj", "kernel"), ("embed", "embedding")):
        array, wanted = (functools.reduce(lambda x, key: x[key], node, x) for x in (found, floats))
        largest = jnp.abs(wanted).max(-1 if node[0] == "embed" else -2, keepdims=True)
        assert (jnp.abs(array - wanted) <= 0.5001 * 1.125 / 127 * largest).all()
    np.testing.assert_array_equal(found["final_norm"]["scale"], floats["final_norm"]["scale"])
    state, metrics = run_steps(config(init_from=str(folder)), 3, state)
    assert np.isfinite(metrics["loss"])


@SLOW
def test_tied_embeddings():
    settings = config(model__tie_embeddings=True)
    plain, _ = run_steps(settings, 4)
    layerwise, _ = run_steps(config(model__tie_embeddings=True, updates="layerwise"), 4)
    for a, b in zip(codes(plain), codes(layerwise), strict=True):
        assert (a != b).mean() < 0.002


@pytest.mark.parametrize("method", ["lora", "relora", "low_rank"])
def test_adapters_are_refused(method):
    with pytest.raises(UserError, match="param_dtype='int8' must be bfloat16"):
        make_experiment(config(method=method))
