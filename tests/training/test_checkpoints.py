"""Checkpoints come back bit for bit, or say in one line why not."""

import errno
import json
import logging
import os
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from galore_jax.errors import UserError
from galore_jax.training import checkpoints as checkpoints_lib
from galore_jax.training.checkpoints import Checkpoints


def make_state(seed=0, width=64):
    params = {
        "blocks": {"q_proj": {"kernel": jax.random.normal(jax.random.key(seed), (2, width, 8))}},
        "embed": jax.random.normal(jax.random.key(seed + 1), (16, 8), jnp.bfloat16),
        "scale": jnp.array([jnp.nan, -0.0, jnp.inf, 1e-42]),
    }
    tx = optax.chain(optax.clip(1.0), optax.adamw(1e-3))
    projector = {"q_proj": jnp.ones((2, 8, 4), jnp.bfloat16), "embed": optax.MaskedNode()}
    return {
        "params": params,
        "opt_state": tx.init(params),
        "projector": projector,
        "step": jnp.int32(seed),
        "nothing": (None, (), {}),
    }


def abstract(state):
    return jax.eval_shape(lambda: state)


def assert_bit_equal(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert isinstance(a, jax.Array)
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def save_steps(directory, *steps, keep=3):
    with Checkpoints(directory, keep=keep) as checkpoints:
        for step in steps:
            checkpoints.save(step, make_state(step), {"position": step})


def restore(directory, state=None, warn=None):
    with Checkpoints(directory, keep=3, warn=warn or pytest.fail) as checkpoints:
        return checkpoints.restore(abstract(make_state() if state is None else state))


def test_round_trip_is_bit_exact(tmp_path):
    """NamedTuples, masked and empty nodes, bfloat16, scalars, NaN, -0.0 and subnormals."""
    data = {"grain": '{"x": 1}', "files": [1, 2.5, None], "nested": {"a": True}}
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        checkpoints.save(7, make_state(7), data)
    restored = restore(tmp_path)
    assert restored.step == 7
    assert restored.data == data
    assert_bit_equal(restored.state, make_state(7))


def test_data_of_numbers_alone_stays_json(tmp_path):
    """Orbax would take such a dict for a pytree and give back arrays."""
    save_steps(tmp_path, 1)
    assert type(restore(tmp_path).data["position"]) is int


def test_data_that_json_changes_is_not_taken_for_damage(tmp_path):
    """Integer keys come back as strings, which sort differently."""
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, make_state(), {"at": {2: (1, 2), 10: "é"}})
    assert restore(tmp_path).data == {"at": {"2": [1, 2], "10": "é"}}


def test_a_part_is_read_without_the_rest(tmp_path):
    save_steps(tmp_path, 1, 2)
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        for step, found in ((None, 2), (1, 1)):
            restored = checkpoints.restore_part("params", step)
            assert restored is not None
            assert (restored.step, restored.data) == (found, {"position": found})
            assert_bit_equal(restored.state, make_state(found)["params"])
        with pytest.raises(
            UserError, match=r"no checkpoint of step 3; it has those of steps \[1, 2\]"
        ):
            checkpoints.restore_part("params", 3)


def test_a_part_of_a_damaged_checkpoint(tmp_path):
    save_steps(tmp_path, 1, 2)
    for path in (tmp_path / "2" / "leaves").iterdir():
        path.write_text("{")
    warnings = []
    with Checkpoints(tmp_path, read_only=True, warn=warnings.append) as checkpoints:
        with pytest.raises(UserError, match=r"the checkpoint of step 2 in .* is damaged"):
            checkpoints.restore_part("params", 2)
        assert not warnings
        restored = checkpoints.restore_part("params")
        assert restored is not None
        assert restored.step == 1
        assert len(warnings) == 1


def test_to_read_nothing_is_made_or_removed(tmp_path):
    with Checkpoints(tmp_path / "new", read_only=True) as checkpoints:
        assert checkpoints.restore_part("params") is None
    assert not (tmp_path / "new").exists()
    partial = tmp_path / "3.orbax-checkpoint-tmp"
    partial.mkdir()
    with Checkpoints(tmp_path, read_only=True):
        assert partial.exists()


def test_empty_folder_has_nothing_to_restore(tmp_path):
    assert restore(tmp_path / "new") is None


def test_last_k_are_kept(tmp_path):
    save_steps(tmp_path, 1, 2, 3, 10, keep=2)
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        assert checkpoints.steps() == [3, 10]


def test_donation_right_after_save_does_not_reach_the_disk(tmp_path):
    """The background write must not read buffers that the next steps overwrite in place."""
    advance = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
    state = {f"w{i}": jnp.zeros((512, 1024)) for i in range(8)}
    with Checkpoints(tmp_path, keep=3) as checkpoints:
        for step in range(1, 10):
            state = jax.block_until_ready(advance(state))
            if step % 3 == 1:
                saved_from = state["w0"].unsafe_buffer_pointer()
                checkpoints.save(step, state, {})
            else:
                assert state["w0"].unsafe_buffer_pointer() == saved_from, "nothing was donated"
            if step % 3 == 0:
                restored = checkpoints.restore(abstract(state))
                assert restored.step == step - 2
                for leaf in jax.tree.leaves(restored.state):
                    np.testing.assert_array_equal(leaf, step - 2)


def test_restored_state_can_be_donated(tmp_path):
    """A view of the host array that was read would make the first step copy, or corrupt it."""
    save_steps(tmp_path, 1)
    state = restore(tmp_path).state
    advance = jax.jit(lambda s: jax.tree.map(lambda x: x * 2, s), donate_argnums=0)
    want = jax.tree.map(lambda x: x * 2, make_state(1))
    assert_bit_equal(advance(state), want)


def files_of(directory, step):
    root = directory / str(step)
    return sorted(path.relative_to(root) for path in root.rglob("*") if path.is_file())


def flip(content):
    if not content:
        return content
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 0x10]) + content[middle + 1 :]


DAMAGES = {
    "removed": None,
    "empty": lambda content: b"",
    "half": lambda content: content[: len(content) // 2],
    "garbage": lambda content: os.urandom(len(content)),
    "one bit": flip,
}


@pytest.mark.parametrize("how", DAMAGES)
def test_every_file_damaged_in_turn_is_noticed_or_harmless(tmp_path, how):
    """No damage to any file may raise, or give back other numbers than were saved."""
    save_steps(tmp_path, 1, 2)
    noticed = set()
    for file in files_of(tmp_path, 2):
        path = tmp_path / "2" / file
        content = path.read_bytes()
        if DAMAGES[how] is None:
            path.unlink()
        else:
            path.write_bytes(DAMAGES[how](content))
        warnings = []
        restored = restore(tmp_path, warn=warnings.append)
        path.write_bytes(content)

        assert restored.data == {"position": restored.step}
        assert_bit_equal(restored.state, make_state(restored.step))
        assert len(warnings) == (restored.step == 1)
        if warnings:
            assert "step 2" in warnings[0]
            assert "\n" not in warnings[0]
            noticed.add(file.name if "ocdbt.process_0" not in file.parts else "arrays")
    assert {"data.json", "arrays"} <= noticed


def test_whole_step_folder_emptied_falls_back(tmp_path):
    save_steps(tmp_path, 1, 2)
    for file in files_of(tmp_path, 2):
        (tmp_path / "2" / file).unlink()
    warnings = []
    assert restore(tmp_path, warn=warnings.append).step == 1
    assert len(warnings) == 1


def test_lack_of_memory_is_not_taken_for_damage(tmp_path, monkeypatch):
    """A checkpoint passed over is removed later: a good one must not be."""
    save_steps(tmp_path, 1, 2)

    def load_checkpointables(path, names):
        raise KeyError("wrapped") from MemoryError("Unable to allocate 13.5 GiB")

    monkeypatch.setattr("orbax.checkpoint.v1.load_checkpointables", load_checkpointables)
    with pytest.raises(MemoryError, match=r"13\.5 GiB"):
        restore(tmp_path)


def damage_arrays(directory, step):
    for path in (directory / str(step) / "state").rglob("d/*"):
        path.write_bytes(path.read_bytes()[:100])


def test_damage_everywhere_is_an_error_not_a_fresh_start(tmp_path):
    save_steps(tmp_path, 1, 2)
    damage_arrays(tmp_path, 1)
    damage_arrays(tmp_path, 2)
    with pytest.raises(UserError, match=r"every checkpoint .*\[1, 2\].*start afresh"):
        restore(tmp_path, warn=lambda line: None)
    assert len(files_of(tmp_path, 1)) > 10


@pytest.mark.parametrize("saved_before", [(), (2,)])
def test_damaged_step_is_written_again_by_the_rerun(tmp_path, saved_before):
    """The broken folder must neither block the save nor count as one of the last k."""
    save_steps(tmp_path, 1, 4)
    damage_arrays(tmp_path, 4)
    with Checkpoints(tmp_path, keep=1, warn=lambda line: None) as checkpoints:
        assert checkpoints.restore(abstract(make_state())).step == 1
        for step in (*saved_before, 4):
            checkpoints.save(step, make_state(step), {"position": step})
            assert checkpoints.steps() == [step]
    assert_bit_equal(restore(tmp_path).state, make_state(4))


def test_saving_a_step_twice_keeps_the_first(tmp_path):
    """The last step may also be a regular checkpoint: no error, and no moment without it."""
    save_steps(tmp_path, 3, 3)
    assert restore(tmp_path).step == 3


def with_leaf(state, leaf):
    return state | {"params": state["params"] | {"embed": leaf}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda s: with_leaf(s, jnp.zeros((20, 8), jnp.bfloat16)),
            r"params/embed is bfloat16\[16,8\] in the checkpoint and bfloat16\[20,8\] in the model",
        ),
        (
            lambda s: with_leaf(s, jnp.zeros((16, 8))),
            r"params/embed is bfloat16\[16,8\] in the checkpoint and float32\[16,8\] in the model",
        ),
        (
            lambda s: s | {"extra": jnp.zeros(3)},
            r"extra is missing in the checkpoint and float32\[3\] in the model",
        ),
        (
            lambda s: {key: value for key, value in s.items() if key != "step"},
            r"step is int32\[\] in the checkpoint and absent in the model",
        ),
    ],
    ids=["shape", "dtype", "leaf missing", "leaf left over"],
)
def test_misfit_names_the_leaf_and_is_not_taken_for_damage(tmp_path, change, message):
    save_steps(tmp_path, 1, 2)
    with pytest.raises(UserError, match=message) as raised:
        restore(tmp_path, change(make_state()))
    assert "\n" not in str(raised.value)


def test_nodes_without_leaves_do_not_make_a_misfit(tmp_path):
    """One more `optax.identity()` in the chain holds no arrays."""
    save_steps(tmp_path, 1)
    state = make_state(1)
    state |= {"opt_state": (*state["opt_state"], optax.EmptyState())}
    assert_bit_equal(restore(tmp_path, state).state, state)


SAVE_FOREVER = """
import sys, jax, jax.numpy as jnp
from galore_jax.training.checkpoints import Checkpoints
with Checkpoints(sys.argv[1], keep=2) as checkpoints:
    restored = checkpoints.restore({"w": jax.ShapeDtypeStruct((4, 1 << 20), jnp.float32)})
    step = restored.step if restored else 0
    while True:
        step += 1
        checkpoints.save(step, {"w": jnp.full((4, 1 << 20), step, jnp.float32)}, {"at": step})
        print(step, flush=True)
"""


def test_sigkill_during_saves_leaves_the_last_complete_one(tmp_path):
    """Half-written temporaries are neither restored nor left lying about."""
    newest, seen_partial = 0, False
    for delay in (0.0, 0.013, 0.021, 0.034):
        process = subprocess.Popen(
            [sys.executable, "-c", SAVE_FOREVER, str(tmp_path)], stdout=subprocess.PIPE, text=True
        )
        for _ in range(2):
            process.stdout.readline()
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        seen_partial |= any("tmp" in path.name for path in tmp_path.iterdir())
        warnings = []
        with Checkpoints(tmp_path, keep=2, warn=warnings.append) as checkpoints:
            assert not [path for path in tmp_path.iterdir() if not path.name.isdigit()]
            restored = checkpoints.restore({"w": jax.ShapeDtypeStruct((4, 1 << 20), jnp.float32)})
        assert not warnings
        assert restored.step > newest
        assert restored.data == {"at": restored.step}
        np.testing.assert_array_equal(restored.state["w"], restored.step)
        newest = restored.step
    assert seen_partial, "no save was cut short: the test shows nothing"


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 3 MB."""
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(tmp_path)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("needs the right to mount a small file system")
    yield tmp_path
    subprocess.run(["umount", "-l", str(tmp_path)], check=True)


def noise(count):
    return {"w": np.random.default_rng(count).normal(size=count).astype(np.float32)}


def test_full_disk_is_one_line_and_spares_the_checkpoints_before(small_disk):
    run = small_disk / "run"
    with Checkpoints(run, keep=1) as checkpoints:
        checkpoints.save(1, noise(400_000), {"at": 1})
        checkpoints.save(2, noise(600_000), {"at": 2})
        with pytest.raises(
            UserError, match=r"no space left .*step 2 in .*/run: .*2\.4 MB"
        ) as error:
            checkpoints.wait()
        assert "\n" not in str(error.value)
        assert [path.name for path in run.iterdir()] == ["1"]
        assert checkpoints.steps() == [1]
    with Checkpoints(run, keep=1) as checkpoints:
        restored = checkpoints.restore(abstract(noise(400_000)))
        assert restored.data == {"at": 1}
        checkpoints.save(2, noise(100_000), {"at": 2})
        assert checkpoints.steps() == [2]


def test_disk_full_to_any_degree_is_told_as_such(small_disk):
    """The space may run out at the folder, the arrays, the JSON files or the metadata."""
    run = small_disk / "run"
    failures = 0
    with Checkpoints(run, keep=1) as checkpoints:
        checkpoints.save(1, noise(1000), {"at": 1})
        checkpoints.wait()
        free = os.statvfs(run).f_bavail * os.statvfs(run).f_frsize
        for step, left in enumerate(range(0, 120_000, 4096), start=2):
            filler = small_disk / "filler"
            filler.write_bytes(bytes(free - left))
            try:
                checkpoints.save(step, noise(1000), {"at": step})
                checkpoints.wait()
            except UserError as error:
                assert "no space left" in str(error)  # noqa: PT017
                failures += 1
                assert checkpoints.steps() == [1]
            else:
                break
            finally:
                filler.unlink()
    assert failures > 3


FILL = """
import contextlib, os, sys, numpy as np
from galore_jax.errors import UserError
from galore_jax.training.checkpoints import Checkpoints
run, filler = sys.argv[1] + "/run", sys.argv[1] + "/filler"
state = {f"w{i}": np.random.default_rng(i).normal(size=1500).astype(np.float32) for i in range(20)}
with Checkpoints(run, keep=1) as checkpoints:
    disk = os.statvfs(run)
    for step in range(24):
        # What Orbax's threads may still be writing takes room too.
        with open(filler, "wb", buffering=0) as file, contextlib.suppress(OSError):
            file.write(bytes(disk.f_bavail * disk.f_frsize - step * 8192))
        try:
            checkpoints.save(step, state, {"at": step})
            checkpoints.wait()
        except UserError as error:
            print(error)
        else:
            break
        finally:
            os.unlink(filler)
"""


def test_a_full_disk_is_told_once_and_nothing_else_is_printed(small_disk):
    """Orbax's threads print hundreds of lines when a write fails, wherever that is."""
    done = subprocess.run(
        [sys.executable, "-c", FILL, str(small_disk)], capture_output=True, text=True
    )
    assert done.stderr == ""
    assert done.returncode == 0
    assert len(done.stdout.splitlines()) > 10
    assert all(line.startswith("no space left") for line in done.stdout.splitlines())


LIMIT = """
import resource, sys, numpy as np
from galore_jax.errors import UserError
from galore_jax.training.checkpoints import Checkpoints
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]),) * 2)
try:
    with Checkpoints(sys.argv[1], keep=1) as checkpoints:
        checkpoints.save(1, {"w": np.random.default_rng(0).normal(size=100_000)}, {"at": 1})
except UserError as error:
    print(error)
"""


@pytest.mark.parametrize("most", [10, 300, 100_000])
def test_a_file_too_large_is_one_line_too(tmp_path, most):
    """The limit is met in the JSON files, the metadata or the arrays; no file system is needed."""
    done = subprocess.run(
        [sys.executable, "-c", LIMIT, str(tmp_path), str(most)], capture_output=True, text=True
    )
    assert done.stderr == ""
    assert done.stdout.startswith("cannot write the checkpoint of step 1 in ")
    assert "File too large" in done.stdout
    assert done.stdout.count("\n") == 1


def test_prng_keys_come_back(tmp_path):
    """``optax.noisy_sgd`` has one in its state, which Orbax refuses."""
    state = {"key": jax.random.key(3), "keys": jax.random.split(jax.random.key(4), 5)}
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, state, {})
    restored = restore(tmp_path, state).state
    for name, keys in state.items():
        assert restored[name].dtype == keys.dtype
        np.testing.assert_array_equal(*map(jax.random.key_data, (restored[name], keys)))


def test_no_space_by_errno_and_through_wrapping():
    wrapped = RuntimeError("save failed")
    wrapped.__cause__ = OSError(28, "No space left on device")
    assert checkpoints_lib._os_error(wrapped) == errno.ENOSPC
    assert checkpoints_lib._os_error(OSError(13, "Permission denied")) == errno.EACCES
    assert checkpoints_lib._os_error(ValueError("no error of the system")) is None


def test_folder_that_is_a_file_is_a_user_error(tmp_path):
    path = tmp_path / "checkpoints"
    path.write_text("")
    with pytest.raises(UserError, match="cannot use"):
        Checkpoints(path, keep=1)


def test_keep_must_be_positive(tmp_path):
    with pytest.raises(UserError, match="at least 1, not 0"):
        Checkpoints(tmp_path, keep=0)


QUIET = """
import logging, sys
from absl import logging as absl_logging
absl_logging.set_verbosity(absl_logging.INFO)
import jax, jax.numpy as jnp
from galore_jax.training.checkpoints import Checkpoints
state = {"w": jnp.ones((64, 64))}
with Checkpoints(sys.argv[1], keep=1) as checkpoints:
    for step in (1, 2):
        checkpoints.save(step, state, {})
    checkpoints.restore(jax.eval_shape(lambda: state))
"""


def test_normal_use_writes_nothing_to_the_terminal(tmp_path):
    done = subprocess.run(
        [sys.executable, "-W", "default", "-c", QUIET, str(tmp_path)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert [
        line for line in done.stderr.splitlines() if "orbax" in line or "heckpoint" in line
    ] == []


def test_other_log_records_are_not_hushed(tmp_path, caplog):
    save_steps(tmp_path, 1)
    logging.getLogger("absl").warning("something else")
    assert "something else" in caplog.text


def test_files_are_few(tmp_path):
    """One folder per array would take minutes on a network disk."""
    save_steps(tmp_path, 1)
    assert len(files_of(tmp_path, 1)) <= 20
    index = json.loads((tmp_path / "1" / "leaves" / "data.json").read_text())
    assert index["arrays"]["params/embed"]["dtype"] == "bfloat16"
