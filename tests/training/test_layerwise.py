"""Layerwise updates of every shipped config and every optimizer, by shapes."""

import jax
import pytest
from test_configs import CONFIGS, load
from tiny import tiny_config

from galore_jax.errors import UserError
from galore_jax.training.experiment import make_experiment
from galore_jax.training.optimizer import aliases

# They need the gradients of all weights at once, or draw random numbers.
REFUSED = {"dadapt_adamw", "dog", "dowg", "momo", "momo_adam", "noisy_sgd", "prodigy"}


def check_steps(experiment):
    """Each step takes the state to one of the same shapes and dtypes."""
    state, batch = experiment.abstract_state(), experiment.abstract_batch(4)
    types = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)  # noqa: E731
    for step in experiment.train_steps().values():
        new, _ = jax.eval_shape(step, state, batch)
        assert types(new) == types(state)


@pytest.mark.parametrize("arg", ["", "method=full", "method=full,optimizer=muon"])
@pytest.mark.parametrize("name", [x for x in CONFIGS if x.startswith(("llama", "sample"))])
def test_every_config_steps_layerwise(name, arg):
    config = load(name, arg)
    config.update_from_flattened_dict(
        {"updates": "layerwise", "optimizer.clip_norm": None, "batch_size": 4}
    )
    config.micro_batch_size = 4
    check_steps(make_experiment(config))


@pytest.mark.parametrize("name", ["reviews", "glue:cola"])
def test_encoders_are_refused_by_name(name):
    config = load(name)
    config.updates = "layerwise"
    with pytest.raises(UserError, match="updates='layerwise'"):
        make_experiment(config)


def test_few_target_modules():
    config = tiny_config(updates="layerwise", galore__target_modules=("mlp/up_proj",))
    check_steps(make_experiment(config))


@pytest.mark.parametrize("method", ["galore", "full"])
@pytest.mark.parametrize("name", sorted(aliases()))
def test_every_alias_steps_layerwise_or_is_refused(name, method):
    config = tiny_config(
        f"method={method},optimizer={name}", updates="layerwise", optimizer__matrix_lr_scale=0.5
    )
    if name in REFUSED:
        with pytest.raises(UserError, match=f"layerwise' cannot be used with .*{name}"):
            make_experiment(config)
    else:
        check_steps(make_experiment(config))


@pytest.mark.parametrize("updates", ["standard", "layerwise"])
@pytest.mark.parametrize("arg", ["", "method=full", "method=full,optimizer=muon"])
def test_target_modules_that_match_nothing_are_one_line(arg, updates):
    config = tiny_config(
        arg,
        updates=updates,
        galore__target_modules=("attn_norm",),
        optimizer__matrix_lr_scale=1.0 if "muon" in arg else 0.5,
    )
    with pytest.raises(UserError, match=r"does not fit the model: .*matches no leaf"):
        make_experiment(config)
