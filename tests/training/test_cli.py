"""The command line: what it teaches, and one line for every mistake."""

import subprocess
import sys

import pytest
from tiny import ROOT

from galore_jax.errors import UserError
from galore_jax.training.cli import parse


def parse_flags(*flags):
    return parse(["train.py", *flags], usage="usage", configs=ROOT / "configs")


def test_default_is_the_sample():
    arguments = parse_flags()
    assert arguments.config.data.name == "sample"
    assert str(arguments.workdir) == "runs/sample-galore-adamw"


def test_overrides_and_argument():
    arguments = parse_flags(
        "--config=configs/llama.py:60m,method=full,optimizer=lion",
        "--config.schedule.peak_lr=3",
        "--config.optimizer.b1=0.5",
        "--workdir=there",
    )
    config = arguments.config
    assert (config.method, config.optimizer.name) == ("full", "lion")
    assert (config.schedule.peak_lr, config.optimizer.b1) == (3.0, 0.5)
    assert str(arguments.workdir) == "there"


def test_every_row_has_a_workdir_of_its_own():
    workdirs = {
        str(parse_flags(f"--config=configs/llama.py:{row}").workdir) for row in ("60m", "7b")
    }
    assert workdirs == {"runs/llama-60m-galore-adamw", "runs/llama-7b-galore-adamw"}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--config.foo=1"], "--config.foo is no config key"),
        (["--config.galore.rnk=3"], "did you mean --config.galore.rank"),
        (["--config.rank=3"], "did you mean --config.galore.rank"),
        (["--config.galore.rank=1.5"], "another type than the default, 128$"),
        (["--config.remat=maybe"], "another type than the default, False$"),
        (["--config.galore=3"], "--config.galore is a section"),
        (["--config=configs/nope.py"], "no such file; configs/ has glue.py, llama.py, reviews"),
        (["--config", "configs/nope.py"], "no such file; configs/ has glue.py, llama.py"),
        (
            ["--config=configs/llama_60m.py:method=full"],
            "is --config=configs/llama.py:60m,method=full now$",
        ),
        (["--config=configs/llama.py"], "no row ''; give one of 60m, 130m, .* after the colon"),
        (["--config=configs/llama.py:60M"], "no row '60M'; give one of 60m"),
        (["--config="], "no such file"),
        (["--config=configs"], "no such file"),
        (["--config=README.md"], "is not a config that loads: .*SyntaxError|README.md"),
        (["--config=configs/sample.py:method=ful"], "'method=ful' is unknown"),
        (["--workdirs=x"], "workdirs"),
        (["extra"], "unknown argument 'extra'"),
    ],
)
def test_mistakes(flags, message):
    with pytest.raises(UserError, match=message) as caught:
        parse_flags(*flags)
    assert "\n" not in str(caught.value)


def test_values_are_of_the_type_of_the_default():
    config = parse_flags(
        "--config.remat=true", "--config.tensorboard=0", "--config.train_steps", "7",
        "--config.galore.scale=1", "--config.galore.target_modules=('attn',)",
        "--config.optimizer.b1=0.5", "--config.optimizer.clip_norm=None",
        "--config.projected_gradients=False", "--config.optimizer.name=lion",
    ).config  # fmt: skip
    assert (config.remat, config.tensorboard, config.train_steps) == (True, False, 7)
    assert type(config.galore.scale) is float
    assert config.galore.target_modules == ("attn",)
    assert (config.optimizer.b1, config.optimizer.clip_norm) == (0.5, None)
    assert (config.projected_gradients, config.optimizer.name) == (False, "lion")


def test_configs_are_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert parse_flags("--config=configs/llama.py:1b,method=full").config.method == "full"
    assert parse_flags("--config", "configs/llama.py:1b").config.galore.rank == 512
    assert parse_flags("--workdir=~/there").workdir.is_absolute()


def test_help_teaches(capsys):
    assert parse_flags("--help") is None
    out = capsys.readouterr().out
    for part in (
        "usage",
        "--workdir=DIR",
        "configs/llama.py",
        "7b_24gb",
        "--config.galore.rank=128",
    ):
        assert part in out


def test_an_error_is_one_line_and_exit_code_2():
    done = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), "--config.galore.rank=0"],
        capture_output=True, text=True, check=False, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr == "error: config.galore.rank=0 must be at least 1\n"
