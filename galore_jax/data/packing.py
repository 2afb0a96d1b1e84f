"""Documents laid out as rows of tokens and targets: one a row, or packed without a gap."""

import collections
from collections.abc import Generator, Iterator, Sequence
from typing import Any

import numpy as np

IGNORED = -1  # the target where there is nothing to predict

Row = dict[str, np.ndarray]


def document_row(ids: np.ndarray, length: int, *, eos_id: int, pad_id: int) -> Row:
    """Lays out one document: cut so that it still ends with the end token, or padded.

    >>> row = document_row(np.array([7, 8, 1]), 5, eos_id=1, pad_id=0)
    >>> row["tokens"].tolist(), row["targets"].tolist()
    ([7, 8, 1, 0, 0], [8, 1, -1, -1, -1])
    >>> document_row(np.array([7, 8, 9, 1]), 3, eos_id=1, pad_id=0)["tokens"].tolist()
    [7, 8, 1]
    """
    ids = ids if len(ids) <= length else np.append(ids[: length - 1], eos_id)
    return _row(ids, length, pad_id)


def packed_rows(
    documents: Iterator[tuple[np.ndarray, Sequence[int]]],
    length: int,
    *,
    pad_id: int,
    place: Sequence[int] = (),
    offset: int = 0,
) -> Generator[tuple[Row, dict[str, Any]], None, None]:
    """Yields rows of ``length`` tokens, each with the following token as its target.

    Row k holds tokens ``k * length`` to ``(k + 1) * length - 1`` of the stream of all documents;
    the target of its last token is the first token of row k + 1. A stream that ends leaves a last
    row that is padded, so that each token but the stream's first is a target once.

    Args:
      documents: arrays of ids, (any length of at least 1,) int32, each with the place after it.
      length: tokens a row.
      pad_id: fills ``tokens`` after the end of the stream.
      place: the place before the first document; with ``offset`` yielded with each row, to go on.
      offset: ids of the first document that are left out.
    """
    waiting: collections.deque[tuple[Sequence[int], np.ndarray]] = collections.deque()
    available = -offset
    while True:
        while available <= length and (document := next(documents, None)) is not None:
            ids, after = document
            waiting.append((place, ids))
            place = after
            available += len(ids)
        if available < 2:
            return
        stream = np.concatenate([ids for _, ids in waiting])[offset:][: length + 1]
        offset += len(stream) - 1
        available -= len(stream) - 1
        while waiting and offset >= len(waiting[0][1]):
            offset -= len(waiting.popleft()[1])
        before = waiting[0][0] if waiting else place
        yield _row(stream, length, pad_id), {"place": before, "offset": offset}


def _row(ids: np.ndarray, length: int, pad_id: int) -> Row:
    tokens = np.full(length, pad_id, np.int32)
    targets = np.full(length, IGNORED, np.int32)
    tokens[: len(ids)] = ids[:length]
    targets[: len(ids) - 1] = ids[1:]
    return {"tokens": tokens, "targets": targets}
