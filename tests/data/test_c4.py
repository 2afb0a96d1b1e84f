import gzip

import pytest
from small_c4 import TEXTS, write_array_record, write_json, write_tfrecord

from galore_jax.data.c4 import find_c4
from galore_jax.errors import UserError


def read_all(data_dir):
    return list(find_c4(str(data_dir)).texts("train", seed=None))


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
