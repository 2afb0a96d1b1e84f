"""GLUE from TFDS and from .tsv files, what is refused of it, and its batches."""

import re

import numpy as np
import pytest
import tensorflow_datasets as tfds
from small_glue import TEXTS, write_glue, write_tokenizer, write_tsv

from galore_jax.data.glue import read_glue
from galore_jax.data.glue_tasks import TASKS
from galore_jax.data.reviews import split_sentences
from galore_jax.data.sentences import SentenceConfig, SentenceData
from galore_jax.errors import UserError


def config(data_dir, task="sst2", length=16, **changes):
    values = {"tokenizer": str(data_dir), "vocab_size": 200, "pad_id": 0}
    return SentenceConfig(task, "glue", str(data_dir), length=length, **{**values, **changes})


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("form", ["array_record", "tsv"])
def test_every_task_is_read_alike_from_both_forms(tmp_path, task, form):
    expected = (write_glue if form == "array_record" else write_tsv)(tmp_path, task)
    found = read_glue(task, tmp_path)
    assert found.splits.keys() == {"train", *TASKS[task].held_out}
    for split, examples in found.splits.items():
        assert list(zip(*examples.texts, strict=True)) == [row[:-1] for row in expected[split]]
        np.testing.assert_allclose(examples.labels, [row[-1] for row in expected[split]])
    assert form in found.description


def test_the_folder_may_be_that_of_the_version_or_of_the_task(tmp_path):
    write_glue(tmp_path, "cola")
    for folder in (tmp_path / "glue", tmp_path / "glue/cola", tmp_path / "glue/cola/2.0.0"):
        assert len(read_glue("cola", folder).splits["train"]) == len(TEXTS)


@pytest.mark.parametrize("label", [-1, 2, 7])
def test_a_label_outside_the_range_is_refused_by_its_record(tmp_path, label):
    write_tsv(tmp_path, "sst2", change=lambda rows: [*rows[:-1], (*rows[-1][:-1], label)])
    with pytest.raises(UserError, match=r"train\.tsv, line \d+: the label is .* must be 0 \(neg"):
        read_glue("sst2", tmp_path)


def test_a_missing_column_is_named(tmp_path):
    write_tsv(tmp_path, "rte", header=lambda names: ["index", "sentence1", "other", "label"])
    with pytest.raises(UserError, match="lacks the column sentence2; it has index, sentence1, oth"):
        read_glue("rte", tmp_path)


def test_a_missing_feature_is_named(tmp_path):
    features = {"text": tfds.features.Text(), "label": tfds.features.ClassLabel(num_classes=2)}
    write_glue(tmp_path, "sst2", features=features, row=lambda row: {"text": row[0], "label": 1})
    with pytest.raises(UserError, match="lacks the feature sentence; it has label, text"):
        read_glue("sst2", tmp_path)


def test_what_is_not_there_is_said_with_what_to_do(tmp_path):
    for folder, message in ((None, "is not set"), (tmp_path, "no cola in"), ("/none", "no folder")):
        with pytest.raises(UserError, match=message) as error:
            read_glue("cola", folder)
        assert "CoLA" in str(error.value)
        assert "\n" not in str(error.value)


def data(folder, **options):
    write_glue(folder, options.get("task", "sst2"))
    write_tokenizer(folder)
    return SentenceData(config(folder, **options))


def test_an_epoch_has_each_example_once_and_another_order_than_the_next(tmp_path):
    made = data(tmp_path)
    per_epoch = made.batches_per_epoch(4)
    with made.train_batches(batch_size=4, seed=0) as batches:
        epochs = [[next(batches) for _ in range(per_epoch)] for _ in range(2)]
    orders = [
        [i for batch in epoch for i in batch["example"][batch["is_example"] > 0]]
        for epoch in epochs
    ]
    assert all(sorted(order) == list(range(len(TEXTS))) for order in orders)
    assert orders[0] != orders[1]


def test_batches_go_on_from_any_position(tmp_path):
    made = data(tmp_path)
    with made.train_batches(batch_size=4, seed=3) as batches:
        states, expected = [], []
        for _ in range(6):
            expected.append(next(batches))
            states.append(batches.get_state())
    for i in (0, 2, 4):
        with made.train_batches(batch_size=4, seed=3) as batches:
            batches.set_state(states[i])
            found = next(batches)
        for key, value in expected[i + 1].items():
            np.testing.assert_array_equal(found[key], value)


def test_rows_have_the_tokenizers_ids_their_types_and_padding(tmp_path):
    made = data(tmp_path, task="rte", length=32)
    with made.eval_batches("validation", batch_size=3) as batches:
        batch = next(batches)
    for row in range(3):
        length = batch["mask"][row].sum()
        assert batch["tokens"][row, 0] == 2  # [CLS]
        assert list(batch["tokens"][row]).count(3) == 2  # [SEP] after each sentence
        assert batch["tokens"][row, length - 1] == 3
        assert not batch["tokens"][row, length:].any()
        types = batch["token_types"][row]
        second = list(batch["tokens"][row]).index(3) + 1
        assert types[:second].sum() == 0
        assert types[second:length].all()


def test_what_is_too_long_is_cut_and_said_once(tmp_path, capsys):
    made = data(tmp_path, length=6)
    for _ in range(2):
        with made.eval_batches("validation", batch_size=4) as batches:
            assert all(batch["tokens"].shape[1] <= 6 for batch in batches)
    assert capsys.readouterr().err.count("examples of more than 6 tokens are cut") == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 10}, "ids and the model a vocabulary of 10; they do not belong together"),
        ({"pad_id": 1}, "pads with 0 and the model with 1; they do not belong together"),
        ({"tokenizer": "/none"}, "there is no such file as tokenizer.json"),
        ({"tokenizer": None}, "config.data.tokenizer is not set"),
    ],
)
def test_a_tokenizer_that_does_not_fit_is_refused(tmp_path, changes, message):
    with pytest.raises(UserError, match=re.escape(message)):
        data(tmp_path, **changes)


def test_a_tokenizer_without_special_tokens_is_refused(tmp_path):
    write_tokenizer(tmp_path, special=False)
    write_glue(tmp_path, "sst2")
    with pytest.raises(UserError, match="puts no special tokens"):
        SentenceData(config(tmp_path))


def test_near_duplicates_do_not_cross_into_the_held_out_part():
    sentences = [(f"the film number {i} is a long and {i} winded affair", i % 2) for i in range(50)]
    copies = [(f"{text}, so to speak", label) for text, label in sentences]
    made = split_sentences(sentences + copies)
    train = {text.removesuffix(", so to speak") for text, _ in made["train"]}
    assert not any(text.removesuffix(", so to speak") in train for text, _ in made["validation"])
