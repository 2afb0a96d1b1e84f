"""The example inside Tunix's trainer, on one and on 8 virtual devices (a 4 x 2 mesh)."""

import importlib.util
import json
import pathlib

import pytest
from eight_devices import run_on_eight_devices

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("tunix") is None,
        reason="needs google-tunix: pip install 'galore-jax[examples]'",
    ),
]
ROOT = pathlib.Path(__file__).parents[2]
SCALARS = {"step", "opt_state/count", "opt_state/inner_state/0/count"}


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    done = run_on_eight_devices(pathlib.Path(__file__).parent / "tunix_on_mesh.py", folder)
    assert done.returncode == 0, done.stderr[-3000:]
    found, not_saved = map(json.loads, done.stdout.splitlines()[-2:])
    return {**found, "not saved": not_saved}


def test_losses_on_eight_devices_are_those_of_one(seen):
    losses = seen["GaLore AdamW"]["losses"]
    assert len(losses) == 20
    assert losses[-1] < losses[0] - 1
    assert seen["GaLore AdamW"]["gap"] < 1e-5


def test_losses_with_quantised_states_are_close(seen):
    # Sums in another order move gradients by 1e-7 of them, and now and then a code to the next.
    # tests/core/test_for_nnx.py has the same in float64, where that does not happen.
    losses = seen["8 bits"]["losses"]
    assert losses[-1] < losses[0] - 1
    assert seen["8 bits"]["gap"] < 0.02


def test_a_stopped_training_resumes_exactly(seen):
    first, second = seen["resumed"]["losses"]
    assert (len(first), len(second)) == (12, 8)
    assert first + second == seen["8 bits"]["losses"]


def test_the_state_is_sharded_like_the_weights_also_after_a_resume(seen):
    for kind in ("GaLore AdamW", "8 bits"):
        found = seen[kind]["layout"]
        assert {name for name, axes in found.items() if not any(axes)} == SCALARS
    assert seen["resumed"]["layout"] == found
    moment = "opt_state/inner_state/0/mu/layers/0"
    assert found[f"{moment}/attn/q_proj/w/codes"] == ["fsdp", "tp"]
    assert found[f"{moment}/attn/o_proj/w/codes"] == ["tp", "fsdp"]
    assert found[f"{moment}/input_layernorm/w/codes"] == ["tp"]


def test_optax_galore_raises_in_nnx_optimizer_and_cannot_be_saved(seen):
    assert "only valid for values of rank at least 3" in seen["optax galore"]
    # With for_nnx it trains, but has empty arrays in the place of what is not projected.
    assert "Cannot save arrays with zero size" in seen["not saved"]


def test_collectives_are_close_to_those_of_adamw(seen):
    total = {name: sum(kinds.values()) for name, kinds in seen["collectives"].items()}
    assert total["AdamW"] < total["GaLore"] < 1.5 * total["AdamW"]
    assert total["GaLore"] < total["GaLore at a refresh"]


def test_the_command(tmp_path):
    done = run_on_eight_devices(
        ROOT / "examples/scale_out_tunix.py",
        "--mesh=2,2",
        "--steps=2",
        "--optimizer=galore_adamw",
        f"--checkpoints={tmp_path}",
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "step 2: loss" in done.stdout
    assert "opt_state/projector/layers/0/attn/q_proj/w: fsdp, tp" in done.stdout
