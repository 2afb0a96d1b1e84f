import importlib.util
import os
import signal
import subprocess
import sys
import time

import pytest
from small_c4 import read_texts

from galore_jax.data import sample
from galore_jax.data.batches import DataConfig, TextData
from galore_jax.data.c4 import find_c4
from galore_jax.data.tokenizer import open_tokenizer
from galore_jax.errors import UserError


@pytest.fixture(scope="module")
def paragraphs(sample_paths):
    source = find_c4(str(sample_paths[0]))
    return {
        split: [paragraph for text in read_texts(source, split) for paragraph in text.split("\n")]
        for split in ("train", "validation")
    }


def test_no_paragraph_is_there_twice_or_in_both_splits(paragraphs):
    every = paragraphs["train"] + paragraphs["validation"]
    assert len(every) == len(set(every))


def test_it_is_prose_without_markup(paragraphs):
    every = paragraphs["train"] + paragraphs["validation"]
    assert sum(map(len, every)) > 10e6
    assert 0.02 < len(paragraphs["validation"]) / len(every) < 0.1
    for mark in ("</p>", "<code>", "&amp;", "&quot;"):
        assert sum(mark in paragraph for paragraph in every) < 1e-3 * len(every), mark


def test_tokenizer(sample_paths):
    tokenizer = open_tokenizer(sample_paths[1])
    assert (tokenizer.vocab_size, tokenizer.pad_id, tokenizer.eos_id) == (8192, 0, 1)
    text = "Returns a list of the objects in a bucket."
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids[:-1]) == text
    assert len(ids) < len(text) / 3


def test_found_again_without_building(sample_paths, monkeypatch):
    monkeypatch.setenv("GALORE_JAX_CACHE", str(sample_paths[0].parent))
    monkeypatch.setattr(sample, "_build", None)
    data = TextData(DataConfig("sample", None, None, 128, packing=True), vocab_size=8192)
    with data.train_batches(batch_size=8, seed=0) as batches:
        batch = next(batches)
    assert (batch["targets"] >= 0).all()


def test_without_botocore_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'galore-jax\[sample\]'"):
        sample.prepare_sample()


def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GALORE_JAX_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match="GALORE_JAX_CACHE"):
        sample.prepare_sample()


@pytest.mark.slow
def test_killed_and_built_twice_at_once(tmp_path):
    """A killed build does not count as built; of two at once, both end with the whole sample."""
    command = [sys.executable, "-c", "from galore_jax.data import sample; sample.prepare_sample()"]
    environment = {**os.environ, "GALORE_JAX_CACHE": str(tmp_path)}

    killed = subprocess.Popen(command, env=environment)
    while not list(tmp_path.glob("*.partial-*/c4/en/*/*array_record*")):
        assert killed.poll() is None
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert not [path for path in tmp_path.iterdir() if "partial" not in path.name]

    both = [subprocess.Popen(command, env=environment) for _ in range(2)]
    assert [process.wait() for process in both] == [0, 0]
    (folder,) = (path for path in tmp_path.iterdir() if "partial" not in path.name)
    assert len(read_texts(find_c4(str(folder)), "validation")) > 100
    assert open_tokenizer(folder / "tokenizer.model").vocab_size == sample.VOCAB_SIZE


def test_near_duplicates_of_training_paragraphs_are_not_held_out():
    words = [f"word{i}" for i in range(60)]
    train = " ".join(words)
    one_word_changed = " ".join([*words[:30], "other", *words[31:]])
    only_the_start = " ".join([*words[:20], *(f"new{i}" for i in range(40))])
    kept = sample._without_near_duplicates([[one_word_changed, only_the_start]], [[train]])
    assert kept == [[only_the_start]]
