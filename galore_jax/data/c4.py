"""C4 on disk, in the forms people have it: TFDS array_record or TFRecord, or public json.gz shards.

Each opens as a Grain ``IterDataset`` of texts whose position is saved and restored exactly.
"""

import dataclasses
import gzip
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grain
import numpy as np
import tensorflow_datasets as tfds
from google.protobuf.message import DecodeError

from galore_jax.errors import UserError

_WINDOW = 4_096  # documents shuffled together where the source can only be read in sequence
_HOW_TO = (
    "prepare it with tfds.builder('c4/en', data_dir=DIR, file_format='array_record')"
    ".download_and_prepare() or put the public en/c4-train.*.json.gz and c4-validation.*.json.gz "
    "shards there, and give that folder as --config.data.data_dir=DIR; or use the offline sample, "
    "--config=configs/sample.py"
)


def check_tfds() -> None:
    """Checks that tensorflow_datasets can be used: some of its failures to import are silent.

    Raises:
      UserError: it cannot; what to install.
    """
    if not hasattr(tfds, "data_source"):
        raise UserError(
            "tensorflow_datasets did not import whole, as with protobuf 5 beside a newer "
            "tensorflow-metadata; pip install -U protobuf tensorflow-metadata"
        )


def find_c4(data_dir: str | None) -> "RandomAccess | Shards":
    """Finds C4 in a folder.

    Args:
      data_dir: holds ``c4/en/VERSION`` as TFDS writes it, or (itself, or in ``en``) the public
        ``c4-train.*.json.gz`` and ``c4-validation.*.json.gz`` shards.

    Raises:
      UserError: no C4 there: where it was looked for, and what prepares it.
    """
    if data_dir is None:
        raise UserError(f"config.data.data_dir is not set and C4 must be on disk; {_HOW_TO}")
    root = Path(data_dir).expanduser()
    folders = (path.parent for path in (root / "c4" / "en").glob("*/dataset_info.json"))
    prepared = sorted(
        (path for path in folders if re.fullmatch(r"\d+\.\d+\.\d+", path.name)),
        key=lambda path: [int(number) for number in path.name.split(".")],
    )
    if prepared:
        return _open_tfds(root, prepared[-1])
    for folder in (root, root / "en"):
        shards = {
            split: sorted(folder.glob(f"c4-{split}.*.json.gz")) for split in ("train", "validation")
        }
        if any(shards.values()):
            _check_splits({split: len(paths) for split, paths in shards.items()}, folder)
            return Shards(_JsonLines, shards, f"{len(shards['train'])} json.gz shards")
    raise UserError(
        f"no C4 in {root}: looked for {root / 'c4/en/VERSION/dataset_info.json'} and for "
        f"c4-train.*.json.gz in {root} and {root / 'en'}; {_HOW_TO}"
    )


def _open_tfds(root: Path, folder: Path) -> "RandomAccess | Shards":
    info = tfds.builder_from_directory(folder).info
    _check_splits({name: split.num_examples for name, split in info.splits.items()}, folder)
    documents = info.splits["train"].num_examples
    paths = {
        split: [Path(path) for path in info.splits[split].filepaths]
        for split in ("train", "validation")
    }
    missing = [path for split in paths.values() for path in split if not path.exists()]
    if missing:
        raise UserError(f"C4 in {folder} is incomplete: {missing[0].name} is missing")
    if info.file_format == tfds.core.FileFormat.ARRAY_RECORD:
        return RandomAccess(f"c4/en:{folder.name}", root, f"array_record, {documents} documents")
    if info.file_format == tfds.core.FileFormat.TFRECORD:
        features: Any = info.features
        described = f"tfrecord, {documents} documents"
        return Shards(lambda path: _TFRecords(path, features), paths, described)
    raise UserError(
        f"C4 in {folder} has TFDS's format {info.file_format}, which is not read here; "
        "array_record and tfrecord are"
    )


def _check_splits(documents: dict[str, int], folder: Path) -> None:
    for split in ("train", "validation"):
        if not documents.get(split):
            raise UserError(f"C4 in {folder} has no {split} split; {_HOW_TO}")


@dataclasses.dataclass(frozen=True)
class RandomAccess:
    """C4 as array_record: any document at once, so that a whole epoch is shuffled.

    Attributes:
      name: for TFDS, with the version.
      data_dir: the folder that holds it.
      description: the form and size, in a few words.
    """

    name: str
    data_dir: Path
    description: str

    def texts(self, split: str, *, seed: int | None) -> grain.IterDataset[str]:
        """Texts in order, once, for a seed of None; else shuffled anew each epoch, without end."""
        source: Any = tfds.data_source(
            self.name, data_dir=str(self.data_dir), split=split, download=False
        )
        documents = grain.MapDataset.source(source)
        if seed is not None:
            documents = documents.seed(seed).shuffle().repeat()
        return documents.map(_text).to_iter_dataset(
            grain.ReadOptions(num_threads=1, prefetch_buffer_size=64)
        )


@dataclasses.dataclass(frozen=True)
class Shards:
    """C4 as files that are read from start to end.

    Attributes:
      open_shard: from a path to a Grain ``IterDataset`` of the texts in it.
      paths: the files of each split.
      description: the form and size, in a few words.
    """

    open_shard: Any
    paths: dict[str, list[Path]]
    description: str

    def texts(self, split: str, *, seed: int | None) -> grain.IterDataset[str]:
        """Texts in order, once, for a seed of None; else without end, shuffled anew each epoch.

        The order of the files is shuffled, and then the documents within a window of 4,096.
        """
        texts = _ShardTexts(self.open_shard, self.paths[split], seed)
        if seed is None:
            return texts
        return grain.experimental.WindowShuffleIterDataset(texts, window_size=_WINDOW, seed=seed)


class _ShardTexts(grain.IterDataset[str]):
    def __init__(self, open_shard: Any, paths: list[Path], seed: int | None):
        super().__init__()
        self._open_shard, self._paths, self._seed = open_shard, paths, seed

    def __iter__(self) -> "_ShardTextsIterator":
        return _ShardTextsIterator(self._open_shard, self._paths, self._seed)


class _ShardTextsIterator(grain.DatasetIterator[str]):
    """State: the epoch, the place in its order of files, and the file iterator's own state."""

    def __init__(self, open_shard: Any, paths: list[Path], seed: int | None):
        super().__init__()
        self._open_shard, self._paths, self._seed = open_shard, paths, seed
        self._go_to(0, 0)

    def _go_to(self, epoch: int, place: int) -> None:
        self._epoch, self._place = epoch, place
        if place == 0:
            self._epoch_is_empty = True
        if self._seed is None:
            order = np.arange(len(self._paths))
        else:
            order = np.random.default_rng([self._seed, epoch]).permutation(len(self._paths))
        self._shard: Any = None  # a Grain iterator, or None at the end
        if place < len(order):
            self._shard = iter(self._open_shard(self._paths[order[place]]))

    def __next__(self) -> str:
        while self._shard is not None:
            try:
                text = next(self._shard)
                self._epoch_is_empty = False
                return text
            except StopIteration:
                if self._place + 1 == len(self._paths) and self._seed is not None:
                    if self._epoch_is_empty:
                        raise UserError(f"no documents in {self._paths[0].parent}") from None
                    self._go_to(self._epoch + 1, 0)
                else:
                    self._go_to(self._epoch, self._place + 1)
        raise StopIteration

    def get_state(self) -> dict[str, Any]:
        shard = None if self._shard is None else self._shard.get_state()
        return {"epoch": self._epoch, "place": self._place, "shard": shard}

    def set_state(self, state: dict[str, Any]) -> None:
        self._go_to(state["epoch"], state["place"])
        self._epoch_is_empty = False  # as far as this iterator knows
        if self._shard is not None:
            self._shard.set_state(state["shard"])


class _TFRecords(grain.IterDataset[str]):
    def __init__(self, path: Path, features: Any):
        super().__init__(grain.experimental.TFRecordIterDataset(str(path)))
        self._path, self._features = path, features

    def __iter__(self) -> "_TFRecordsIterator":
        return _TFRecordsIterator(self._parent.__iter__(), self._path, self._features)


class _TFRecordsIterator(grain.DatasetIterator[str]):
    """State: Grain's reader's, the number of bytes read."""

    def __init__(self, records: grain.DatasetIterator[bytes], path: Path, features: Any):
        super().__init__(records)
        self._path, self._features = path, features

    def __next__(self) -> str:
        begin = self._parent.get_state()["reader_offset"]
        try:
            return _text(self._features.deserialize_example_np(next(self._parent)))
        except (ValueError, KeyError, OverflowError, MemoryError, DecodeError) as error:
            raise UserError(
                f"{self._path} is damaged after byte {begin}; copy or prepare it again"
            ) from error

    def get_state(self) -> dict[str, Any]:
        return self._parent.get_state()

    def set_state(self, state: dict[str, Any]) -> None:
        self._parent.set_state(state)


class _JsonLines(grain.IterDataset[str]):
    def __init__(self, path: Path):
        super().__init__()
        self._path = path

    def __iter__(self) -> "_JsonLinesIterator":
        return _JsonLinesIterator(self._path)


class _JsonLinesIterator(grain.DatasetIterator[str]):
    """State: the number of lines read. Restoring reads over them: gzip has no index."""

    def __init__(self, path: Path):
        super().__init__()
        self._path = path
        self._lines = self._open()
        self._read = 0

    def _open(self) -> Iterator[str]:
        with gzip.open(self._path, "rt", encoding="utf-8") as file:
            yield from file

    def _line(self) -> str:
        try:
            line = next(self._lines)
        except (EOFError, zlib.error, gzip.BadGzipFile, UnicodeDecodeError) as error:
            raise UserError(
                f"{self._path} is damaged after line {self._read} ({error}); download it again"
            ) from error
        self._read += 1
        return line

    def __next__(self) -> str:
        line = self._line()
        try:
            return json.loads(line)["text"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise UserError(
                f"{self._path}, line {self._read}: not a C4 record, a JSON object with a text"
            ) from error

    def get_state(self) -> dict[str, Any]:
        return {"lines": self._read}

    def set_state(self, state: dict[str, Any]) -> None:
        self._lines, self._read = self._open(), 0
        while self._read < state["lines"]:
            self._line()


def _text(example: dict[str, Any]) -> str:
    text = example["text"]
    return text.decode("utf-8") if isinstance(text, bytes) else text
