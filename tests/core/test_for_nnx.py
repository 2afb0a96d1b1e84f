"""``nnx.Optimizer`` with ``for_nnx``, on one device and on 8 virtual ones (a 4 x 2 mesh)."""

import json
import math
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from eight_devices import run_on_eight_devices
from flax import nnx

import galore_jax

SCRIPT = pathlib.Path(__file__).parent / "nnx_on_mesh.py"
MESHES = ("Auto", "Explicit")
KINDS = ("Auto/adamw", "Auto/8 bits", "Auto/accumulated", "Explicit/adamw", "Explicit/8 bits")
# Scalars, and scales of which there is one.
UNSHARDED = {
    "adamw": {"step", "opt_state/count", "opt_state/inner_state/0/count"},
    "accumulated": {
        "step",
        "opt_state/mini_step",
        "opt_state/gradient_step",
        "opt_state/inner_opt_state/count",
        "opt_state/inner_opt_state/inner_state/0/count",
    },
    "8 bits": {
        "step",
        "opt_state/count",
        "opt_state/inner_state/0/count",
        "opt_state/inner_state/0/mu/norm/scale/scales",
        "opt_state/inner_state/0/nu/norm/scale/scales",
        "opt_state/projector/q_proj/w/scales",
        "opt_state/projector/o_proj/w/scales",
        "opt_state/projector/up/kernel/scales",
        "opt_state/projector/blocks/kernel/scales",
    },
}


@pytest.fixture(scope="module")
def seen():
    done = run_on_eight_devices(SCRIPT)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def outcome(seen, kind):
    assert "error" not in seen[kind], seen[kind]["error"]
    return seen[kind]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_training_on_a_mesh_is_that_of_one_device(seen, kind):
    # In float64, where no code of 8 or 4 bits is so near an edge that the order of a sum moves it.
    assert outcome(seen, kind)["gap"] < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_the_state_is_sharded_and_stays_so(seen, kind):
    found = outcome(seen, kind)
    assert found["first"] == found["last"]
    assert {name for name, axes in found["last"].items() if not any(axes)} == UNSHARDED[
        kind.split("/")[1]
    ]


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES)
def test_each_array_has_a_spec_of_its_own(seen, mesh):
    # q_proj (D, N, H) = (fsdp, tp, -) is a matrix D x NH, o_proj (N, H, D) = (tp, -, fsdp) NH x D.
    of = outcome(seen, f"{mesh}/adamw")["last"]
    adam = "opt_state/inner_state/0/mu"
    assert of[f"{adam}/q_proj/w"] == ["fsdp", "tp"]
    assert of[f"{adam}/o_proj/w"] == ["tp", "fsdp"]
    assert of["opt_state/projector/q_proj/w"] == ["fsdp", "tp"]
    assert of["opt_state/projector/o_proj/w"] == ["fsdp", "tp"]  # the smaller side: D
    assert of[f"{adam}/blocks/kernel"] == [None, "fsdp", "tp"]
    assert of[f"{adam}/layers/kernel"] == ["fsdp", None, "tp"]


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES)
def test_an_optimizer_made_under_jit_is_sharded_too(seen, mesh):
    # There arrays on automatic meshes show no sharding: their variables' metadata does.
    found = outcome(seen, f"{mesh}/in jit")
    assert found["first"] == outcome(seen, f"{mesh}/adamw")["first"]
    assert found["said"] == found["first"]


@pytest.mark.slow
@pytest.mark.parametrize("step", ["gathered", "gathered at a refresh"])
def test_no_stack_of_moments_is_gathered(seen, step):
    shapes = outcome(seen, step)
    assert shapes  # low-rank updates of a stack are, along one of two mesh axes
    for whole in ([5, 8, 32], [4, 8, 32]):
        assert sorted(whole) not in [sorted(shape) for shape in shapes]
    if step == "gathered":
        assert max(map(math.prod, shapes)) < 4 * 8 * 32


class Two(nnx.Module):
    def __init__(self):
        self.kernel = nnx.Param(jnp.arange(64.0).reshape(8, 8) / 64)
        self.attention = nnx.Param(jnp.cos(jnp.arange(128.0)).reshape(8, 4, 4))


def test_on_one_device_it_changes_nothing():
    numbers = galore_jax.dimension_numbers
    tx = galore_jax.galore_adamw(0.1, rank=2, weight_dimension_numbers=numbers)
    seen = []
    for one in (tx, galore_jax.for_nnx(tx)):
        model = Two()
        optimizer = nnx.Optimizer(model, one, wrt=nnx.Param)
        for _ in range(2):
            gradients = jax.tree.map(jnp.sin, nnx.state(model, nnx.Param))
            optimizer.update(model, gradients)
        seen.append([*jax.tree.leaves(nnx.state(model)), *jax.tree.leaves(nnx.state(optimizer))])
    assert all(np.array_equal(a, b) for a, b in zip(*seen, strict=True))


def test_extra_arguments_reach_the_optimizer():
    model = Two()
    tx = galore_jax.for_nnx(galore_jax.galore(optax.sgd(0.1), rank=2))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    gradients = nnx.state(model, nnx.Param)
    with pytest.raises(ValueError, match="first update"):
        optimizer.update(model, gradients, refresh=False)


def test_only_transformations():
    with pytest.raises(TypeError, match=r"must be an optax\.GradientTransformation, got float"):
        galore_jax.for_nnx(0.1)


def test_without_flax_one_line_says_what_to_install():
    program = (
        "import sys; sys.modules['flax'] = None\n"
        "import optax, galore_jax\n"
        "try: galore_jax.for_nnx(optax.sgd(0.1))\n"
        "except ImportError as error: print(error)"
    )
    root = SCRIPT.parents[2]
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=root, check=True
    )
    assert done.stdout == (
        "galore_jax.for_nnx needs Flax, which is not installed: pip install 'galore-jax[nnx]'\n"
    )
