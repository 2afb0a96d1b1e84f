"""A run with 8-bit moments, a 4-bit projector and stochastically rounded bfloat16 weights."""

import shutil

import pytest
from tiny import tiny_config

from galore_jax.training import loop
from galore_jax.training.metrics import read_metrics


def losses(workdir):
    return {line["step"]: line.get("loss", line.get("eval_loss")) for line in read_metrics(workdir)}


def config():
    # The embedding and the head are large enough for 8 bits, the rest is made so by the projector.
    return tiny_config(
        "optimizer=adamw8bit",
        param_dtype="bfloat16",
        param_rounding="stochastic",
        galore__projector_bits=4,
    )


@pytest.mark.slow
def test_a_run_resumed_from_a_checkpoint_is_the_same_bit_for_bit(tmp_path, capsys):
    # Codes, scales and int4 bases on disk; the dither and the rounding follow the step alone.
    loop.train(config(), tmp_path / "run")
    assert "second moments, codes" in capsys.readouterr().out
    whole = losses(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "12")
    loop.train(config(), tmp_path / "run")
    assert "resuming from step 8" in capsys.readouterr().out
    assert losses(tmp_path / "run") == whole
