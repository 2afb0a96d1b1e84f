"""Documents joined into one stream and cut into rows, resumable in the middle of a document."""

import collections
from typing import Any

import grain
import numpy as np

Row = dict[str, np.ndarray]


class PackedRows(grain.IterDataset[Row]):
    """Rows of ``length`` tokens, each with the following token as its target.

    Row k holds tokens ``k * length`` to ``(k + 1) * length - 1`` of the stream of all documents;
    the target of its last token is the first token of row k + 1. A stream that ends leaves a last
    row that is padded, so that each token but the stream's first is a target once.

    Args:
      documents: arrays of ids, (any length of at least 1,) int32.
      length: tokens a row.
      pad_id: fills ``tokens`` after the end of the stream.
      ignored: fills ``targets`` there.
    """

    def __init__(
        self,
        documents: grain.IterDataset[np.ndarray],
        length: int,
        *,
        pad_id: int,
        ignored: int,
    ):
        super().__init__(documents)
        self._length, self._pad_id, self._ignored = length, pad_id, ignored

    def __iter__(self) -> "_PackedRowsIterator":
        documents = self._parent.__iter__()
        return _PackedRowsIterator(documents, self._length, self._pad_id, self._ignored)


class _PackedRowsIterator(grain.DatasetIterator[Row]):
    """State: the position before the document in which the next row begins, and how far into it."""

    def __init__(
        self, documents: grain.DatasetIterator[np.ndarray], length: int, pad_id: int, ignored: int
    ):
        super().__init__(documents)
        self._length, self._pad_id, self._ignored = length, pad_id, ignored
        self._open: collections.deque[tuple[Any, np.ndarray]] = collections.deque()
        self._offset = 0

    def __next__(self) -> Row:
        while self._available() <= self._length:
            before = self._parent.get_state()
            try:
                self._open.append((before, next(self._parent)))
            except StopIteration:
                break
        if self._available() < 2:
            raise StopIteration
        stream = np.concatenate([ids for _, ids in self._open])[self._offset :][: self._length + 1]
        tokens = np.full(self._length, self._pad_id, np.int32)
        targets = np.full(self._length, self._ignored, np.int32)
        targets[: len(stream) - 1] = stream[1:]
        tokens[: min(len(stream), self._length)] = stream[: self._length]
        self._offset += len(stream) - 1
        while self._open and self._offset >= len(self._open[0][1]):
            self._offset -= len(self._open.popleft()[1])
        return {"tokens": tokens, "targets": targets}

    def _available(self) -> int:
        return sum(len(ids) for _, ids in self._open) - self._offset

    def get_state(self) -> dict[str, Any]:
        before = self._open[0][0] if self._open else self._parent.get_state()
        return {"documents": before, "offset": self._offset}

    def set_state(self, state: dict[str, Any]) -> None:
        self._open.clear()
        self._parent.set_state(state["documents"])
        self._offset = state["offset"]
