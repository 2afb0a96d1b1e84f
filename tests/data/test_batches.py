import concurrent.futures
import contextlib
import gc
import gzip
import itertools
import json
import os
import subprocess
import sys
import threading

import numpy as np
import pytest
from small_c4 import TEXTS, make_texts, read_texts, write_json, write_tfrecord

from galore_jax.data import shards
from galore_jax.data.batches import Batches, DataConfig, TextData
from galore_jax.data.packing import document_row
from galore_jax.errors import UserError


@pytest.fixture(autouse=True)
def small_windows(monkeypatch):
    monkeypatch.setattr(shards, "_WINDOW", 10)


def open_data(data_dir, tokenizer, *, packing, seq_len=16):
    config = DataConfig("c4", data_dir, tokenizer, seq_len=seq_len, packing=packing)
    return TextData(config, vocab_size=320)


def take(batches, count):
    return [batch["tokens"].tolist() for batch in itertools.islice(batches, count)]


def take_first(data, count, *, batch_size, seed):
    with data.train_batches(batch_size=batch_size, seed=seed) as batches:
        return take(batches, count)


@pytest.mark.parametrize(
    ("length", "tokens", "targets"),
    [
        (6, [5, 6, 7, 1, 0, 0], [6, 7, 1, -1, -1, -1]),  # padded
        (4, [5, 6, 7, 1], [6, 7, 1, -1]),  # fits
        (3, [5, 6, 1], [6, 1, -1]),  # cut: the end token stays, as in the reference
    ],
)
def test_padding_layout(length, tokens, targets):
    row = document_row(np.array([5, 6, 7, 1]), length, eos_id=1, pad_id=0)
    assert row["tokens"].tolist() == tokens
    assert row["targets"].tolist() == targets
    assert row["tokens"].dtype == row["targets"].dtype == np.int32


def test_every_form_gives_the_same_documents(c4, tokenizer_path):
    source = open_data(c4, tokenizer_path, packing=False)._source
    for split, texts in TEXTS.items():
        assert read_texts(source, split) == texts


@pytest.mark.parametrize("packing", [False, True])
def test_shapes_and_dtypes(c4, tokenizer_path, packing):
    data = open_data(c4, tokenizer_path, packing=packing)
    for batches in data.train_batches(batch_size=4, seed=0), data.eval_batches(batch_size=4):
        with batches:
            batch = next(batches)
        assert sorted(batch) == ["targets", "tokens"]
        for array in batch.values():
            assert array.shape == (4, 16)
            assert array.dtype == np.int32


def test_seed_decides_the_order(c4, tokenizer_path):
    data = open_data(c4, tokenizer_path, packing=False)
    first, again, other = (take_first(data, 20, batch_size=4, seed=seed) for seed in (0, 0, 1))
    assert first == again
    assert first != other


def test_an_epoch_has_each_document_once_in_an_order_of_its_own(c4, tokenizer_path):
    data = open_data(c4, tokenizer_path, packing=False, seq_len=64)
    rows = [tuple(row) for batch in take_first(data, 20, batch_size=7, seed=3) for row in batch]
    expected = sorted(
        tuple(document_row(data.tokenizer.encode(text), 64, eos_id=1, pad_id=0)["tokens"])
        for text in TEXTS["train"]
    )
    first, second = rows[:70], rows[70:]
    assert first != second
    assert sorted(first) == sorted(second) == expected


@pytest.mark.parametrize("packing", [False, True])
def test_state_restores_at_every_position(c4, tokenizer_path, packing):
    data = open_data(c4, tokenizer_path, packing=packing)
    with data.train_batches(batch_size=3, seed=5) as batches:
        states, contents = [json.dumps(batches.get_state())], []
        for _ in range(60):  # more than one epoch
            contents += take(batches, 1)
            states.append(json.dumps(batches.get_state()))
    for position in range(58):
        with data.train_batches(batch_size=3, seed=5) as restored:
            take(restored, position % 3)  # also on an iterator that has already read ahead
            restored.set_state(json.loads(states[position]))
            assert json.dumps(restored.get_state()) == states[position]
            assert take(restored, 2) == contents[position : position + 2], position


def test_packed_state_restores_within_a_document_longer_than_a_batch(tokenizer_path, tmp_path):
    long = [" ".join(make_texts(40, seed)) for seed in range(4)]
    root = str(write_json(tmp_path, {"train": long, "validation": long}, shards=2))
    data = open_data(root, tokenizer_path, packing=True)
    with data.train_batches(batch_size=2, seed=0) as batches:
        for _ in range(40):
            state = json.dumps(batches.get_state())
            following = take(batches, 1)
            with data.train_batches(batch_size=2, seed=0) as restored:
                restored.set_state(json.loads(state))
                assert take(restored, 1) == following


_OTHER_PROCESS = """
import json, sys
from galore_jax.data import shards
from galore_jax.data.batches import Batches, DataConfig, TextData
shards._WINDOW = 10
config, state = json.loads(sys.argv[1])
data = TextData(DataConfig(**config), vocab_size=320)
with data.train_batches(batch_size=3, seed=5) as batches:
    batches.set_state(state)
    print(json.dumps([next(batches)["tokens"].tolist() for _ in range(4)]))
"""


@pytest.mark.slow
def test_state_restores_in_another_process(c4, tokenizer_path):
    config = DataConfig("c4", c4, tokenizer_path, seq_len=16, packing=True)
    with TextData(config, vocab_size=320).train_batches(batch_size=3, seed=5) as batches:
        take(batches, 7)
        argument = json.dumps([vars(config), batches.get_state()])
        command = [sys.executable, "-c", _OTHER_PROCESS, argument]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        assert json.loads(output) == take(batches, 4)


def test_packed_eval_loses_and_repeats_nothing(c4, tokenizer_path):
    data = open_data(c4, tokenizer_path, packing=True)
    stream = np.concatenate([data.tokenizer.encode(text) for text in TEXTS["validation"]])
    with data.eval_batches(batch_size=4) as batches:
        rows = list(batches)
    assert all(batch["tokens"].shape == (4, 16) for batch in rows)
    tokens = np.concatenate([batch["tokens"].ravel() for batch in rows])
    targets = np.concatenate([batch["targets"].ravel() for batch in rows])
    count = len(stream) - 1
    np.testing.assert_array_equal(tokens[:count], stream[:-1])
    np.testing.assert_array_equal(targets[:count], stream[1:])
    assert (targets[count:] == -1).all()


def test_padded_eval_has_each_document_once(c4, tokenizer_path):
    data = open_data(c4, tokenizer_path, packing=False)
    with data.eval_batches(batch_size=4) as batches:
        rows = [
            (row.tolist(), targets.tolist())
            for batch in batches
            for row, targets in zip(batch["tokens"], batch["targets"], strict=True)
        ]
    assert len(rows) == 24  # 23 documents, and one row of filling
    for text, (tokens, targets) in zip(TEXTS["validation"], rows, strict=False):
        expected = document_row(data.tokenizer.encode(text), 16, eos_id=1, pad_id=0)
        assert tokens == expected["tokens"].tolist()
        assert targets == expected["targets"].tolist()
    assert set(rows[-1][1]) == {-1}


def test_packed_training_is_one_stream(c4, tokenizer_path):
    """Across rows, batches and epochs, each target is the next row's first token."""
    data = open_data(c4, tokenizer_path, packing=True)
    with data.train_batches(batch_size=3, seed=0) as batches:
        batches = list(itertools.islice(batches, 60))
    tokens = np.concatenate([batch["tokens"].ravel() for batch in batches])
    targets = np.concatenate([batch["targets"].ravel() for batch in batches])
    np.testing.assert_array_equal(tokens[1:], targets[:-1])
    stream = [*tokens.tolist(), int(targets[-1])]
    ends = [i for i, token in enumerate(stream) if token == data.tokenizer.eos_id]
    documents = {tuple(data.tokenizer.encode(text)) for text in TEXTS["train"]}
    for begin, end in itertools.pairwise([-1, *ends]):
        assert tuple(stream[begin + 1 : end + 1]) in documents


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"name": "c5"}, "c4 or sample"),
        ({"tokenizer": None}, "spiece.model"),
        ({"data_dir": None}, "data_dir is not set"),
        ({"tokenizer": "nowhere.model"}, "no such file"),
    ],
)
def test_config_errors(tmp_path, tokenizer_path, changes, match):
    fields = {"name": "c4", "data_dir": str(write_json(tmp_path)), "tokenizer": tokenizer_path}
    config = DataConfig(**(fields | changes), seq_len=16, packing=False)
    with pytest.raises(UserError, match=match) as caught:
        TextData(config, vocab_size=320)
    assert "\n" not in str(caught.value)


def test_a_tokenizer_larger_than_the_models_vocabulary(tmp_path, tokenizer_path):
    config = DataConfig("c4", str(write_json(tmp_path)), tokenizer_path, seq_len=16, packing=False)
    with pytest.raises(UserError, match="vocab_size=320 or more"):
        TextData(config, vocab_size=319)


def open_files(folder):
    """The files in the folder that this process has open."""
    paths = []
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            paths.append(os.readlink(f"/proc/self/fd/{number}"))
    return [path for path in paths if path.startswith(str(folder))]


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="tells open files on Linux")
@pytest.mark.parametrize("write", [write_json, write_tfrecord])
@pytest.mark.parametrize("packing", [False, True])
def test_close_end_and_set_state_close_files_and_threads(tmp_path, tokenizer_path, write, packing):
    data = open_data(str(write(tmp_path)), tokenizer_path, packing=packing)
    threads = threading.active_count()

    with data.eval_batches(batch_size=2) as batches:
        next(batches)
        assert open_files(tmp_path)
        assert threading.active_count() == threads  # an evaluation needs none
        batches.set_state({})
        assert not open_files(tmp_path)
        assert list(batches)
        assert not open_files(tmp_path)
        assert list(batches) == []  # the end is the end

    with data.train_batches(batch_size=2, seed=0) as batches:
        next(batches)
        assert threading.active_count() == threads + 1
        batches.set_state(batches.get_state())
        assert threading.active_count() == threads
        assert not open_files(tmp_path)
        next(batches)
    assert threading.active_count() == threads
    assert not open_files(tmp_path)
    batches.close()
    assert list(batches) == []


def test_an_error_while_reading_ahead_is_raised_and_closes(tmp_path, tokenizer_path):
    root = write_json(tmp_path)
    for shard in root.glob("c4-train*"):
        content = gzip.decompress(shard.read_bytes())
        shard.write_bytes(gzip.compress(content + b'{"text": 3}\n'))
    threads = threading.active_count()
    batches = open_data(str(root), tokenizer_path, packing=True).train_batches(batch_size=2, seed=0)
    with pytest.raises(UserError, match=r"line 2\d: not a C4 record"):
        list(batches)
    assert threading.active_count() == threads
    assert list(batches) == []


@pytest.mark.timeout(60)
def test_a_forgotten_iterator_does_not_wait_for_its_thread(tmp_path, tokenizer_path, monkeypatch):
    """The thread may wait for a lock that whoever runs the garbage collector holds."""
    data = open_data(str(write_json(tmp_path)), tokenizer_path, packing=False)
    encode, lock = data.tokenizer.encode, threading.Lock()

    def encode_with_lock(text):
        with lock:
            return encode(text)

    monkeypatch.setattr(data.tokenizer, "encode", encode_with_lock)
    batches = data.train_batches(batch_size=2, seed=0)
    next(batches)
    with lock:
        del batches
        gc.collect()
    (stream,) = Batches._open
    stream.close()
    Batches._open.clear()


@pytest.mark.timeout(120)
def test_thousands_of_iterators_while_garbage_is_collected(tmp_path, tokenizer_path):
    data = open_data(str(write_json(tmp_path)), tokenizer_path, packing=True)
    done = threading.Event()

    def make_iterators(seed):
        for i in range(500):
            with data.train_batches(batch_size=2, seed=seed) as batches:
                if i % 3:
                    next(batches)
                if i % 5 == 0:
                    batches.set_state(batches.get_state())
                    next(batches)
            with data.eval_batches(batch_size=2) as batches:
                next(batches)

    def submit_and_collect():
        with concurrent.futures.ThreadPoolExecutor(2) as other:
            while not done.is_set():
                cycle = []
                cycle.append(cycle)
                other.submit(gc.collect).result()

    gc.freeze()  # collections are quick, and many, where only new objects are looked at
    collector = threading.Thread(target=submit_and_collect)
    collector.start()
    try:
        with concurrent.futures.ThreadPoolExecutor(4) as executor:
            list(executor.map(make_iterators, range(4)))
    finally:
        done.set()
        collector.join()
        gc.unfreeze()


def test_any_integer_is_a_seed(c4, tokenizer_path):
    data = open_data(c4, tokenizer_path, packing=True)
    for seed in (-1, 2**40):
        assert take_first(data, 1, batch_size=2, seed=seed)
