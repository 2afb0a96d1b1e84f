import contextlib
import gzip
import itertools
import json
import subprocess
import sys
import time

import pytest
from small_c4 import TEXTS, make_texts, read_texts, write_array_record, write_json, write_tfrecord

from galore_jax.data import sample, shards
from galore_jax.data.c4 import find_c4
from galore_jax.errors import UserError


def read_all(data_dir):
    return read_texts(find_c4(str(data_dir)), "train")


def test_missing_c4_says_where_it_looked_and_the_way_out(tmp_path):
    with pytest.raises(UserError) as caught:
        find_c4(str(tmp_path))
    message = str(caught.value)
    for part in (str(tmp_path / "c4/en"), "download_and_prepare", "configs/sample.py"):
        assert part in message
    assert "\n" not in message


@pytest.mark.parametrize("write", [write_json, write_array_record, write_tfrecord])
def test_no_validation_split(tmp_path, write):
    with pytest.raises(UserError, match="no validation split"):
        find_c4(str(write(tmp_path, {"train": TEXTS["train"]})))


def test_json_shards_in_en(tmp_path):
    write_json(tmp_path / "en")
    assert read_all(tmp_path) == TEXTS["train"]


def test_an_unfinished_build_does_not_hide_the_finished_one(tmp_path):
    folder = write_array_record(tmp_path) / "c4" / "en" / sample.VERSION
    unfinished = folder.with_name(folder.name + ".incompleteX1")
    unfinished.mkdir()
    (unfinished / "dataset_info.json").write_bytes((folder / "dataset_info.json").read_bytes())
    assert read_all(tmp_path) == TEXTS["train"]


@pytest.mark.parametrize("write", [write_array_record, write_tfrecord])
def test_a_missing_shard_is_named(tmp_path, write):
    shard = next((write(tmp_path) / "c4" / "en" / sample.VERSION).glob("c4-train*"))
    shard.unlink()
    with pytest.raises(UserError, match=shard.name):
        read_all(tmp_path)


def test_a_truncated_json_shard_names_file_and_line(tmp_path):
    shard = sorted(write_json(tmp_path).glob("c4-train*"))[1]
    shard.write_bytes(shard.read_bytes()[:-40])
    with pytest.raises(UserError, match=rf"{shard.name} is damaged after line \d+"):
        read_all(tmp_path)


def test_a_json_shard_of_other_bytes(tmp_path):
    shard = sorted(write_json(tmp_path).glob("c4-train*"))[0]
    shard.write_bytes(b"<html>not found</html>")
    with pytest.raises(UserError, match=rf"{shard.name} is damaged after line 0"):
        read_all(tmp_path)


def test_a_json_line_without_text(tmp_path):
    shard = sorted(write_json(tmp_path).glob("c4-train*"))[0]
    with gzip.open(shard, "wt") as file:
        file.write('{"text": "fine"}\n{"url": "u"}\n')
    with pytest.raises(UserError, match=rf"{shard.name}, line 2"):
        read_all(tmp_path)


@pytest.mark.parametrize("cut", [2, 40])  # within the last record's checksum, and its data
def test_a_truncated_tfrecord_shard_names_file_and_byte(tmp_path, cut):
    folder = write_tfrecord(tmp_path) / "c4" / "en" / sample.VERSION
    shard = next(folder.glob("c4-train*"))
    shard.write_bytes(shard.read_bytes()[:-cut])
    with pytest.raises(UserError, match=rf"{shard.name} is damaged after byte \d+"):
        read_all(tmp_path)


def test_a_tfrecord_that_is_not_an_example(tmp_path):
    folder = write_tfrecord(tmp_path) / "c4" / "en" / sample.VERSION
    shard = next(folder.glob("c4-train*"))
    content = bytearray(shard.read_bytes())
    content[12:40] = b"\xff" * 28
    shard.write_bytes(content)
    with pytest.raises(UserError, match=rf"{shard.name} is damaged after byte \d+"):
        read_all(tmp_path)


def test_shards_without_documents_end_the_run_instead_of_searching_for_ever(tmp_path):
    write_json(tmp_path, {"train": [], "validation": TEXTS["validation"]})
    with pytest.raises(UserError, match="no documents"):
        read_texts(find_c4(str(tmp_path)), "train", seed=0, count=1)


_BROKEN_TFDS = """
import sys, types
sys.modules["tensorflow_datasets"] = types.ModuleType("tensorflow_datasets")
from galore_jax.errors import UserError
try:
    from galore_jax.data.batches import DataConfig, TextData
    TextData(DataConfig(sys.argv[1], "/nowhere", None, 16, True), vocab_size=320)
except UserError as error:
    print(error)
"""


@pytest.mark.slow
def test_tfds_that_did_not_import_whole(tmp_path):
    output = subprocess.run(
        [sys.executable, "-c", _BROKEN_TFDS, "c4"], check=True, capture_output=True, text=True
    ).stdout
    assert "pip install -U protobuf tensorflow-metadata" in output


@pytest.mark.parametrize("write", [write_json, write_array_record, write_tfrecord])
@pytest.mark.parametrize("documents", [1, 2, 9, 10, 11, 47, 300])
@pytest.mark.parametrize("window", [10, 4_096])
def test_an_epoch_holds_each_document_once_at_every_size(
    tmp_path, monkeypatch, write, documents, window
):
    monkeypatch.setattr(shards, "_WINDOW", window)
    expected = make_texts(documents, 1)
    source = find_c4(str(write(tmp_path, {"train": expected, "validation": ["held out"]})))
    texts = read_texts(source, "train", seed=0, count=4 * documents)
    epochs = [texts[i : i + documents] for i in range(0, len(texts), documents)]
    assert [sorted(epoch) for epoch in epochs] == [sorted(expected)] * 4
    if documents > 9:
        assert len({tuple(epoch) for epoch in epochs}) == 4


@pytest.mark.parametrize("write", [write_json, write_array_record, write_tfrecord])
def test_every_place_in_the_texts_is_taken_up_exactly(tmp_path, monkeypatch, write):
    monkeypatch.setattr(shards, "_WINDOW", 10)
    source = find_c4(str(write(tmp_path, {"train": make_texts(23, 1), "validation": ["held out"]})))
    with contextlib.closing(source.texts("train", seed=0)) as texts:
        places, whole = [[]], []
        for text, place in itertools.islice(texts, 75):
            whole.append(text)
            places.append(json.loads(json.dumps(place)))
    for i, place in enumerate(places[:70]):
        assert read_texts(source, "train", seed=0, place=place, count=5) == whole[i : i + 5]


@pytest.mark.parametrize(
    "line",
    ['{"text": 3}', '{"text": null}', '{"text": ["a"]}', '"text"', "3", "", '{"text": "\\ud800"}'],
)
def test_a_json_line_that_is_no_record_is_found_when_c4_is_opened(tmp_path, line):
    shard = sorted(write_json(tmp_path).glob("c4-train*"))[2]
    with gzip.open(shard, "wt") as file:
        file.write(line + "\n")
    with pytest.raises(UserError, match=rf"{shard.name}, line 1: not a C4 record") as caught:
        find_c4(str(tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("write", [write_json, write_array_record, write_tfrecord])
@pytest.mark.parametrize(
    "damage", ["folder", "empty", "html", "first record", "link to nothing", "half"]
)
def test_damage_is_found_when_c4_is_opened(tmp_path, write, damage):
    write(tmp_path)
    shard = max(tmp_path.rglob("*train*"))
    content = shard.read_bytes()
    shard.unlink()
    if damage == "folder":
        shard.mkdir()
    elif damage == "link to nothing":
        shard.symlink_to(tmp_path / "nothing")
    else:
        shard.write_bytes(
            {
                "empty": b"",
                "html": b"<html>not found</html>",
                "first record": content[:20] + b"\xff" * 200 + content[220:],
                "half": content[: 65_536 if write is write_array_record else 30],
            }[damage]
        )
    with pytest.raises(UserError, match=shard.name) as caught:
        find_c4(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_a_damaged_record_further_on_in_array_record_is_named(tmp_path):
    texts = {"train": [" ".join(make_texts(40, i)) for i in range(60)], "validation": ["held out"]}
    write_array_record(tmp_path, texts)
    shard = max(tmp_path.rglob("*train*"))
    content = bytearray(shard.read_bytes())
    content[5_000:5_100] = b"\xff" * 100
    shard.write_bytes(content)
    with pytest.raises(UserError, match=rf"{shard.name} is damaged at record \d+"):
        read_all(tmp_path)


def test_tfrecords_of_another_kind_of_text(tmp_path):
    """The number of a record whose text is one, as TFDS stores it."""
    folder = write_tfrecord(tmp_path) / "c4" / "en" / sample.VERSION
    features = folder / "features.json"
    described = json.loads(features.read_text())
    described["featuresDict"]["features"]["text"] = described["featuresDict"]["features"]["url"]
    del described["featuresDict"]["features"]["text"]
    features.write_text(json.dumps(described))
    with pytest.raises(UserError, match="is damaged after byte 0"):
        find_c4(str(tmp_path))


def test_many_shards_are_looked_at_in_seconds(tmp_path):
    texts = {"train": make_texts(1_024, 1), "validation": make_texts(8, 2)}
    write_json(tmp_path, texts, shards=1_024)
    begun = time.monotonic()
    find_c4(str(tmp_path))
    assert time.monotonic() - begun < 5
    shard = max(tmp_path.glob("c4-train*"))
    shard.write_bytes(b"")
    with pytest.raises(UserError, match=shard.name):
        find_c4(str(tmp_path))
