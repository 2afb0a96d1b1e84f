"""A run of seconds, and its export, for all tests of commands."""

import pytest
from tiny import tiny_config

from galore_jax import export
from galore_jax.training.loop import train


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("commands") / "run"
    train(tiny_config(), workdir)
    return workdir


@pytest.fixture(scope="session")
def exported(run):
    folder = run.parent / "exported"
    assert export.main(["export", f"--workdir={run}", f"--to={folder}"]) == 0
    return folder
