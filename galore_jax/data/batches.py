"""Batches of tokens and targets from documents, resumable at any position."""

import atexit
import dataclasses
import itertools
import queue
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, closing, suppress
from typing import Any, ClassVar

import numpy as np

from galore_jax.data.c4 import find_c4
from galore_jax.data.packing import IGNORED, document_row, packed_rows
from galore_jax.data.sample import prepare_sample
from galore_jax.data.tfds_folders import check_tfds
from galore_jax.data.tokenizer import open_tokenizer
from galore_jax.errors import UserError

Batch = dict[str, np.ndarray]
State = dict[str, Any]  # of JSON values
_Stream = Generator[tuple[Batch, State], None, None]  # each with the state after it


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Says which texts to read and how to lay them out.

    Attributes:
      name: ``"c4"`` or ``"sample"``.
      data_dir: the folder that holds C4; not for the sample.
      tokenizer: path of a SentencePiece model, a ``tokenizer.json`` or a folder with either; None
        takes the sample's own.
      seq_len: tokens a row.
      packing: False: one document a row, cut or padded. True: documents joined into one stream.
    """

    name: str
    data_dir: str | None
    tokenizer: str | None
    seq_len: int
    packing: bool


class TextData:
    """Training and held-out batches of one data set.

    A batch is a dict of ``tokens`` and ``targets``, each (batch_size, seq_len) int32.
    ``targets[b, t]`` is the token that position t must predict, or -1 for nothing.

    Without packing a row is one document, as in the reference: its first ``seq_len - 1`` ids and
    the end token, padded; the last token has no target. With packing the rows are cut from the
    stream of all documents, each ended by the end token; every position has a target, and no
    target is lost or repeated where rows meet.

    Attributes:
      tokenizer: the tokenizer of the texts.
      source: which texts these are, in a line: a run that resumes must find the same.
    """

    def __init__(self, config: DataConfig, *, vocab_size: int):
        """Opens the data, building the sample if it is the first time.

        Raises:
          UserError: data or tokenizer missing or unreadable; a tokenizer of more ids than
            ``vocab_size``.
        """
        check_tfds()
        self._config = config
        data_dir, tokenizer = config.data_dir, config.tokenizer
        if config.name == "sample":
            if data_dir is not None:
                raise UserError("config.data.data_dir is for c4; the sample has a cache of its own")
            data_dir, own_tokenizer = prepare_sample()
            tokenizer = tokenizer or own_tokenizer
        elif config.name != "c4":
            raise UserError(f"config.data.name={config.name!r} must be c4 or sample")
        self._source = find_c4(data_dir)
        if tokenizer is None:
            raise UserError(
                "config.data.tokenizer is not set; give a SentencePiece model or a tokenizer.json, "
                "for the paper's runs the spiece.model of t5-base"
            )
        self.tokenizer = open_tokenizer(tokenizer)
        if self.tokenizer.vocab_size > vocab_size:
            raise UserError(
                f"the tokenizer has {self.tokenizer.vocab_size} ids and the model a vocabulary of "
                f"{vocab_size}; set config.model.vocab_size={self.tokenizer.vocab_size} or more"
            )
        self.source = f"{config.name}: {self._source.description}"

    def train_batches(self, *, batch_size: int, seed: int) -> "Batches":
        """Gives batches without end, each epoch in an order of its own, read ahead by a thread."""
        seed %= 2**32  # as Grain's shuffle wants it
        return Batches(lambda state: read_ahead(self._batches("train", batch_size, seed, state)))

    def eval_batches(self, *, batch_size: int) -> "Batches":
        """Gives the held-out split once, in order; the last batch is filled with rows of -1.

        No thread reads ahead: the next batch is read while the device works on the last one.
        """
        return Batches(lambda state: self._batches("validation", batch_size, None, state))

    def _batches(self, split: str, size: int, seed: int | None, state: State) -> _Stream:
        length, encode = self._config.seq_len, self.tokenizer.encode
        eos_id, pad_id = self.tokenizer.eos_id, self.tokenizer.pad_id
        with closing(self._source.texts(split, seed=seed, place=state.get("place", ()))) as texts:
            documents = ((encode(text), after) for text, after in texts)
            if self._config.packing:
                rows = packed_rows(documents, length, pad_id=pad_id, **state)
            else:
                rows = (
                    (document_row(ids, length, eos_id=eos_id, pad_id=pad_id), {"place": after})
                    for ids, after in documents
                )
            while taken := list(itertools.islice(rows, size)):
                tokens = np.full((size, length), pad_id, np.int32)
                targets = np.full((size, length), IGNORED, np.int32)
                for i, (row, _) in enumerate(taken):
                    tokens[i], targets[i] = row["tokens"], row["targets"]
                yield {"tokens": tokens, "targets": targets}, taken[-1][1]


class Batches(Iterator[Batch], AbstractContextManager["Batches", None]):
    """An iterator of batches, to be closed: ``with data.train_batches(...) as batches:``.

    Its end and an error close it too.
    """

    # Closing a stream that reads ahead joins its thread. The garbage collector would do so at any
    # moment, in any thread, whatever locks that thread holds, and if the joined thread waits for
    # one of them, neither goes on. This was seen with Grain's ThreadPrefetchDatasetIterator, whose
    # __del__ joins, in ThreadPoolExecutor.submit, which holds a lock of all executors (a mend is
    # proposed in https://github.com/google/grain/pull/1373). So open streams are kept here, and
    # one that is forgotten stays open until the process ends.
    _open: ClassVar[set[_Stream]] = set()

    def __init__(self, read: Callable[[State], _Stream]):
        self._read = read
        self._batches = read({})
        self.set_state({})

    def __next__(self) -> Batch:
        try:
            batch, self._state = next(self._batches)
        except BaseException:
            self.close()
            raise
        return batch

    def get_state(self) -> State:
        """Returns the position after the batch returned last, a dict of JSON values."""
        return self._state

    def set_state(self, state: State) -> None:
        """Goes exactly to a position that ``get_state`` gave, in another process too."""
        self.close()
        self._state, self._batches = state, self._read(state)
        self._open.add(self._batches)

    def close(self) -> None:
        """Stops the thread and closes the files; there are no more batches then."""
        self._batches.close()
        self._open.discard(self._batches)

    def __exit__(self, *exception: object) -> None:
        self.close()


@atexit.register
def _close_all() -> None:
    # A thread that is still tokenising when the interpreter ends aborts the whole process.
    for stream in tuple(Batches._open):
        stream.close()


def read_ahead(stream: _Stream, *, count: int = 4) -> _Stream:
    """Yields what ``stream`` does, which a thread reads up to ``count`` ahead, until closed."""
    buffer: queue.Queue[Any] = queue.Queue(count)
    stop = threading.Event()

    def read() -> None:
        end = None
        try:
            with closing(stream):
                for item in stream:
                    buffer.put(item)
                    if stop.is_set():
                        return
        except BaseException as error:  # raised again where the items are wanted
            end = error
        buffer.put(end)

    thread = threading.Thread(target=read, name="read-ahead", daemon=True)
    thread.start()
    try:
        while isinstance(item := buffer.get(), tuple):
            yield item
        if item is not None:
            raise item
    finally:
        stop.set()
        while thread.is_alive():
            with suppress(queue.Empty):
                buffer.get_nowait()  # it may be waiting for room
            thread.join(timeout=0.01)
