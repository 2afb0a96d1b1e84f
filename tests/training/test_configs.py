"""The shipped configs: each row makes an experiment, whose state has the published size."""

import importlib

import jax
import pytest
from tiny import ROOT

from configs import llama
from galore_jax.errors import UserError
from galore_jax.memory import count_state, tree_bytes
from galore_jax.training.experiment import make_experiment

FILES = {path.stem for path in (ROOT / "configs").glob("*.py")} - {"base", "glue", "llama"}
ROWS = [*(f"llama:{row}" for row in llama.ROWS), "glue:cola", "glue:stsb"]
CONFIGS = sorted(FILES) + ROWS
ARGS = ["", "method=galore", "method=full", "optimizer=adafactor", "method=full,optimizer=lion"]


def load(name, arg=""):
    """The config of ``FILE`` or ``FILE:ROW``, with more arguments."""
    file, _, row = name.partition(":")
    module = importlib.import_module(f"configs.{file}")
    config = module.get_config(",".join(filter(None, [row, arg])))
    if config.init_from == "minilm":  # which would be fetched
        config.init_from = None
    return config


# Rows of one model differ little in the steps that they make.
FEW = [x for x in CONFIGS if x not in ("llama:130m", "llama:350m", "llama:70b", "llama:7b_12gb")]


@pytest.mark.parametrize("arg", ARGS)
@pytest.mark.parametrize(
    "name", [pytest.param(x, marks=[] if x in FEW else pytest.mark.slow) for x in CONFIGS]
)
def test_every_config_builds_and_steps(name, arg):
    experiment = make_experiment(load(name, arg))
    state = experiment.abstract_state()
    batch = experiment.abstract_batch(experiment.config.batch_size)
    same = lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype)  # noqa: E731
    for step in experiment.train_steps().values():
        new, _ = jax.eval_shape(step, state, batch)
        assert all(jax.tree.leaves(jax.tree.map(same, new, state)))


# Exact bytes of state in bfloat16, without step counts; they round to the published GiB of
# 0.216 / 0.152, 0.500 / 0.319, 1.371 / 0.608, 4.988 / 1988.34 MiB, 25.10 / 8.759.
@pytest.mark.parametrize(
    ("row", "params", "galore"),
    [
        ("60m", 58_073_600, 163_743_744),
        ("130m", 134_105_856, 342_961_152),
        ("350m", 367_969_280, 652_808_192),
        ("1b", 1_339_082_752, 2_084_921_344),
        ("7b", 6_738_415_616, 9_404_694_528),
    ],
)
def test_state_bytes_of_the_papers_models(row, params, galore):
    for arg, expected in (("", galore), ("method=full", 4 * params)):
        state = make_experiment(load(f"llama:{row}", arg)).abstract_state()
        assert tree_bytes(state.params) == 2 * params
        counted = count_state(state.opt_state)
        assert counted.total - counted.other == expected


@pytest.mark.parametrize(
    ("row", "arg", "expected"),
    [
        ("1b", "", 1_480_966_144),
        ("7b", "", 6_166_691_840),
        ("7b", ",optimizer=adamw8bit", 4_056_367_232),
    ],
)
def test_state_bytes_of_galore_muon(row, arg, expected):
    """One low-rank moment a matrix: GaLore's bytes less a moment of R of each."""
    state = make_experiment(load(f"llama:{row}", f"method=galore_muon{arg}")).abstract_state()
    counted = count_state(state.opt_state)
    assert counted.total - counted.other == expected
    if not arg:
        adam = make_experiment(load(f"llama:{row}")).abstract_state().opt_state
        matrices = count_state(adam).second_moments - counted.second_moments
        assert counted.total - counted.other == count_state(adam).total - 12 - matrices


@pytest.mark.parametrize(("row", "arg"), [("7b", "optimizer=adamw8bit"), ("7b_24gb", "")])
def test_8_bit_state_of_the_7b_model_is_the_published_size(row, arg):
    # 5380.51 MiB, scales left out: moments of one byte, small leaves' float32 ones too, projectors
    # in bfloat16. Scales are four bytes for every 256 values.
    counted = count_state(make_experiment(load(f"llama:{row}", arg)).abstract_state().opt_state)
    moments = counted.first_moments + counted.second_moments
    assert round((moments + counted.projectors) / 2**20, 2) == 5380.51
    assert counted.scales == pytest.approx(moments / 64, rel=1e-3)


def test_arguments_win_over_a_rows_own_settings():
    config = llama.get_config("7b_24gb,method=full,optimizer=lion")
    assert (config.method, config.optimizer.name, config.updates) == ("full", "lion", "layerwise")
    assert config.schedule.peak_lr == llama.get_config("7b,method=full").schedule.peak_lr


def test_an_unknown_row_is_named():
    with pytest.raises(UserError, match="no row '13b'; give one of 60m, 130m, 350m, 1b, 7b"):
        llama.get_config("13b,method=full")
