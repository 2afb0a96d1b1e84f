"""Sharded params on 8 virtual devices (a 4 x 2 mesh): the same training, and a sharded state."""

import json
import pathlib

import pytest
from eight_devices import run_on_eight_devices

SCRIPT = pathlib.Path(__file__).parent / "sharded.py"
PROJECTOR_METHODS = ("svd", "eigh", "subspace_iteration", "randomized", "random")


@pytest.fixture(scope="module")
def seen():
    done = run_on_eight_devices(SCRIPT)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def outcome(seen, kind):
    assert "error" not in seen[kind], seen[kind].get("error")
    return seen[kind]


def unsharded(found, keys):
    """The arrays that have no mesh axis at all: replicated, or on one device."""
    return [
        f"{name}.{key}"
        for name, specs in found.items()
        for key in keys
        if key in specs and not any(specs[key] or ())
    ]


@pytest.mark.parametrize(
    "kind", [*(f"auto/{b}/eager" for b in PROJECTOR_METHODS), "auto/svd/jitted"]
)
def test_sharded_training_is_that_of_one_device(seen, kind):
    # Four updates with two refreshes. Sums over a sharded axis are taken in another order, which
    # moves a gradient's coordinates by some 1e-7 of them, and vectors by that over the gap between
    # singular values: 2e-6 was seen. A wrong shard would differ by the size of a step, 0.02 here.
    found = outcome(seen, kind)
    assert found["largest"] > 0.01
    assert found["gap"] < 2e-5


@pytest.mark.parametrize(
    "kind", [*(f"auto/{b}/eager" for b in PROJECTOR_METHODS), "auto/svd/jitted"]
)
def test_updates_stay_where_the_params_are(seen, kind):
    # Updates that came out replicated would cost a whole model's memory on every device.
    found = outcome(seen, kind)["last"]
    assert not unsharded(found, ["updates"])


def test_the_axis_that_is_kept_stays_sharded_without_further_ado(seen):
    # An operation in update that gathers (a reshape across a sharded axis) would break this one.
    found = outcome(seen, "auto/svd/eager")["last"]
    assert found["tall_fsdp_rows"]["mu"] == ["data", None]
    assert found["tall_tensor_rows"]["mu"] == ["model", None]
    assert found["wide_fsdp_columns"]["mu"] == [None, "data"]
    assert found["wide_tensor_columns"]["mu"] == [None, "model"]
    assert found["stack_fsdp"]["mu"] == ["data", None, None]


@pytest.mark.parametrize("when", ["first", "last"])
def test_moments_and_projectors_of_sharded_params_are_sharded(seen, when):
    # As Optax's zeros_like does: a state that starts on one device does not fit there, and moments
    # of a kernel sharded by the axis that is projected away are else replicated for good.
    found = outcome(seen, "auto/svd/eager")[when]
    assert not unsharded(found, ["mu", "nu", "projector"])
    specs = {name: of["mu"] for name, of in found.items()}
    assert specs["wide_both"] == ["data", "model"]
    assert specs["stack_both"] == [None, "data", "model"]
    assert specs["wide_fsdp_rows"] == ["data", None]


@pytest.mark.parametrize("init", ["eager", "jitted"])
def test_explicit_meshes_which_are_the_default_of_make_mesh(seen, init):
    found = outcome(seen, f"explicit/svd/{init}")
    assert found["gap"] < 2e-5
    assert not unsharded(found["first"], ["mu", "nu", "projector"])
    assert not unsharded(found["last"], ["mu", "nu", "projector", "updates"])


@pytest.mark.parametrize("mesh", ["auto", "explicit"])
def test_8_bit_codes_are_sharded_as_the_moments_they_stand_for(seen, mesh):
    # A gradient that differs by 1e-7 may round to the next code, one part in about 64 of a moment.
    found = outcome(seen, f"{mesh}/svd/8 bits")
    assert found["gap"] < 0.02 * found["largest"]
    assert not unsharded(found["first"], ["mu", "nu", "projector"])
    assert not unsharded(found["last"], ["mu", "nu", "projector", "updates"])
