"""What a run has trained leaves it, is evaluated, and is trained on."""

import json
import math
import shutil

import jax
import numpy as np
import pytest
from tiny import tiny_config

from galore_jax import evaluate, export
from galore_jax.data.sample import prepare_sample
from galore_jax.data.tokenizer import open_tokenizer
from galore_jax.errors import UserError
from galore_jax.models import huggingface
from galore_jax.training.cli import find_configs, parse
from galore_jax.training.experiment import make_experiment
from galore_jax.training.loop import train
from galore_jax.training.metrics import read_metrics
from galore_jax.training.saved_run import open_run

TINY = ["--config.eval_tokens=200", "--config.micro_batch_size=2", "--config.data.seq_len=16"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("commands") / "run"
    train(tiny_config(), workdir)
    return workdir


@pytest.fixture(scope="module")
def exported(run):
    folder = run.parent / "exported"
    assert export.main(["export", f"--workdir={run}", f"--to={folder}"]) == 0
    return folder


def evaluations(workdir):
    return [line["eval_loss"] for line in read_metrics(workdir) if "eval_loss" in line]


def test_an_exported_run_has_its_weights_and_tokenizer(run, exported):
    trained = open_run(run)
    config, params = huggingface.load(exported)
    jax.tree.map(np.testing.assert_array_equal, params, trained.params)
    assert (config.hidden_size, config.vocab_size, config.max_positions) == (16, 8192, 16)
    text = "Creates a new  volume, naïve №5."
    ids = open_tokenizer(exported).encode(text)
    np.testing.assert_array_equal(ids, trained.tokenizer.encode(text))
    assert config.eos_ids == (ids[-1],)


def test_an_earlier_checkpoint_in_another_dtype(run, tmp_path, capsys):
    to = tmp_path / "new" / "folder"
    arguments = [f"--workdir={run}", f"--to={to}", "--step=8", "--dtype=bfloat16"]
    assert export.main(["export", *arguments]) == 0
    assert "after update 8" in capsys.readouterr().out
    _, params = huggingface.load(to)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {"bfloat16"}


def test_evaluation_is_that_of_the_run(run, exported, tmp_path, capsys):
    (*_, last) = evaluations(run)
    out = tmp_path / "numbers.json"
    for source in (f"--workdir={run}", f"--model={run}", f"--model={exported}"):
        settings = TINY if "exported" in source else []
        settings = [*settings, "--config.data.packing=True"]
        assert evaluate.main(["evaluate", source, *settings, f"--json={out}"]) == 0
        numbers = json.loads(out.read_text())
        assert numbers["loss"] == pytest.approx(last, rel=1e-6)
        assert numbers["perplexity"] == pytest.approx(math.exp(last), rel=1e-5)
        bits = numbers["loss"] * numbers["targets"] / math.log(2)
        assert numbers["bits_per_byte"] == pytest.approx(bits / numbers["text_bytes"])
    capsys.readouterr()
    assert evaluate.main(["evaluate", f"--workdir={run}", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["loss"] == pytest.approx(last, rel=1e-6)


def test_bytes_of_tokens_are_those_of_their_text(exported):
    texts = ["Creates a new volume, naïve №5.", "日本語 🤗", "a\tb\n"]
    for tokenizer in (open_tokenizer(prepare_sample()[1]), open_tokenizer(exported)):
        for text in texts:
            ids = tokenizer.encode(text)
            spelled = " " + tokenizer.decode(ids)  # the space that the tokenizer puts in front
            assert sum(map(tokenizer.token_bytes, ids.tolist())) == len(spelled.encode())


@pytest.mark.parametrize("method", ["galore", "full"])
def test_training_goes_on_from_a_folder(run, exported, tmp_path, method):
    config = tiny_config(init_from=str(exported), train_steps=4, eval_every_steps=0)
    config.method = method
    config.model.hidden_size = 999  # whatever it says: the folder's sizes hold
    train(config, tmp_path / "run")
    first, last = evaluations(tmp_path / "run")
    assert first == pytest.approx(evaluations(run)[-1], rel=1e-6)
    assert last != first
    record = json.loads((tmp_path / "run" / "config.json").read_text())
    assert record["model"]["hidden_size"] == 16
    assert record["init_from"] == str(exported)
    # The run stands for itself afterwards: its folder has all that is needed.
    assert open_run(tmp_path / "run").model.hidden_size == 16


def test_params_take_the_dtype_of_the_config(exported):
    config = tiny_config(init_from=str(exported), param_dtype="bfloat16")
    state = make_experiment(config).first_state()
    assert {x.dtype.name for x in jax.tree.leaves(state.params)} == {"bfloat16"}
    assert int(state.step) == 0


def test_scaled_rotary_frequencies_come_along(exported, tmp_path):
    folder = tmp_path / "llama3"
    shutil.copytree(exported, folder)
    values = json.loads((folder / "config.json").read_text())
    values["rope_scaling"] = {
        **{"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0},
        **{"high_freq_factor": 4.0, "original_max_position_embeddings": 8},
    }
    (folder / "config.json").write_text(json.dumps(values))
    experiment = make_experiment(tiny_config(init_from=str(folder)))
    assert experiment.model.rope_scaling.factor == 8.0
    as_json = json.loads(experiment.config.to_json_best_effort())
    again = parse([""], usage="", configs=find_configs(), saved=as_json).config
    again.init_from = None
    assert make_experiment(again).model.rope_scaling == experiment.model.rope_scaling


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--config.init_from=nothing"], "nothing is no folder"),
        (["--config.init_from={exported}", "--config.data.seq_len=17"], "at most 16"),
        (["--config.init_from={exported}", "--config.model.num_layers=1"], "its own sizes"),
    ],
)
def test_what_cannot_be_trained_on(exported, flags, message):
    flags = [flag.format(exported=exported) for flag in flags]
    with pytest.raises(UserError, match=message):
        make_experiment(parse(["", *flags], usage="", configs=find_configs()).config)


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [
        (export, [], "give --workdir=RUN and --to=FOLDER"),
        (export, ["--workdir={run}", "--to={run}"], "exists already"),
        (export, ["--workdir={exported}", "--to=new"], "is no run"),
        (export, ["--workdir={run}", "--to=new", "--step=5"], "no checkpoint of step 5; it has"),
        (export, ["--workdir={run}", "--too=new"], "did you mean --to?"),
        (evaluate, [], "give either --workdir=RUN or --model=FOLDER"),
        (evaluate, ["--workdir={exported}"], "is no run; for a Hugging Face folder give --model"),
        (evaluate, ["--model=none"], "none is no folder"),
        (evaluate, ["--model={exported}", "--config.data.seq_len=17"], "at most 16"),
        (evaluate, ["--workdir={run}", "--config=configs/sample.py"], "has its own config"),
        (evaluate, ["--workdir={run}", "--config.eval_tokns=1"], "did you mean"),
        (evaluate, ["--workdir={run}", "--json=none/x.json"], "there is no folder none"),
    ],
)
def test_bad_input_is_one_line(
    run, exported, tmp_path, monkeypatch, capsys, command, arguments, message
):
    monkeypatch.chdir(tmp_path)
    arguments = [argument.format(run=run, exported=exported) for argument in arguments]
    capsys.readouterr()
    assert command.main(["command", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", [export, evaluate])
def test_help_teaches(command, capsys):
    assert command.main(["command", "--help"]) == 0
    assert "python -m galore_jax." in capsys.readouterr().out
