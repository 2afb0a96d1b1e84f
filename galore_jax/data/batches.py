"""From documents to batches of tokens and targets, from any position on."""

import atexit
import dataclasses
from collections.abc import Iterator
from typing import Any, ClassVar, Self

import grain
import numpy as np

from galore_jax.data.c4 import RandomAccess, Shards, check_tfds, find_c4
from galore_jax.data.packing import PackedRows
from galore_jax.data.sample import prepare_sample
from galore_jax.data.tokenizer import Tokenizer, check_vocabulary
from galore_jax.errors import UserError

IGNORED = -1  # the target where there is nothing to predict

Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What to read, and how to lay it out.

    Attributes:
      name: ``"c4"`` or ``"sample"``.
      data_dir: the folder that holds C4; not for the sample.
      tokenizer: path of a SentencePiece model; None takes the sample's own.
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
        self._source: RandomAccess | Shards
        if config.name == "sample":
            if config.data_dir is not None:
                raise UserError("config.data.data_dir is for c4; the sample has a cache of its own")
            data_dir, tokenizer = prepare_sample()
            self._source = find_c4(str(data_dir))
            self.tokenizer = Tokenizer(config.tokenizer or tokenizer)
        elif config.name == "c4":
            self._source = find_c4(config.data_dir)
            if config.tokenizer is None:
                raise UserError(
                    "config.data.tokenizer is not set; give a SentencePiece model, for the "
                    "paper's runs the spiece.model of t5-base"
                )
            self.tokenizer = Tokenizer(config.tokenizer)
        else:
            raise UserError(f"config.data.name={config.name!r} must be c4 or sample")
        check_vocabulary(self.tokenizer, vocab_size)
        self.source = f"{config.name}: {self._source.description}"

    def train_batches(self, *, batch_size: int, seed: int) -> "Batches":
        """Gives batches without end, each epoch in an order of its own, read ahead by a thread."""
        rows = self._rows("train", seed=seed).batch(batch_size, drop_remainder=True)
        return Batches(
            iter(grain.experimental.ThreadPrefetchIterDataset(rows, prefetch_buffer_size=4))
        )

    def eval_batches(self, *, batch_size: int) -> "Batches":
        """Gives the held-out split once, in order; the last batch is filled with rows of -1."""

        def fill(batch: Batch) -> Batch:
            missing = ((0, batch_size - len(batch["tokens"])), (0, 0))
            return {
                "tokens": np.pad(batch["tokens"], missing, constant_values=self.tokenizer.pad_id),
                "targets": np.pad(batch["targets"], missing, constant_values=IGNORED),
            }

        # Without a thread: the device is given a batch and works on it while this reads the next.
        rows = self._rows("validation", seed=None).batch(batch_size, drop_remainder=False)
        return Batches(iter(rows.map(fill)))

    def _rows(self, split: str, *, seed: int | None) -> grain.IterDataset[Batch]:
        documents = self._source.texts(split, seed=seed).map(self.tokenizer.encode)
        length, pad_id = self._config.seq_len, self.tokenizer.pad_id
        if self._config.packing:
            return PackedRows(documents, length, pad_id=pad_id, ignored=IGNORED)
        eos_id = self.tokenizer.eos_id
        return documents.map(lambda ids: document_row(ids, length, eos_id=eos_id, pad_id=pad_id))


class Batches(Iterator[Batch]):
    """An iterator of batches, to be closed: ``with data.train_batches(...) as batches:``.

    Its end and an error close it too. Its state is a dict of JSON values, the position after the
    batch returned last, and is restored exactly, in another process too.
    """

    # Grain's iterator that reads ahead joins its thread when it is collected as garbage: at any
    # moment, in any thread, holding whatever locks that thread holds. If the joined thread waits
    # for one of them (seen: the lock of all ThreadPoolExecutors, held in ``submit``), both wait
    # for ever. https://github.com/google/grain/pull/1373 proposes a ``__del__`` that never joins.
    # So that none is ever collected, all that are open are kept here, those forgotten to the end.
    _open: ClassVar[set[grain.DatasetIterator[Batch]]] = set()

    def __init__(self, batches: grain.DatasetIterator[Batch]):
        self._batches = batches
        self._open.add(batches)

    def __next__(self) -> Batch:
        if self._batches not in self._open:
            raise StopIteration
        try:
            return next(self._batches)
        except BaseException:
            self.close()
            raise

    def get_state(self) -> dict[str, Any]:
        """Returns the position after the batch returned last."""
        return self._batches.get_state()

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes to a position that ``get_state`` gave."""
        self._batches.set_state(state)

    def close(self) -> None:
        """Stops the thread and closes the files; there are no more batches then."""
        self._batches.close()
        self._open.discard(self._batches)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @classmethod
    def _close_all(cls) -> None:
        for batches in tuple(cls._open):
            batches.close()


# A thread that is still tokenising when the interpreter ends aborts the whole process.
atexit.register(Batches._close_all)


def document_row(ids: np.ndarray, length: int, *, eos_id: int, pad_id: int) -> Batch:
    """One document as a row: cut so that it still ends with the end token, or padded.

    >>> row = document_row(np.array([7, 8, 1]), 5, eos_id=1, pad_id=0)
    >>> row["tokens"].tolist(), row["targets"].tolist()
    ([7, 8, 1, 0, 0], [8, 1, -1, -1, -1])
    >>> document_row(np.array([7, 8, 9, 1]), 3, eos_id=1, pad_id=0)["tokens"].tolist()
    [7, 8, 1]
    """
    ids = ids if len(ids) <= length else np.append(ids[: length - 1], eos_id)
    tokens = np.full(length, pad_id, np.int32)
    targets = np.full(length, IGNORED, np.int32)
    tokens[: len(ids)] = ids
    targets[: len(ids) - 1] = ids[1:]
    return {"tokens": tokens, "targets": targets}
