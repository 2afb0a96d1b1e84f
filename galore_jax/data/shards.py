"""Shards of C4 that are read from start to end, json.gz and TFRecord, as a resumable stream."""

import contextlib
import dataclasses
import gzip
import itertools
import json
import os
import zlib
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import grain
import numpy as np
from google.protobuf.message import DecodeError

from galore_jax.errors import UserError

# What TFDS raises for bytes that are not the record it expects.
BAD_RECORD = (ValueError, KeyError, TypeError, OverflowError, MemoryError, DecodeError)
_WINDOW = 4_096  # documents shuffled together

Records = Generator[tuple[str, int], None, None]  # texts, each with the position after it in its file
_Documents = Generator[tuple[str, dict[str, int]], None, None]  # the same, with the place in its epoch


@dataclasses.dataclass(frozen=True)
class Shards:
    """C4 as files that are read from start to end.

    Attributes:
      read: gives the texts of a file from a position on, 0 at first; ``read_json_lines``, or
        ``read_tfrecords`` with its features.
      paths: the files of each split.
      description: the form and size, in a few words.
    """

    read: Callable[[Path, int], Records]
    paths: dict[str, list[Path]]
    description: str

    def first_texts(self) -> Iterator[str | None]:
        """Reads the first text of every shard, None where a shard has none.

        Raises:
          UserError: a shard cannot be read; which one.
        """
        for path in (*self.paths["validation"], *self.paths["train"]):
            with contextlib.closing(self.read(path, 0)) as records:
                yield next(records, (None, 0))[0]

    def texts(self, split: str, *, seed: int | None) -> grain.IterDataset[str]:
        """Texts in order, once, for a seed of None; else without end, shuffled anew each epoch.

        The order of the files is shuffled, and then the documents within windows of 4,096. An
        epoch's last window ends with the epoch, so that each epoch holds each document once.
        """
        return _ShardTexts(self.read, self.paths[split], seed)


def read_json_lines(path: Path, position: int) -> Records:
    """Reads a json.gz shard from after its first ``position`` lines, which it must read over.

    Raises:
      UserError: the file is damaged, or a line is not a JSON object with a text; where.
    """
    number = 0
    try:
        with gzip.open(path) as file:
            for number, line in enumerate(file, start=1):
                if number > position:
                    yield _json_text(line, f"{path}, line {number}"), number
        if not path.stat().st_size:
            raise EOFError("the file is empty")
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(
            f"{path} is damaged after line {number} ({error}); download it again"
        ) from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error


def _json_text(line: bytes, place: str) -> str:
    try:
        text = json.loads(line)["text"]
        if not isinstance(text, str):
            raise TypeError(f"text is {type(text).__name__}")
        text.encode()  # fails for half a surrogate pair, which JSON can hold and no text has
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(
            f"{place}: not a C4 record, a JSON object whose text is a string"
        ) from error
    return text


def read_tfrecords(path: Path, position: int, *, features: Any) -> Records:
    """Reads a TFRecord shard from byte ``position`` on; its checksums are not looked at.

    Raises:
      UserError: the file is damaged, or a record is not one of C4's; after which byte.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if not size:
                raise EOFError("the file is empty")
            file.seek(position)
            # A length of 8 bytes and its checksum, the record, its checksum; checksums have 4.
            while header := file.read(12):
                end = position + 12 + int.from_bytes(header[:8], "little") + 4
                if len(header) < 12 or end > size:
                    raise EOFError("the file ends within a record")
                record = file.read(end - position - 12)[:-4]
                yield example_text(features.deserialize_example_np(record)), end
                position = end
    except (EOFError, *BAD_RECORD) as error:
        raise UserError(
            f"{path} is damaged after byte {position} ({one_line(error)}); copy or prepare it again"
        ) from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error


def example_text(example: dict[str, Any]) -> str:
    """Returns the text of one of TFDS's examples.

    Raises:
      TypeError, ValueError: the example has another kind of text.
    """
    text = example["text"]
    if not isinstance(text, bytes):
        raise TypeError(f"text is {type(text).__name__}")
    return text.decode("utf-8")


def one_line(error: BaseException) -> str:
    """Returns an error's first 120 characters, for the end of a message of one line."""
    return " ".join(f"{error}".split())[:120] or type(error).__name__


class _ShardTexts(grain.IterDataset[str]):
    def __init__(self, read: Callable[[Path, int], Records], paths: list[Path], seed: int | None):
        super().__init__()
        self._arguments = read, paths, seed

    def __iter__(self) -> "_ShardTextsIterator":
        return _ShardTextsIterator(*self._arguments)


class _ShardTextsIterator(grain.DatasetIterator[str]):
    """Reads windows of documents, none of which spans two epochs, and returns each shuffled.

    State: where the window begins (the epoch, the place of its shard in the epoch's order, the
    position in that shard), and how many of the window's documents were returned.
    """

    def __init__(self, read: Callable[[Path, int], Records], paths: list[Path], seed: int | None):
        super().__init__()
        self._read, self._paths, self._seed = read, paths, seed
        self._documents = self._rest_of_epoch(0, 0, 0)
        self._start_epoch(0)

    def _start_epoch(self, epoch: int) -> None:
        self.set_state({"epoch": epoch, "shard": 0, "position": 0, "returned": 0})

    def _rest_of_epoch(self, epoch: int, shard: int, position: int) -> _Documents:
        order = np.arange(len(self._paths))
        if self._seed is not None:
            order = np.random.default_rng([self._seed, epoch]).permutation(order)
        for place in range(shard, len(order)):
            with contextlib.closing(self._read(self._paths[order[place]], position)) as records:
                for text, after in records:
                    yield text, {"epoch": epoch, "shard": place, "position": after}
            position = 0

    def _read_window(self) -> list[str]:
        size = 1 if self._seed is None else _WINDOW
        documents = list(itertools.islice(self._documents, size))
        if documents:
            self._end = documents[-1][1]
        texts = [text for text, _ in documents]
        if self._seed is not None:
            np.random.default_rng([self._seed, *self._begin.values()]).shuffle(texts)
        return texts

    def __next__(self) -> str:
        self._assert_not_closed()
        while True:
            if self._window is None:
                self._window = self._read_window()
            if self._returned < len(self._window):
                self._returned += 1
                return self._window[self._returned - 1]
            if self._window:
                self._begin, self._window, self._returned = self._end, None, 0
            elif self._seed is None:
                raise StopIteration
            elif self._begin["shard"] == self._begin["position"] == 0:
                raise UserError(f"no documents in {self._paths[0].parent}")
            else:
                self._start_epoch(self._begin["epoch"] + 1)

    def get_state(self) -> dict[str, int]:
        return {**self._begin, "returned": self._returned}

    def set_state(self, state: dict[str, int]) -> None:
        self._documents.close()
        self._begin = self._end = {key: state[key] for key in ("epoch", "shard", "position")}
        self._documents = self._rest_of_epoch(**self._begin)
        self._window: list[str] | None = None  # not read yet
        self._returned = state["returned"]

    def close(self) -> None:
        super().close()
        self._documents.close()
