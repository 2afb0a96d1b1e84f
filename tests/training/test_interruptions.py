"""Runs in processes of their own, killed, interrupted and cut off from their terminal."""

import contextlib
import functools
import glob
import json
import os
import pty
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
from tiny import ROOT, tiny_config, tiny_flags

from galore_jax.errors import UserError
from galore_jax.training import loop
from galore_jax.training.metrics import MetricsLog, read_metrics

STEPS = 40


def start(workdir, *, cached=True, **overrides):
    """Starts ``train.py``; not cached: what the run compiles takes seconds."""
    environment = {
        **os.environ,
        "COLUMNS": "200",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    if not cached:
        environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    flags = tiny_flags(**{"train_steps": STEPS, **overrides})
    return subprocess.Popen(
        [sys.executable, "-u", str(ROOT / "train.py"), f"--workdir={workdir}", *flags],
        cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment,
    )  # fmt: skip


def read_until(process, prefix, count=1):
    """Reads the output up to the ``count``-th line that begins with ``prefix``."""
    lines = []
    for line in process.stdout:
        lines.append(line)
        count -= line.startswith(prefix)
        if count == 0:
            return
    raise AssertionError(f"no line {prefix!r}: {''.join(lines)}{process.stderr.read()}")


def wait_for_a_save(process, workdir):
    """Waits until a checkpoint is half-written."""
    read_until(process, "step ")
    while process.poll() is None:
        with contextlib.suppress(FileNotFoundError):
            if any("tmp" in name for name in os.listdir(workdir / "checkpoints")):
                return


def kill(process):
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL, "the run had ended before it was killed"


def record(workdir):
    """The metrics but for the speed, the checkpoints that are there, and all CRCs of the last."""
    lines = read_metrics(workdir)
    for line in lines:
        line.pop("tokens_per_second", None)
    kept = sorted(int(path.name) for path in (workdir / "checkpoints").iterdir())
    leaves = workdir / "checkpoints" / str(kept[-1]) / "leaves" / "data.json"
    return lines, kept, json.loads(leaves.read_text())["arrays"]


# What to wait for, how often, and at most how many seconds to go on.
BEFORE_THE_FIRST_STEP = [
    (None, 1, 1.0),
    (None, 1, 1.0),
    (None, 1, 3.0),
    ("model ", 1, 0.3),
    ("compiling", 1, 3.0),
    ("compiling", 1, 1.0),
    ("memory, counted", 1, 0.5),
    ("compiled in", 1, 0.1),
]
LATER = [
    ("step 0: eval", 1, 0.1),
    ("step ", 3, 0.05),
    ("save", 1, 0.0),
    ("step ", 12, 0.05),
    ("resuming", 1, 0.5),
    ("save", 1, 0.01),
    ("step ", 8, 0.05),
    (None, 1, 2.0),
    ("save", 1, 0.02),
    ("step ", 2, 0.05),
    ("save", 1, 0.0),
    (f"step {STEPS}/{STEPS}", 1, 0.0),
]


@pytest.mark.slow
def test_twenty_kills_and_resumes_end_as_an_uninterrupted_run(tmp_path):
    whole = start(tmp_path / "whole")
    assert whole.wait() == 0, whole.communicate()
    draw, cut = random.Random(0), tmp_path / "cut"
    moments = [*BEFORE_THE_FIRST_STEP, *LATER]
    assert len(moments) == 20
    for number, (prefix, count, most) in enumerate(moments):
        process = start(cut, cached=prefix != "compiling")
        if prefix == "save":
            wait_for_a_save(process, cut)
        elif prefix is not None:
            read_until(process, prefix, count)
        time.sleep(draw.uniform(0, most))
        kill(process)
        if number < len(BEFORE_THE_FIRST_STEP):
            assert not list(cut.glob("checkpoints/[0-9]*")), "killed too late to try this moment"
    last = start(cut)
    assert last.wait() == 0, last.communicate()
    assert "resuming from step" in last.stdout.read()
    assert record(cut) == record(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [0.0, 0.4])
def test_a_second_interrupt_while_compiling_ends_at_once(tmp_path, seconds):
    """An exception in the main thread would leave compiling threads to crash the exit."""
    process = start(tmp_path, cached=False)
    read_until(process, "compiling")
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    begun = time.monotonic()
    _, errors = process.communicate(timeout=60)
    assert time.monotonic() - begun < 5
    assert process.returncode == 130
    assert errors.splitlines() == [
        "stopping as soon as it can be saved; Ctrl-C again ends at once",
        "interrupted at once; run the same command again to go on",
    ]


ON_A_TERMINAL = """
import fcntl, os, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""


@pytest.mark.slow
def test_a_closed_terminal_saves(tmp_path):
    controller, terminal = pty.openpty()
    flags = tiny_flags(train_steps=100_000, checkpoint_every_steps=0)
    process = subprocess.Popen(
        [sys.executable, "-c", ON_A_TERMINAL, "train.py", f"--workdir={tmp_path}", *flags],
        stdin=terminal, stdout=terminal, stderr=terminal, cwd=ROOT, start_new_session=True,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "80"},
    )  # fmt: skip
    os.close(terminal)
    written = b""
    while b"  loss " not in written:
        written += os.read(controller, 4096)
    os.close(controller)
    assert process.wait(timeout=60) == 0
    last = read_metrics(tmp_path)[-1]["step"]
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == [str(last)]


@pytest.mark.slow
def test_sighup_saves_unless_it_is_ignored(tmp_path):
    """As it is under nohup."""
    process = start(tmp_path, train_steps=100_000, checkpoint_every_steps=0)
    read_until(process, "step ", 4)
    process.send_signal(signal.SIGHUP)
    out, errors = process.communicate()
    assert process.returncode == 0, errors
    assert "stopped by SIGHUP after step" in out


def test_the_key_of_noisy_sgd_is_saved(tmp_path):
    config = tiny_config("method=full,optimizer=noisy_sgd", train_steps=8)
    loop.train(config, tmp_path)
    whole = record(tmp_path)
    shutil.rmtree(tmp_path / "checkpoints" / "8")
    loop.train(config, tmp_path)
    assert record(tmp_path) == whole


@pytest.fixture(scope="module")
def complete(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("complete") / "run"
    loop.train(tiny_config(train_steps=8), workdir)
    return workdir


@pytest.fixture
def read_only_copy(complete, tmp_path):
    """A file system with a run, and the function that makes it read-only."""
    command = ["mount", "-t", "tmpfs", "-o", "size=40m", "tmpfs", str(tmp_path)]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("needs the right to mount a file system")
    shutil.copytree(complete, tmp_path / "run")
    yield (
        tmp_path / "run",
        lambda: subprocess.run(["mount", "-o", "remount,ro", str(tmp_path)], check=True),
    )
    subprocess.run(["umount", "-l", str(tmp_path)], check=True)


def test_a_complete_run_is_read_from_a_read_only_folder(read_only_copy, capsys):
    workdir, make_read_only = read_only_copy
    make_read_only()
    loop.train(tiny_config(train_steps=8), workdir)
    assert "this run is complete: step 8 of 8" in capsys.readouterr().out


def test_a_read_only_folder_is_refused_before_compiling(read_only_copy, capsys):
    workdir, make_read_only = read_only_copy
    shutil.rmtree(workdir / "checkpoints" / "8")
    make_read_only()
    with pytest.raises(UserError, match=r"cannot write to .*: it is read-only"):
        loop.train(tiny_config(train_steps=8), workdir)
    assert "compiling" not in capsys.readouterr().out


def test_a_folder_in_the_place_of_the_metrics_is_one_line(complete, tmp_path):
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(UserError, match=r"cannot write .*metrics\.jsonl: Is a directory"):
        MetricsLog(tmp_path, resume_step=4)
    workdir = tmp_path / "run"
    shutil.copytree(complete, workdir)
    shutil.rmtree(workdir / "checkpoints" / "8")
    (workdir / "metrics.jsonl").unlink()
    (workdir / "metrics.jsonl").mkdir()
    with pytest.raises(UserError, match=r"metrics\.jsonl is a folder"):
        loop.train(tiny_config(train_steps=8), workdir)


def test_a_folder_without_a_checkpoint_or_metrics_is_fresh(tmp_path):
    (tmp_path / "checkpoints" / "4.orbax-checkpoint-tmp").mkdir(parents=True)
    loop.train(tiny_config(train_steps=3), tmp_path)
    assert read_metrics(tmp_path)[-1]["step"] == 3


PLUGIN = """
import os
def initialize():
    os.write(2, b"Unable to load CUDA\\n")
"""


@pytest.mark.skipif(bool(glob.glob("/dev/nvidia*")), reason="there is a GPU")
@pytest.mark.parametrize("command", [["train.py", "--help"], ["-m", "galore_jax.memory", "--help"]])
@pytest.mark.parametrize("platforms", ["", "cpu"])
def test_cuda_without_a_gpu_is_passed_over_in_silence(tmp_path, command, platforms):
    """The plugin here stands for the one of the extra ``gpu-target``, which prints 30 lines."""
    for name in ("jax_plugins/xla_test_cuda", "jax_cuda12_plugin"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "__init__.py").write_text(PLUGIN)
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    environment = {**os.environ, "PYTHONPATH": path, "JAX_PLATFORMS": platforms}
    run = functools.partial(
        subprocess.run, cwd=ROOT, capture_output=True, text=True, env=environment
    )
    loud = run([sys.executable, "-c", "import jax; jax.devices()"])
    assert "Unable to load CUDA" in loud.stderr
    done = run([sys.executable, *command])
    assert (done.returncode, done.stderr) == (0, "")


def test_importing_the_library_leaves_the_process_alone():
    code = (
        "import os, sys; before = dict(os.environ), os.fstat(2), sys.unraisablehook;"
        "import galore_jax; assert before == (dict(os.environ), os.fstat(2), sys.unraisablehook)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
