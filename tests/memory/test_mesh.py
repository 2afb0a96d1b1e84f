"""Counted bytes of one device of a mesh, against real arrays on 8 virtual devices."""

import json
import pathlib

import jax
import optax
import pytest
from eight_devices import run_on_eight_devices

from galore_jax.errors import UserError
from galore_jax.memory import __main__ as command
from galore_jax.memory.mesh import count_on_mesh, parse_mesh
from galore_jax.models.llama import count_params, init_params
from galore_jax.models.presets import PRESETS

SCRIPT = pathlib.Path(__file__).parent / "bytes_on_mesh.py"


@pytest.mark.slow
def test_counted_bytes_are_those_of_real_shards():
    done = run_on_eight_devices(SCRIPT)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert len(found) == 18
    for of in found:
        assert of["counted"] == of["real"], of["name"]
        scalars = {"count", "0/count", "inner_state/0/count", "inner_state/2/count"}
        assert all(name in scalars or name.endswith("/scales") for name in of["replicated"])


def test_an_axis_that_divides_nothing_is_named():
    params = {
        "odd": jax.ShapeDtypeStruct((7, 9), "float32"),
        "norm": jax.ShapeDtypeStruct((16,), "float32"),
    }
    report = count_on_mesh(params, optax.sgd(0.1, momentum=0.9), {"fsdp": 4, "tp": 2})
    assert {row.name: row.bytes for row in report.replicated} == {
        "odd": 4 * 63,
        "0/trace/odd": 4 * 63,
    }
    assert report.rows[0].bytes == 4 * (63 + 16 // 8)


def test_llama_70b():
    shapes = jax.eval_shape(
        lambda key: init_params(PRESETS["llama_70b"], key)[1], jax.random.key(0)
    )
    assert count_params(shapes) == 68_976_648_192  # as LLaMA-2-70B's checkpoints have
    report = count_on_mesh(shapes, optax.adamw(0.1), {"fsdp": 64}, "^blocks")
    assert report.rows[0].bytes * 64 == report.whole[0].bytes


@pytest.mark.parametrize("text", ["", "fsdp", "fsdp:0", "fsdp:8,fsdp:2", "fsdp:-1", "8", "a b:2"])
def test_meshes_that_are_none(text):
    with pytest.raises(UserError, match=r"must be axes with sizes, such as fsdp:8"):
        parse_mesh(text)


def test_the_command(capsys, tmp_path):
    file = tmp_path / "report.json"
    arguments = ["--config=configs/llama.py:60m", "--mesh=fsdp:8", f"--json={file}"]
    assert command.main(["memory", *arguments]) == 0
    printed = capsys.readouterr().out
    assert "fsdp:8" in printed
    assert "not split by all of the mesh" in printed
    report = json.loads(file.read_text())
    assert report["mesh"] == {"fsdp": 8}
    assert report["rows"][0]["bytes"] * 8 == report["whole"][0]["bytes"]


@pytest.mark.parametrize("flag", ["--compare", "--plot=x.png"])
def test_a_mesh_compiles_nothing(capsys, flag):
    arguments = ["--config=configs/llama.py:60m", "--mesh=fsdp:8", flag]
    assert command.main(["memory", *arguments]) == 2
    assert "leave out --compare and --plot" in capsys.readouterr().err
