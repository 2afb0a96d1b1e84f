"""Steps with int8 weights, compiled for cards that are not here: the figures of docs/int8.md."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest
from tiny import ROOT

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("jax_plugins") is None, reason="needs the extra gpu-target"
)
ONE = ["--config.batch_size=1", "--config.micro_batch_size=1"]
SMALL = [
    *("--config.updates=layerwise", "--config.param_dtype=int8"),
    *("--config.galore.projector_bits=4", *ONE),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "row", "flags", "most"),
    [  # Q-GaLore measures 15.26e9 for 7B
        ("rtx4090", "7b_16gb", ONE, 12.4e9),
        ("rtx3060", "7b_16gb", ONE, 12.4e9),
        ("rtx3060", "7b_12gb", [], 12.6e9),
        ("rtx4090", "13b_24gb", ONE, 23.2e9),
        ("rtx4090", "1b,optimizer=adamw8bit", SMALL, 2.7e9),
    ],
)
def test_int8_weights_fit(target, row, flags, most, tmp_path):
    command = [
        *(sys.executable, "-m", "galore_jax.memory", f"--target={target}"),
        *(f"--config=configs/llama.py:{row}", f"--json={tmp_path}/m.json", *flags),
    ]
    # In a process of its own: what XLA is told there is for the whole process.
    subprocess.run(command, cwd=ROOT, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    report = json.loads((tmp_path / "m.json").read_text())["reports"][0]
    assert report["fits"] is True
    assert report["peak"] <= most
    counted = sum(row["bytes"] for row in report["rows"] if row["source"] == "counted")
    gradients = next(row["bytes"] for row in report["rows"] if row["name"] == "gradients")
    for plan in report["plans"].values():
        assert plan["arguments"] == pytest.approx(counted - gradients, rel=1e-3)
