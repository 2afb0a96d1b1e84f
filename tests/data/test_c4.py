import gzip
import subprocess
import sys

import pytest
from small_c4 import TEXTS, read_texts, write_array_record, write_json, write_tfrecord

from galore_jax.data import sample
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
