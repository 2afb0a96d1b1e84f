"""Whole fine-tuning runs on small tasks: what they learn, write, resume and refuse."""

import json
import re
import shutil
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from configs import glue
from galore_jax.errors import UserError
from galore_jax.models.encoder_huggingface import load, save
from galore_jax.training import loop
from galore_jax.training.experiment import make_experiment
from galore_jax.training.metrics import read_metrics
from galore_jax.training.optimizer import make_schedule
from galore_jax.training.saved_run import open_run

sys.path.insert(0, str(Path(__file__).parents[1] / "data"))
from small_glue import write_glue, write_tokenizer

SMALL = {
    "train_epochs": 2.0,
    "eval_every_epochs": 1.0,
    "batch_size": 4,
    "micro_batch_size": 4,
    "checkpoint_every_steps": 6,
    "keep_checkpoints": 5,
    "log_every_steps": 1,
    "encoder.kind": "bert",
    "encoder.pad_id": 0,
    "encoder.vocab_size": 60,
    "encoder.hidden_size": 16,
    "encoder.intermediate_size": 24,
    "encoder.num_layers": 2,
    "encoder.num_heads": 2,
    "encoder.position_rows": 40,
    "encoder.type_vocab_size": 2,
    "data.seq_len": 24,
    "schedule.peak_lr": 1e-3,
    "galore.update_proj_gap": 5,
}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("glue")
    for task in ("cola", "stsb", "mnli"):
        write_glue(folder, task)
    write_tokenizer(folder)
    return folder


def small(data_dir, arg, **changes):
    config = glue.get_config(arg)
    config.update_from_flattened_dict(SMALL)
    config.data.data_dir = config.data.tokenizer = str(data_dir)
    config.update_from_flattened_dict({k.replace("__", "."): v for k, v in changes.items()})
    return config


def numbers(workdir):
    return [
        {key: value for key, value in line.items() if key != "tokens_per_second"}
        for line in read_metrics(workdir)
    ]


@pytest.mark.parametrize(
    "arg",
    [
        "cola,method=galore,rank=4",
        pytest.param("stsb,method=lora,rank=2", marks=pytest.mark.slow),
        pytest.param("mnli,method=full", marks=pytest.mark.slow),
    ],
)
def test_a_run_resumes_to_the_bit_dropout_and_best_checkpoint_included(data_dir, tmp_path, arg):
    config = small(data_dir, arg)
    loop.train(config, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    for step in (12, 16):  # as if it had been killed after step 6
        shutil.rmtree(tmp_path / "cut" / "checkpoints" / str(step))
    shutil.rmtree(tmp_path / "cut" / "best")
    loop.train(config, tmp_path / "cut")
    assert numbers(tmp_path / "cut") == numbers(tmp_path / "whole")
    whole, cut = (open_run(tmp_path / name, 16).params for name in ("whole", "cut"))
    jax.tree.map(np.testing.assert_array_equal, whole, cut)


def test_what_a_run_writes(data_dir, tmp_path, capsys):
    loop.train(small(data_dir, "mnli"), tmp_path)
    lines = read_metrics(tmp_path)
    held_out = [line for line in lines if "eval_loss" in line]
    assert [line["step"] for line in held_out] == [0, 8, 16]
    scores = ["eval_accuracy_matched", "eval_accuracy_mismatched"]
    assert all(list(x) == ["step", "eval_loss", *scores, "eval_examples"] for x in held_out)
    assert all(line["eval_examples"] == 22 for line in held_out)
    rates = [line["learning_rate"] for line in lines if "loss" in line]
    np.testing.assert_allclose(rates, 1e-3 * (1 - np.arange(16) / 16), rtol=1e-6)
    best = max(held_out, key=lambda line: line[scores[0]])  # the first of the best
    assert [path.name for path in (tmp_path / "best").iterdir()] == [str(best["step"])]
    assert open_run(tmp_path).step == best["step"]
    out = capsys.readouterr().out
    assert re.search(r"^done: train loss .*; best at step \d+: .*accuracy matched", out, re.M)
    assert json.loads((tmp_path / "config.json").read_text())["train_steps"] == 16


def test_it_learns_what_is_there_to_be_learned(tmp_path):
    rows = [(f"it is {word} {i}", int(word == "good")) for i in range(15) for word in GOOD_BAD]
    write_glue(tmp_path, "sst2", splits={"train": rows, "validation": rows[:20]})
    write_tokenizer(tmp_path)
    config = small(tmp_path, "sst2", train_epochs=15.0, schedule__peak_lr=3e-3)
    loop.train(config, tmp_path / "run")
    last = [line for line in read_metrics(tmp_path / "run") if "eval_loss" in line][-1]
    assert last["eval_accuracy"] == 1.0


GOOD_BAD = ("good", "bad")


def test_lora_trains_its_parts_and_the_head_alone(data_dir, tmp_path):
    config = small(data_dir, "cola,method=lora,rank=2")
    first = make_experiment(config).first_state().params
    loop.train(config, tmp_path)
    last = open_run(tmp_path, 16).params
    same = np.array_equal(
        last["embed"]["word"]["embedding"], first["embed"]["word"]["embedding"].array
    )
    assert same
    assert not np.array_equal(last["head"]["out"]["kernel"], first["head"]["out"]["kernel"])
    kernel = first["blocks"]["attn"]["q_proj"]["kernel"].kernel
    assert not np.array_equal(last["blocks"]["attn"]["q_proj"]["kernel"], kernel)


def test_an_encoder_goes_on_from_a_folder_and_is_exported_to_one(data_dir, tmp_path):
    config = small(data_dir, "cola")
    loop.train(config, tmp_path / "run")
    run = open_run(tmp_path / "run")
    save(tmp_path / "exported", run.model, run.params, run.tokenizer)
    loaded = load(tmp_path / "exported")
    assert loaded.config.labels == ("unacceptable", "acceptable")
    jax.tree.map(np.testing.assert_array_equal, loaded.params, run.params)
    again = small(data_dir, "cola", init_from=str(tmp_path / "exported"), data__tokenizer=None)
    experiment = make_experiment(again)
    jax.tree.map(np.testing.assert_array_equal, experiment.first_state().params, run.params)
    assert experiment.task.open_data().tokenizer.vocab_size < 60


def test_the_last_batch_of_an_epoch_counts_its_examples_alone(data_dir):
    experiment = make_experiment(small(data_dir, "cola"))
    task, data = experiment.task, experiment.task.open_data()
    with data.train_batches(batch_size=4, seed=0) as batches:
        sizes = [int(task.count(next(batches))) for _ in range(8)]
    assert sorted(sizes) == [2, 4, 4, 4, 4, 4, 4, 4]


def test_a_line_of_the_rate_falls_to_its_end():
    config = glue.get_config("cola")
    config.train_steps, config.schedule.warmup_steps = 100, 20
    rate = make_schedule(config)
    peak = config.schedule.peak_lr
    np.testing.assert_allclose(
        [rate(10), rate(20), rate(60), rate(100)], [peak / 2, peak, peak / 2, 0]
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "colla"}, "config.task='colla' must be .*; did you mean cola?"),
        ({"data__name": "c4"}, "must be glue or reviews with config.task='cola'"),
        ({"updates": "layerwise"}, "config.updates='layerwise' is for LLaMA"),
        ({"encoder__hidden_dropout": 1.0}, "hidden_dropout is 1.0"),
        ({"train_epochs": 0.0}, "config.train_epochs=0.0 must be greater than 0"),
        ({"data__data_dir": "/none"}, "config.data.data_dir=/none is no folder"),
    ],
)
def test_what_does_not_go_together_is_refused_in_a_line(data_dir, tmp_path, changes, message):
    with pytest.raises(UserError, match=message) as error:
        loop.train(small(data_dir, "cola", **changes), tmp_path / "run")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()
