"""C4 on disk, in the forms people have it: TFDS array_record or TFRecord, or public json.gz shards.

Each yields texts with the place after each, integers from which it goes on exactly.
"""

import bisect
import functools
import itertools
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import grain
import tensorflow_datasets as tfds

from galore_jax.data import shards
from galore_jax.data.shards import Shards
from galore_jax.data.tfds_folders import newest_version
from galore_jax.errors import UserError

_SPLITS = ("validation", "train")
_SECONDS_TO_LOOK = 3.0  # at shards before training: the first batches meet the rest
_HOW_TO = (
    "prepare it with tfds.builder('c4/en', data_dir=DIR, file_format='array_record')"
    ".download_and_prepare() or put the public en/c4-train.*.json.gz and c4-validation.*.json.gz "
    "shards there, and give that folder as --config.data.data_dir=DIR; or use the offline sample, "
    "--config=configs/sample.py"
)


def find_c4(data_dir: str | Path | None) -> "RandomAccess | Shards":
    """Finds C4 in a folder, and looks at the first record of its shards, for 3 seconds at most.

    Args:
      data_dir: holds ``c4/en/VERSION`` as TFDS writes it, or (itself, or in ``en``) the public
        ``c4-train.*.json.gz`` and ``c4-validation.*.json.gz`` shards.

    Raises:
      UserError: no C4 there: where it was looked for, and what prepares it; or a shard that is
        missing, damaged or no file: which one.
    """
    if data_dir is None:
        raise UserError(f"config.data.data_dir is not set and C4 must be on disk; {_HOW_TO}")
    source = _find(Path(data_dir).expanduser())
    end = time.monotonic() + _SECONDS_TO_LOOK
    for _ in source.first_texts():
        if time.monotonic() > end:
            break
    return source


def _find(root: Path) -> "RandomAccess | Shards":
    if (prepared := newest_version(root / "c4" / "en")) is not None:
        return _open_tfds(prepared)
    for folder in (root, root / "en"):
        paths = {split: sorted(folder.glob(f"c4-{split}.*.json.gz")) for split in _SPLITS}
        if any(paths.values()):
            _check_splits({split: len(paths[split]) for split in _SPLITS}, folder)
            return Shards(shards.read_json_lines, paths, f"{len(paths['train'])} json.gz shards")
    raise UserError(
        f"no C4 in {root}: looked for {root / 'c4/en/VERSION/dataset_info.json'} and for "
        f"c4-train.*.json.gz in {root} and {root / 'en'}; {_HOW_TO}"
    )


def _open_tfds(folder: Path) -> "RandomAccess | Shards":
    builder: Any = tfds.builder_from_directory(folder)
    info = builder.info
    _check_splits({name: split.num_examples for name, split in info.splits.items()}, folder)
    paths = {split: [Path(path) for path in info.splits[split].filepaths] for split in _SPLITS}
    for path in itertools.chain(*paths.values()):
        if not path.is_file():
            raise UserError(f"C4 in {folder} is incomplete: {path.name} is missing or not a file")
    documents = info.splits["train"].num_examples
    if info.file_format == tfds.core.FileFormat.ARRAY_RECORD:
        return RandomAccess(builder, f"array_record, {documents} documents")
    if info.file_format == tfds.core.FileFormat.TFRECORD:
        read = functools.partial(shards.read_tfrecords, features=info.features)
        return Shards(read, paths, f"tfrecord, {documents} documents")
    raise UserError(
        f"C4 in {folder} has TFDS's format {info.file_format}, which is not read here; "
        "array_record and tfrecord are"
    )


def _check_splits(documents: dict[str, int], folder: Path) -> None:
    for split in _SPLITS:
        if not documents.get(split):
            raise UserError(f"C4 in {folder} has no {split} split; {_HOW_TO}")


class RandomAccess:
    """C4 as array_record: any document at once, so that a whole epoch is shuffled."""

    def __init__(self, builder: Any, description: str):
        """Opens what a TFDS builder has prepared; ``description`` tells its form and size."""
        self.description = description
        self._info = builder.info.splits
        self._examples = {split: builder.as_data_source(split=split) for split in _SPLITS}

    def first_texts(self) -> Iterator[str]:
        """Reads the first and the last text of every shard: one cut short has no last text."""
        for split in _SPLITS:
            for begin, end in itertools.pairwise(self._bounds(split)):
                if begin < end:
                    yield self._text(split, begin)
                    yield self._text(split, end - 1)

    def texts(self, split: str, *, seed: int | None, place: Sequence[int] = ()) -> shards.Texts:
        """Yields texts in order, once, for a seed of None; else without end, shuffled each epoch.

        ``place`` is where to go on: the number of texts yielded before.
        """
        order: Any = grain.MapDataset.range(len(self._examples[split]))
        if seed is not None:
            order = order.seed(seed).shuffle().repeat()
        (begin,) = place or (0,)
        for i in range(begin, len(order)):
            yield self._text(split, order[i]), (i + 1,)

    def _text(self, split: str, index: int) -> str:
        try:
            return shards.example_text(self._examples[split][index])
        except (RuntimeError, *shards.BAD_RECORD) as error:  # RuntimeError: array_record's own
            number = bisect.bisect(self._bounds(split), index) - 1
            raise UserError(
                f"{self._info[split].filepaths[number]} is damaged at record "
                f"{index - self._bounds(split)[number] + 1} ({shards.one_line(error)}); "
                "copy or prepare it again"
            ) from error

    def _bounds(self, split: str) -> list[int]:
        """Returns the index of the first text of each shard, and of the end."""
        return list(itertools.accumulate(self._info[split].shard_lengths, initial=0))
