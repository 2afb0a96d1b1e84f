"""Shards of C4 that are read from start to end, json.gz and TFRecord, as a resumable stream."""

import dataclasses
import gzip
import itertools
import json
import os
import zlib
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
from google.protobuf.message import DecodeError

from galore_jax.errors import UserError

# TFDS raises these for bytes that are not the record it expects.
BAD_RECORD = (ValueError, KeyError, TypeError, OverflowError, MemoryError, DecodeError)
_WINDOW = 4_096  # documents shuffled together

Texts = Generator[tuple[str, Sequence[int]], None, None]  # each with the place after it
_Records = Generator[tuple[str, int], None, None]  # each with the position after it in its file


@dataclasses.dataclass(frozen=True)
class Shards:
    """C4 as files that are read from start to end.

    Attributes:
      read: yields the texts of a file from a position on, 0 at first; ``read_json_lines``, or
        ``read_tfrecords`` with its features.
      paths: the files of each split.
      description: the form and size, in a few words.
    """

    read: Callable[[Path, int], _Records]
    paths: dict[str, list[Path]]
    description: str

    def first_texts(self) -> Iterator[str | None]:
        """Reads the first text of every shard; one that cannot be read is a UserError."""
        for path in itertools.chain(*self.paths.values()):
            with closing(self.read(path, 0)) as records:
                yield next(records, (None, 0))[0]

    def texts(self, split: str, *, seed: int | None, place: Sequence[int] = ()) -> Texts:
        """Yields texts in order, once, for a seed of None; else without end, shuffled each epoch.

        The order of the files is shuffled, and then the documents within windows of 4,096. An
        epoch's last window ends with the epoch, so that each epoch holds each document once.

        Args:
          split: ``"train"`` or ``"validation"``.
          seed: decides the order.
          place: where to go on: the epoch, the shard in its order and the position in that file
            where a window begins, and how many of the window's texts were yielded before.
        """
        epoch, shard, position, yielded = place or (0, 0, 0, 0)
        size = 1 if seed is None else _WINDOW
        while True:
            with closing(self._rest_of_epoch(split, seed, epoch, shard, position)) as documents:
                while window := list(itertools.islice(documents, size)):
                    _, end = window[-1]
                    if seed is not None:
                        np.random.default_rng([seed, epoch, shard, position]).shuffle(window)
                    for i in range(yielded, len(window)):
                        yield window[i][0], (epoch, shard, position, i + 1)
                    (shard, position), yielded = end, 0
            if seed is None:
                return
            if shard == position == 0:
                raise UserError(f"no documents in {self.paths[split][0].parent}")
            epoch, shard, position = epoch + 1, 0, 0

    def _rest_of_epoch(
        self, split: str, seed: int | None, epoch: int, shard: int, position: int
    ) -> Generator[tuple[str, tuple[int, int]], None, None]:
        paths = self.paths[split]
        if seed is not None:
            order = np.random.default_rng([seed, epoch]).permutation(len(paths))
            paths = [paths[i] for i in order]
        for rank in range(shard, len(paths)):
            with closing(self.read(paths[rank], position)) as records:
                for text, after in records:
                    yield text, (rank, after)
            position = 0


def read_json_lines(path: Path, position: int) -> _Records:
    """Reads a json.gz shard after ``position`` lines; UserErrors say where it is damaged."""
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


def read_tfrecords(
    path: Path, position: int, *, features: Any, take: Callable[[Any], Any] | None = None
) -> Generator[tuple[Any, int], None, None]:
    """Reads a TFRecord shard from byte ``position`` on; UserErrors say where it is damaged.

    ``take`` makes of one of TFDS's examples what is yielded; by default its text.
    """
    take = take or example_text
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if not size:
                raise EOFError("the file is empty")
            file.seek(position)
            # A length of 8 bytes, a checksum of 4, the record, a checksum of 4: these go unread.
            while header := file.read(12):
                end = position + 12 + int.from_bytes(header[:8], "little") + 4
                if len(header) < 12 or end > size:
                    raise EOFError("the file ends within a record")
                record = file.read(end - position - 12)[:-4]
                yield take(features.deserialize_example_np(record)), end
                position = end
    except (EOFError, *BAD_RECORD) as error:
        raise UserError(
            f"{path} is damaged after byte {position} ({one_line(error)}); copy or prepare it again"
        ) from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error


def example_text(example: dict[str, Any]) -> str:
    """Returns the text of one of TFDS's examples, or raises a TypeError or ValueError."""
    text = example["text"]
    if not isinstance(text, bytes):
        raise TypeError(f"text is {type(text).__name__}")
    return text.decode("utf-8")


def one_line(error: BaseException) -> str:
    """Returns an error's first 120 characters, for the end of a message of one line."""
    return " ".join(f"{error}".split())[:120] or type(error).__name__
