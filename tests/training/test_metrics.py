"""metrics.jsonl reads back as written, and an interrupted run's equals an uninterrupted one's."""

import json
import math
import signal
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from galore_jax.errors import UserError
from galore_jax.training.metrics import MetricsLog, read_metrics, write_run_record


def train_line(step):
    loss = np.float32(1) / np.float32(step + 3)
    return {"step": step, "loss": loss, "learning_rate": np.float32(0.01), "tokens": step * 1024}


def run(workdir, first, last, resume_step=None, **options):
    with MetricsLog(workdir, resume_step=resume_step, **options) as metrics:
        for step in range(first, last + 1):
            metrics.write(train_line(step))
            if step % 5 == 0:
                metrics.write({"step": step, "eval_loss": 1 / step, "eval_tokens": 10_000_000})


def content(workdir):
    return (workdir / "metrics.jsonl").read_bytes()


@pytest.mark.parametrize("resume_step", [0, 4, 5, 12])
def test_interrupted_and_resumed_equals_uninterrupted(tmp_path, resume_step):
    """At the step resumed from, both its training line and its evaluation line must stay."""
    run(tmp_path / "whole", 1, 15)
    run(tmp_path / "cut", 1, 12)
    run(tmp_path / "cut", resume_step + 1, 15, resume_step=resume_step)
    assert content(tmp_path / "cut") == content(tmp_path / "whole")


@pytest.mark.parametrize(
    "tail", [b'{"step": 9, "lo', b"\x00\x00\x00", b'{"step": 9}', b"\xff\n", b"7\n"]
)
def test_line_cut_short_is_dropped(tmp_path, tail):
    run(tmp_path / "whole", 1, 12)
    run(tmp_path / "cut", 1, 8)
    with (tmp_path / "cut/metrics.jsonl").open("ab") as file:
        file.write(tail)
    run(tmp_path / "cut", 9, 12, resume_step=8)
    assert content(tmp_path / "cut") == content(tmp_path / "whole")


def test_resume_without_a_file_begins_one(tmp_path):
    """The run may have been killed after its first checkpoint and before its first line."""
    run(tmp_path, 3, 4, resume_step=2)
    assert [line["step"] for line in read_metrics(tmp_path)] == [3, 4]


def test_new_run_neither_adds_to_the_lines_there_nor_destroys_them(tmp_path):
    """A run killed before its first checkpoint begins anew, and must not be refused either."""
    run(tmp_path, 1, 3)
    before = content(tmp_path)
    run(tmp_path, 1, 2)
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2]
    assert (tmp_path / "metrics.jsonl.bak").read_bytes() == before


@pytest.mark.parametrize("value", [0.1, 1 / 3, 9.000001, 3e-45, 1.5e38, 2**-149, -0.0])
def test_float32_reads_back_bit_equal(tmp_path, value):
    for array in (np.float32(value), jnp.float32(value), np.array(value, np.float32)):
        workdir = tmp_path / type(array).__name__
        with MetricsLog(workdir, resume_step=None) as metrics:
            metrics.write({"step": 1, "loss": array})
        loss = read_metrics(workdir)[0]["loss"]
        assert np.float32(loss).tobytes() == np.asarray(array).tobytes()


def test_non_finite_numbers_are_strict_json(tmp_path):
    """A bare NaN is not JSON: jq, JavaScript and pandas would refuse the whole file."""
    line = {"step": 1, "loss": jnp.nan, "grad_norm": np.float32(np.inf), "low": -math.inf}

    def refuse(constant):
        raise AssertionError(constant)

    with MetricsLog(tmp_path, resume_step=None) as metrics:
        metrics.write(line)
    json.loads(content(tmp_path), parse_constant=refuse)
    [back] = read_metrics(tmp_path)
    assert math.isnan(back["loss"])
    assert back["grad_norm"] == math.inf
    assert back["low"] == -math.inf
    MetricsLog(tmp_path, resume_step=1).close()
    json.loads(content(tmp_path), parse_constant=refuse)


WRITE_FOREVER = """
import sys
from galore_jax.training.metrics import MetricsLog
metrics = MetricsLog(sys.argv[1], resume_step=None)
for step in range(10**9):
    metrics.write({"step": step, "loss": 1 / (step + 1)})
    if step % 100 == 0:
        print(step, flush=True)
"""


def test_sigkill_loses_no_line_already_written(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", WRITE_FOREVER, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    for _ in range(5):
        process.stdout.readline()
    process.send_signal(signal.SIGKILL)
    printed = [400, *map(int, process.communicate()[0].split())]
    steps = [line["step"] for line in read_metrics(tmp_path)]
    assert steps == list(range(len(steps)))
    assert len(steps) > printed[-1]


def test_tensorboard_has_the_scalars_and_purges_on_resume(tmp_path):
    event_pb2 = pytest.importorskip("tensorboardX.proto.event_pb2")
    run(tmp_path, 1, 3, tensorboard=True)
    run(tmp_path, 3, 4, resume_step=2, tensorboard=True)
    events = []
    for file in sorted(
        (tmp_path / "tensorboard").iterdir(), key=lambda path: path.stat().st_mtime_ns
    ):
        data = file.read_bytes()
        while data:
            size = int.from_bytes(data[:8], "little")
            events.append(event_pb2.Event.FromString(data[12 : 12 + size]))
            data = data[16 + size :]
    losses = [
        (event.step, value.simple_value)
        for event in events
        for value in event.summary.value
        if value.tag == "loss"
    ]
    assert [step for step, _ in losses] == [1, 2, 3, 3, 4]
    assert losses[0][1] == train_line(1)["loss"]
    assert [
        event.step for event in events if event.session_log.status == event.session_log.START
    ] == [0, 3]


def test_tensorboard_missing_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(UserError, match=r"galore-jax\[tensorboard\]"):
        MetricsLog(tmp_path, resume_step=None, tensorboard=True)


def test_run_record(tmp_path):
    config = {"galore": {"rank": 128}, "seed": 0, "model": "llama_60m"}
    write_run_record(tmp_path, config, first=True)
    versions = json.loads((tmp_path / "versions.json").read_text())
    (tmp_path / "versions.json").write_text("those that the run began with")
    write_run_record(tmp_path, {**config, "seed": 1}, first=False)
    assert json.loads((tmp_path / "config.json").read_text()) == {**config, "seed": 1}
    assert (tmp_path / "versions.json").read_text() == "those that the run began with"
    wanted = (
        "python jax jaxlib flax optax orbax-checkpoint grain numpy galore_jax device_kind platform"
    )
    assert set(wanted.split()) <= set(versions)
    assert versions["numpy"] == np.__version__
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "config.json",
        "versions.json",
    ]
