import itertools
import json
import subprocess
import sys

import numpy as np
import pytest
from small_c4 import TEXTS, make_texts, write_json

from galore_jax.data import c4 as c4_module
from galore_jax.data.batches import DataConfig, TextData, document_row
from galore_jax.errors import UserError


@pytest.fixture(autouse=True)
def small_windows(monkeypatch):
    monkeypatch.setattr(c4_module, "_WINDOW", 10)


def open_data(data_dir, tokenizer, *, packing, seq_len=16):
    config = DataConfig("c4", data_dir, tokenizer, seq_len=seq_len, packing=packing)
    return TextData(config, vocab_size=320)


def take(batches, count):
    return [batch["tokens"].tolist() for batch in itertools.islice(batches, count)]


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
        assert list(source.texts(split, seed=None)) == texts


@pytest.mark.parametrize("packing", [False, True])
def test_shapes_and_dtypes(c4, tokenizer_path, packing):
    data = open_data(c4, tokenizer_path, packing=packing)
    batches = next(data.train_batches(batch_size=4, seed=0)), next(data.eval_batches(batch_size=4))
    for batch in batches:
        assert sorted(batch) == ["targets", "tokens"]
        for array in batch.values():
            assert array.shape == (4, 16)
            assert array.dtype == np.int32


def test_seed_decides_the_order(c4, tokenizer_path):
    data = open_data(c4, tokenizer_path, packing=False)
    first, again, other = (
        take(data.train_batches(batch_size=4, seed=seed), 20) for seed in (0, 0, 1)
    )
    assert first == again
    assert first != other


def test_an_epoch_has_each_document_once_in_an_order_of_its_own(c4, tokenizer_path):
    data = open_data(c4, tokenizer_path, packing=False, seq_len=64)
    rows = [
        tuple(row) for batch in take(data.train_batches(batch_size=7, seed=3), 20) for row in batch
    ]
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
    batches = data.train_batches(batch_size=3, seed=5)
    states, contents = [json.dumps(batches.get_state())], []
    for _ in range(60):  # more than one epoch
        contents += take(batches, 1)
        states.append(json.dumps(batches.get_state()))
    for position in range(0, 58, 1 if packing else 5):
        restored = data.train_batches(batch_size=3, seed=5)
        take(restored, position % 3)  # also on an iterator that has already read ahead
        restored.set_state(json.loads(states[position]))
        assert json.dumps(restored.get_state()) == states[position]
        assert take(restored, 2) == contents[position : position + 2], position


def test_packed_state_restores_within_a_document_longer_than_a_batch(tokenizer_path, tmp_path):
    long = [" ".join(make_texts(40, seed)) for seed in range(4)]
    root = str(write_json(tmp_path, {"train": long, "validation": long}, shards=2))
    data = open_data(root, tokenizer_path, packing=True)
    batches = data.train_batches(batch_size=2, seed=0)
    for _ in range(40):
        state = json.dumps(batches.get_state())
        following = take(batches, 1)
        restored = data.train_batches(batch_size=2, seed=0)
        restored.set_state(json.loads(state))
        assert take(restored, 1) == following


_OTHER_PROCESS = """
import json, sys
from galore_jax.data import c4
from galore_jax.data.batches import DataConfig, TextData
c4._WINDOW = 10
config, state = json.loads(sys.argv[1])
batches = TextData(DataConfig(**config), vocab_size=320).train_batches(batch_size=3, seed=5)
batches.set_state(state)
print(json.dumps([next(batches)["tokens"].tolist() for _ in range(4)]))
"""


@pytest.mark.slow
def test_state_restores_in_another_process(c4, tokenizer_path):
    config = DataConfig("c4", c4, tokenizer_path, seq_len=16, packing=True)
    batches = TextData(config, vocab_size=320).train_batches(batch_size=3, seed=5)
    take(batches, 7)
    argument = json.dumps([vars(config), batches.get_state()])
    output = subprocess.run(
        [sys.executable, "-c", _OTHER_PROCESS, argument], check=True, capture_output=True, text=True
    ).stdout
    assert json.loads(output) == take(batches, 4)


def test_packed_eval_loses_and_repeats_nothing(c4, tokenizer_path):
    data = open_data(c4, tokenizer_path, packing=True)
    stream = np.concatenate([data.tokenizer.encode(text) for text in TEXTS["validation"]])
    rows = list(data.eval_batches(batch_size=4))
    assert all(batch["tokens"].shape == (4, 16) for batch in rows)
    tokens = np.concatenate([batch["tokens"].ravel() for batch in rows])
    targets = np.concatenate([batch["targets"].ravel() for batch in rows])
    count = len(stream) - 1
    np.testing.assert_array_equal(tokens[:count], stream[:-1])
    np.testing.assert_array_equal(targets[:count], stream[1:])
    assert (targets[count:] == -1).all()


def test_padded_eval_has_each_document_once(c4, tokenizer_path):
    data = open_data(c4, tokenizer_path, packing=False)
    rows = [
        (row.tolist(), targets.tolist())
        for batch in data.eval_batches(batch_size=4)
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
    batches = list(itertools.islice(data.train_batches(batch_size=3, seed=0), 60))
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
