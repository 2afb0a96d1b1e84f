"""Documents joined into one stream and cut into rows, resumable in the middle of a document."""

import collections
from collections.abc import Generator, Iterator
from typing import Any

import numpy as np

Row = dict[str, np.ndarray]


def packed_rows(
    documents: Iterator[tuple[np.ndarray, Any]],
    length: int,
    *,
    pad_id: int,
    ignored: int,
    place: Any,
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
      ignored: fills ``targets`` there.
      place: the place before the first document.
      offset: ids of the first document that are left out.

    Yields:
      A row, and the ``place`` and ``offset`` from which the next row is had again.
    """
    waiting: collections.deque[tuple[Any, np.ndarray]] = collections.deque()
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
        tokens = np.full(length, pad_id, np.int32)
        targets = np.full(length, ignored, np.int32)
        targets[: len(stream) - 1] = stream[1:]
        tokens[: min(len(stream), length)] = stream[:length]
        offset += len(stream) - 1
        available -= len(stream) - 1
        while waiting and offset >= len(waiting[0][1]):
            offset -= len(waiting.popleft()[1])
        before = waiting[0][0] if waiting else place
        yield {"tokens": tokens, "targets": targets}, {"place": before, "offset": offset}
