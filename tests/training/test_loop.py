"""Whole runs on the sample: what they write, resume, refuse and survive."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import pytest
from tiny import ROOT, tiny_config, tiny_flags

from galore_jax.data.batches import TextData
from galore_jax.errors import UserError
from galore_jax.training import experiment, loop
from galore_jax.training.language_modelling import LanguageModelling
from galore_jax.training.metrics import read_metrics
from galore_jax.training.workdir import claim


def numbers(workdir):
    """The metrics but for the speed, which no two runs share."""
    return [
        {key: value for key, value in line.items() if key != "tokens_per_second"}
        for line in read_metrics(workdir)
    ]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "uninterrupted"
    loop.train(tiny_config(), workdir)
    return workdir


def test_what_a_run_writes(uninterrupted):
    lines = read_metrics(uninterrupted)
    training = [line for line in lines if "loss" in line]
    evaluation = [line for line in lines if "eval_loss" in line]
    ends = ["tokens", "tokens_per_second"]
    for line in training:
        norms = ["grad_norm"] if line["step"] % 3 == 1 else []  # full gradients: new bases
        norms.append("projected_grad_norm")
        assert list(line) == ["step", "loss", "learning_rate", *norms, *ends]
    assert [line["step"] for line in training] == list(range(1, 13))
    assert [line["tokens"] for line in training] == [4 * 16 * step for step in range(1, 13)]
    assert [line["step"] for line in evaluation] == [0, 6, 12]
    assert all(
        list(line) == ["step", "eval_loss", "eval_perplexity", "eval_tokens"]
        and line["eval_tokens"] >= 200
        for line in evaluation
    )
    assert evaluation[0]["eval_loss"] == pytest.approx(9.01, abs=0.05)  # ln(8192)
    config = json.loads((uninterrupted / "config.json").read_text())
    assert config["galore"]["rank"] == 4
    assert json.loads((uninterrupted / "versions.json").read_text())["jax"]
    kept = sorted(int(p.name) for p in (uninterrupted / "checkpoints").iterdir())
    assert kept == [8, 12]


def test_same_seed_same_losses_other_seed_others(uninterrupted, tmp_path):
    loop.train(tiny_config(train_steps=12), tmp_path / "again")
    assert numbers(tmp_path / "again") == numbers(uninterrupted)
    loop.train(tiny_config(seed=1, train_steps=3), tmp_path / "other")
    assert numbers(tmp_path / "other")[1]["loss"] != numbers(uninterrupted)[1]["loss"]


def test_a_complete_run_says_so_and_changes_nothing(uninterrupted, capsys):
    before = contents(uninterrupted)
    loop.train(tiny_config(), uninterrupted)
    out = capsys.readouterr().out
    assert "this run is complete: step 12 of 12" in out
    assert f"to start afresh remove {uninterrupted}" in out
    assert contents(uninterrupted) == before


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_another_config_is_refused_and_nothing_changed(uninterrupted):
    before = contents(uninterrupted)
    with pytest.raises(UserError, match=r"galore\.rank is 4 there and 5 here") as caught:
        loop.train(tiny_config(galore__rank=5), uninterrupted)
    assert "\n" not in str(caught.value)
    assert contents(uninterrupted) == before


def test_output_is_memory_progress_and_a_summary(tmp_path, capsys):
    loop.train(tiny_config(), tmp_path)
    out = capsys.readouterr().out
    for row in ("weights", "gradients", "projectors", "first moments", "second moments"):
        assert re.search(rf"^{row} +[\d.]+ +[\d.]+$", out, re.M), row
    assert re.search(r"compiled for cpu: peak [\d.]+ MiB = arguments", out)
    assert re.search(r"^step +7/12 +loss [\d.]+ +lr \S+ +\S+ tokens/s +ETA ", out, re.M)
    assert re.search(
        r"^done: train loss [\d.]+, eval loss [\d.]+, perplexity [\d.]+, \d+ tokens in "
        rf"\d:\d\d:\d\d, checkpoint in {tmp_path}/checkpoints$",
        out,
        re.M,
    )


def run_process(workdir, **overrides):
    command = [sys.executable, str(ROOT / "train.py"), f"--workdir={workdir}"]
    return subprocess.Popen(
        [*command, *tiny_flags(**overrides)],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, "COLUMNS": "200"},
    )


def wait_for_step(process, workdir, step):
    while process.poll() is None:
        # A run that starts over, killed before its first checkpoint, removes the file of the last.
        with contextlib.suppress(FileNotFoundError):
            lines = read_metrics(workdir)
            if lines and lines[-1]["step"] >= step:
                return
        time.sleep(0.005)
    raise AssertionError(f"ended before step {step}: {process.communicate()[0]}")


@pytest.mark.slow
@pytest.mark.parametrize("packing", [True, False])
def test_killed_at_any_moment_resumes_bit_for_bit(tmp_path, packing):
    whole = run_process(tmp_path / "whole", train_steps=40, data__packing=packing)
    assert whole.wait() == 0, whole.communicate()[0]
    cut = tmp_path / "cut"
    # Before the first checkpoint; between two; just after a later one, while it may be written.
    for step in (2, 15, 29):
        process = run_process(cut, train_steps=40, data__packing=packing)
        wait_for_step(process, cut, step)
        process.send_signal(signal.SIGKILL)
        process.wait()
    last = run_process(cut, train_steps=40, data__packing=packing)
    out = last.communicate()[0]
    assert last.returncode == 0, out
    assert re.search(r"resuming from step \d+ of 40", out)
    assert numbers(cut) == numbers(tmp_path / "whole")


STOCHASTIC = {"param_dtype": "bfloat16", "param_rounding": "stochastic"}


@pytest.mark.parametrize(
    ("arg", "overrides"),
    [
        ("", {"projected_gradients": False}),
        ("", {"updates": "layerwise"}),
        ("", {"updates": "layerwise", "remat": True, **STOCHASTIC}),
        ("optimizer=adamw8bit", {"updates": "layerwise", "galore__projector_bits": 4}),
        ("method=full,optimizer=adafactor", {"updates": "layerwise"}),
        ("method=lora,optimizer=adamw8bit", {"lora__rank": 4, "lora__dropout": 0.5}),
        pytest.param(
            "method=relora",
            {"lora__rank": 4, "relora__merge_every_steps": 9},
            marks=pytest.mark.slow,
        ),
        ("method=low_rank", {"lora__rank": 4}),
    ],
)
def test_every_mode_resumes_bit_for_bit(arg, overrides, tmp_path):
    # The update after the checkpoint of step 8 keeps the bases of the update before it.
    config = tiny_config(arg, train_steps=10, **overrides)
    loop.train(config, tmp_path)
    uninterrupted, newest = numbers(tmp_path), tmp_path / "checkpoints" / "10"
    weights_and_state = leaf_sums(newest)
    shutil.rmtree(newest)
    loop.train(config, tmp_path)
    assert numbers(tmp_path) == uninterrupted
    assert leaf_sums(newest) == weights_and_state


def leaf_sums(checkpoint):
    """The CRC-32s that a checkpoint has of each of its arrays."""
    arrays = json.loads((checkpoint / "leaves" / "data.json").read_text())["arrays"]
    return {name: of["crc32"] for name, of in arrays.items()}


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_ends_cleanly(tmp_path, number):
    process = run_process(tmp_path, train_steps=100_000, checkpoint_every_steps=0)
    wait_for_step(process, tmp_path, 3)
    process.send_signal(number)
    out = process.communicate()[0]
    assert process.returncode == 0, out
    stopped = re.search(rf"stopped by {number.name} after step (\d+) of 100000, saved in", out)
    assert stopped, out
    assert "Traceback" not in out
    assert (tmp_path / "checkpoints" / stopped[1]).is_dir()
    assert read_metrics(tmp_path)[-1]["step"] == int(stopped[1])


def test_a_damaged_newest_checkpoint_falls_back(uninterrupted, tmp_path, capsys):
    config = tiny_config(train_steps=20)
    loop.train(config, tmp_path)
    newest = tmp_path / "checkpoints" / "20"
    for path in newest.rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    before = numbers(tmp_path)
    loop.train(config, tmp_path)
    out = capsys.readouterr().out
    assert "the checkpoint of step 20 is damaged" in out
    assert "resuming from step 16 of 20" in out
    assert numbers(tmp_path) == before


def poisoned(monkeypatch, poison):
    """Makes the training step pass its results through ``poison(state, metrics)``."""
    make = experiment.make_train_step

    def make_poisoned(*args, **kwargs):
        step = make(*args, **kwargs)
        return lambda state, batch: poison(*step(state, batch))

    monkeypatch.setattr(experiment, "make_train_step", make_poisoned)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, monkeypatch):
    def poison(state, metrics):  # at a step where a checkpoint is due
        return state, {**metrics, "loss": metrics["loss"] + jnp.where(state.step == 8, jnp.nan, 0)}

    poisoned(monkeypatch, poison)
    with pytest.raises(UserError, match=r"loss nan .* at step 8: .*checkpoint of step 4 is"):
        loop.train(tiny_config(), tmp_path)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["4"]


def test_weights_that_are_not_finite_are_never_saved(tmp_path, monkeypatch):
    def poison(state, metrics):  # the loss of step 4 is that of the weights before it
        bad = jnp.where(state.step == 4, jnp.inf, 0.0)
        return state._replace(params=jax.tree.map(lambda w: w + bad, state.params)), metrics

    poisoned(monkeypatch, poison)
    with pytest.raises(UserError, match=r"not finite at step 4: stopped"):
        loop.train(tiny_config(), tmp_path)
    assert not list((tmp_path / "checkpoints").iterdir())


def test_a_loss_whose_perplexity_overflows_is_told(tmp_path):
    loop.train(tiny_config(train_steps=3, schedule__peak_lr=1e4), tmp_path)
    last = read_metrics(tmp_path)[-1]
    assert last["eval_loss"] > 710
    assert last["eval_perplexity"] == float("inf")


def test_a_run_may_be_cut_to_a_few_steps(tmp_path):
    loop.train(tiny_config(train_steps=3, schedule__warmup_steps=None), tmp_path)
    assert numbers(tmp_path)[-1]["step"] == 3


def test_other_data_is_refused_on_resume(tmp_path):
    loop.train(tiny_config(train_steps=3), tmp_path)
    checkpoints = tmp_path / "checkpoints"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LanguageModelling, "open_data", other_source)
        with pytest.raises(UserError, match=r"was trained on sample: .* and the data now is other"):
            loop.train(tiny_config(train_steps=3), tmp_path)
    assert [path.name for path in checkpoints.iterdir()] == ["3"]


def other_source(task):
    data = TextData(task.data, vocab_size=8192)
    data.source = "other"
    return data


def test_a_stop_during_an_evaluation_leaves_it_for_later(uninterrupted, tmp_path, monkeypatch):
    evaluate = TextData.eval_batches

    @contextlib.contextmanager
    def interrupted(self, *, batch_size):
        calls.append(batch_size)
        with evaluate(self, batch_size=batch_size) as batches:
            yield interrupting(batches) if len(calls) == 2 else batches  # that of step 6

    def interrupting(batches):
        for batch in batches:
            signal.raise_signal(signal.SIGTERM)
            yield batch

    calls = []
    with monkeypatch.context() as patch:
        patch.setattr(TextData, "eval_batches", interrupted)
        loop.train(tiny_config(), tmp_path)
    assert numbers(tmp_path)[-1]["step"] == 6
    assert "eval_loss" not in numbers(tmp_path)[-1]
    loop.train(tiny_config(), tmp_path)
    assert numbers(tmp_path) == numbers(uninterrupted)


def test_a_signal_before_the_first_step(tmp_path, monkeypatch, capsys):
    make = experiment.make_train_step

    def slow_to_compile(*args, **kwargs):
        signal.raise_signal(signal.SIGTERM)
        return make(*args, **kwargs)

    monkeypatch.setattr(experiment, "make_train_step", slow_to_compile)
    loop.train(tiny_config(), tmp_path)
    assert "stopped by SIGTERM before the first step" in capsys.readouterr().out
    assert not (tmp_path / "config.json").exists()


@pytest.mark.slow
def test_a_closed_pipe_is_no_traceback(tmp_path):
    command = f"{sys.executable} train.py --workdir={tmp_path} {' '.join(tiny_flags())} | head -1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.startswith("model ")
    assert "Traceback" not in done.stderr


def test_a_folder_whose_config_is_not_one(tmp_path):
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(UserError, match="no config of a run"):
        loop.train(tiny_config(), tmp_path)


def test_a_checkpoint_that_does_not_fit_is_refused(tmp_path):
    loop.train(tiny_config(train_steps=3), tmp_path)
    wider = tiny_config(train_steps=3, model__intermediate_size=32)
    (tmp_path / "config.json").write_text(wider.to_json_best_effort())
    with pytest.raises(UserError, match=r"does not fit the model: .*float32\[2,24,16\]"):
        loop.train(wider, tmp_path)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"data__name": "c4"}, r"config\.data\.data_dir is not set"),
        ({"data__name": "c4", "data__data_dir": "/nowhere"}, "no C4 in /nowhere: looked for"),
        ({"data__tokenizer": "/nowhere.model"}, "tokenizer /nowhere.model: there is no such file"),
        ({"model__vocab_size": 8000}, "tokenizer has 8192 ids and the model a vocabulary of 8000"),
        ({"model__num_heads": 3}, "hidden_size 16 is not a multiple of num_heads 3"),
        ({"galore__target_modules": ("attn_norm",)}, "matches no leaf"),
        ({"dtype": "float31"}, "dtype='float31' must be"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(overrides, message, tmp_path):
    workdir = tmp_path / "run"
    with pytest.raises(UserError, match=message) as caught:
        loop.train(tiny_config(**overrides), workdir)
    assert "\n" not in str(caught.value)
    assert not workdir.exists()


def test_a_folder_in_use_is_refused(tmp_path):
    with (
        claim(tmp_path, tiny_config()),
        pytest.raises(UserError, match="in use by another process"),
        claim(tmp_path, tiny_config()),
    ):
        pass
