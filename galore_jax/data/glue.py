"""GLUE's tasks on disk: as TFDS prepares them, or as the public folders of .tsv files.

GLUE: Wang et al. 2018, arXiv:1804.07461. Each split is read whole, for the largest has 400 thousand
sentences; every label is checked as it is read.
"""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds

from galore_jax.data import shards
from galore_jax.data.glue_tasks import TASKS, GlueTask
from galore_jax.data.tfds_folders import check_tfds, newest_version
from galore_jax.errors import UserError

_HIGHEST = 5.0  # similarity in stsb, from 0


class Examples(NamedTuple):
    """A split of a task.

    Attributes:
      texts: a list for each text of an example.
      labels: int32 classes or float32 numbers, (examples,).
    """

    texts: tuple[list[str], ...]
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)


class Glue(NamedTuple):
    """A task's data.

    Attributes:
      splits: ``train`` and the held-out ones.
      description: the form and size, in a few words.
    """

    splits: dict[str, Examples]
    description: str


def read_glue(name: str, data_dir: str | Path | None) -> Glue:
    """Reads a task's training and held-out splits.

    Args:
      name: a key of ``TASKS``.
      data_dir: holds ``glue/NAME/VERSION`` as TFDS writes it (or is ``glue``, ``NAME`` or
        ``VERSION`` itself), or the public folder of .tsv files (or is that).

    Raises:
      UserError: no such data there, a split or a column that is missing, a file that is damaged, a
        label outside the range.
    """
    task = TASKS[name]
    how_to = (
        f"prepare it with tfds.builder('glue/{name}', data_dir=DIR, file_format='array_record')"
        f".download_and_prepare() or put the public {task.tsv.folder} folder of .tsv files there, "
        "and give that folder as --config.data.data_dir=DIR; or use configs/reviews.py"
    )
    if data_dir is None:
        raise UserError(f"config.data.data_dir is not set and GLUE must be on disk; {how_to}")
    root = Path(data_dir).expanduser()
    if not root.is_dir():
        raise UserError(f"config.data.data_dir={root} is no folder; {how_to}")
    if (root / "dataset_info.json").is_file():
        return _read_tfds(task, root)
    for folder in (root / "glue" / name, root / name, root):
        if (version := newest_version(folder)) is not None:
            return _read_tfds(task, version)
    for folder in (root / task.tsv.folder, root):
        if (folder / "train.tsv").is_file():
            return _read_tsv(task, folder)
    raise UserError(
        f"no {name} in {root}: looked for {root / 'glue' / name}/VERSION/dataset_info.json and for "
        f"{root / task.tsv.folder / 'train.tsv'}; {how_to}"
    )


def _read_tfds(task: GlueTask, folder: Path) -> Glue:
    check_tfds()
    builder: Any = tfds.builder_from_directory(folder)
    info = builder.info
    _require((*task.texts, "label"), tuple(sorted(info.features)), "feature", str(folder))
    splits, form = {}, info.file_format.value
    for split in ("train", *task.held_out):
        if split not in info.splits or not info.splits[split].num_examples:
            raise UserError(f"{folder} has no {split} split, only {', '.join(info.splits)}")
        for path in map(Path, info.splits[split].filepaths):
            if not path.is_file():
                raise UserError(f"{folder} is incomplete: {path.name} is missing or not a file")
        if form == "array_record":
            rows = _array_records(builder, split)
        elif form == "tfrecord":
            rows = _tfrecords(info.splits[split].filepaths, info.features)
        else:
            raise UserError(
                f"{folder} has TFDS's format {form}, which is not read here; array_record and "
                "tfrecord are"
            )
        splits[split] = _collect(task, _checked_rows(task, rows, f"{folder}, {split}"))
    return Glue(splits, f"{form}, {len(splits['train'])} examples")


def _array_records(builder: Any, split: str) -> Iterator[Any]:
    source = builder.as_data_source(split=split)
    for i in range(len(source)):
        try:
            yield source[i]
        except (RuntimeError, *shards.BAD_RECORD) as error:  # RuntimeError: array_record's own
            raise UserError(
                f"{split} in {builder.data_dir} is damaged at record {i + 1} "
                f"({shards.one_line(error)}); copy or prepare it again"
            ) from error


def _tfrecords(paths: Any, features: Any) -> Iterator[Any]:
    for path in paths:
        for row, _ in shards.read_tfrecords(Path(path), 0, features=features, take=lambda x: x):
            yield row


def _checked_rows(task: GlueTask, rows: Iterator[Any], where: str) -> Iterator[tuple[Any, ...]]:
    """Yields (text, ..., label) of TFDS's examples."""
    for number, row in enumerate(rows, start=1):
        place = f"{where}, record {number}"
        try:
            texts = [row[key].decode("utf-8") for key in task.texts]
        except (AttributeError, UnicodeDecodeError) as error:
            raise UserError(f"{place}: a text is no UTF-8 ({shards.one_line(error)})") from error
        yield *texts, _label(task, row["label"], place)


def _label(task: GlueTask, label: Any, place: str) -> float | int:
    """Checks a label, a number."""
    if len(task.labels) == 1:
        value, highest = float(label), _HIGHEST
        allowed = f"a number from 0 to {_HIGHEST:g}"
    else:
        value, highest = int(label), len(task.labels) - 1
        allowed = " or ".join(f"{i} ({name})" for i, name in enumerate(task.labels))
    if not math.isfinite(value) or not 0 <= value <= highest or value != label:
        raise UserError(f"{place}: the label is {label}; it must be {allowed}")
    return value


def _collect(task: GlueTask, rows: Iterator[tuple[Any, ...]]) -> Examples:
    columns = list(zip(*rows, strict=True))
    dtype = np.float32 if len(task.labels) == 1 else np.int32
    return Examples(tuple(map(list, columns[:-1])), np.asarray(columns[-1], dtype))


def _require(wanted: tuple[Any, ...], found: tuple[Any, ...], what: str, where: str) -> None:
    missing = [str(name) for name in wanted if name not in found]
    if missing:
        raise UserError(
            f"{where} lacks the {what} {', '.join(missing)}; it has {', '.join(map(str, found))}"
        )


def _read_tsv(task: GlueTask, folder: Path) -> Glue:
    files = dict(zip(("train", *task.held_out), ("train.tsv", *task.tsv.held_out), strict=True))
    splits = {}
    for split, file in files.items():
        rows = list(_tsv_rows(task, folder / file))
        if not rows:
            raise UserError(f"{folder / file} has no examples")
        splits[split] = _collect(task, iter(rows))
    return Glue(splits, f"tsv, {len(splits['train'])} examples")


def _tsv_rows(task: GlueTask, path: Path) -> Iterator[tuple[Any, ...]]:
    try:
        lines = path.read_bytes().decode("utf-8-sig").split("\n")  # a text may hold other breaks
    except FileNotFoundError as error:
        raise UserError(f"{path.parent} lacks {path.name}") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is no UTF-8: {shards.one_line(error)}") from error
    columns, begin = task.tsv.columns, 0
    if isinstance(columns[0], str):
        header = tuple(lines[0].rstrip("\r").split("\t"))
        _require(columns, header, "column", str(path))
        columns, begin = tuple(header.index(str(name)) for name in columns), 1
    parse = _tsv_label(task)
    for number, line in enumerate(lines[begin:], start=begin + 1):
        cells = line.rstrip("\r").split("\t")
        if not line.strip():
            continue
        if len(cells) <= max(map(int, columns)):
            if task.tsv.skips_short_rows:
                continue
            raise UserError(
                f"{path}, line {number}: there are {len(cells)} columns, and "
                f"{max(map(int, columns)) + 1} are needed"
            )
        *texts, label = (cells[int(i)] for i in columns)
        yield *texts, parse(label, f"{path}, line {number}")


def _tsv_label(task: GlueTask) -> Callable[[str, str], float | int]:
    names = {name: i for i, name in enumerate(task.labels)}

    def parse(text: str, place: str) -> float | int:
        if text in names:
            return names[text]
        try:
            return _label(task, float(text), place)
        except ValueError as error:
            allowed = " or ".join(task.labels)
            raise UserError(f"{place}: the label is {text!r}; it must be {allowed}") from error

    return parse
