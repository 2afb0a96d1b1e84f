"""Batches of labelled sentences or pairs, resumable at any position."""

import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from galore_jax.data.batches import Batch, Batches, read_ahead
from galore_jax.data.glue import Examples, read_glue
from galore_jax.data.glue_tasks import TASKS
from galore_jax.data.reviews import prepare_reviews
from galore_jax.data.sentence_tokenizer import Encoded, SentenceTokenizer
from galore_jax.errors import UserError

_SHORTEST = 32  # tokens of the shortest rows
_WINDOW = 16  # batches whose examples are put in order of length, so that rows fit their batch


@dataclasses.dataclass(frozen=True)
class SentenceConfig:
    """Says which examples to read and how to lay them out.

    Attributes:
      task: a key of ``galore_jax.data.glue_tasks.TASKS``.
      name: ``"glue"`` or ``"reviews"``.
      data_dir: the folder that holds GLUE; not for the reviews.
      tokenizer: a ``tokenizer.json`` or a folder with one; None for the reviews' own.
      length: the most tokens of an example; what is longer is cut.
      vocab_size: ids must be less than this.
      pad_id: fills short rows.
    """

    task: str
    name: str
    data_dir: str | None
    tokenizer: str | None
    length: int
    vocab_size: int
    pad_id: int

    @property
    def lengths(self) -> tuple[int, ...]:
        """The few lengths that rows have, ascending.

        >>> SentenceConfig("sst2", "reviews", None, None, 64, 100, 0).lengths
        (32, 48, 64)
        """
        lengths = {self.length}
        while min(lengths) >= 2 * _SHORTEST:
            lengths.add(-(-min(lengths) // 2))
        if len(lengths) == 2:
            lengths.add(-(-3 * self.length // 4))
        return tuple(sorted(lengths))


class SentenceData:
    """Training and held-out batches of a task.

    A batch is a dict of ``tokens``, ``mask`` and ``token_types``, each (batch_size, length) int32
    for the shortest of ``config.lengths`` that holds its rows; ``labels`` (batch_size,), int32, or
    float32 for numbers; ``is_example``, 1 where a row is one and 0 where it fills the batch; and
    ``example``, its number in the split.

    Attributes:
      tokenizer: the tokenizer of the sentences.
      source: which data these are, in a line: a run that resumes must find the same.
      splits: the examples.
    """

    def __init__(self, config: SentenceConfig):
        """Opens the data; the reviews are fetched if it is the first time.

        Raises:
          UserError: data or tokenizer missing or unreadable, or a tokenizer that does not fit the
            model.
        """
        data_dir, tokenizer = config.data_dir, config.tokenizer
        if config.name == "reviews" and data_dir is None:
            if config.task != "sst2":
                raise UserError("the reviews are labelled for the task sst2 alone")
            data_dir = prepare_reviews()
        if config.name == "reviews" and tokenizer is None:
            tokenizer = str(prepare_reviews())
        found = read_glue(config.task, data_dir)
        if tokenizer is None:
            raise UserError(
                "config.data.tokenizer is not set; give the folder of the model's tokenizer.json, "
                "or --config.init_from=FOLDER, which has one"
            )
        self.tokenizer = SentenceTokenizer(tokenizer)
        _check_tokenizer(self.tokenizer, tokenizer, config)
        self.splits = found.splits
        self.source = f"{config.name} {config.task}: {found.description}"
        self._config, self._said = config, False

    def train_batches(self, *, batch_size: int, seed: int) -> Batches:
        """Gives batches without end, each epoch in an order of its own, read ahead by a thread.

        An epoch's last batch is filled with rows that are no examples.
        """
        return Batches(lambda state: read_ahead(self._train(batch_size, seed, state)))

    def eval_batches(self, split: str, *, batch_size: int) -> Batches:
        """Gives a held-out split once, the shortest first."""

        def stream(state: dict[str, Any]) -> Any:
            order = np.argsort(_sizes(self.splits[split]), kind="stable")
            for begin in range(state.get("place", 0), len(order), batch_size):
                rows = order[begin : begin + batch_size]
                yield self._batch(split, rows, batch_size), {"place": begin + batch_size}

        return Batches(stream)

    def batches_per_epoch(self, batch_size: int) -> int:
        """Counts the batches of an epoch."""
        return -(-len(self.splits["train"]) // batch_size)

    def _train(self, size: int, seed: int, state: dict[str, Any]) -> Any:
        epoch, place = state.get("epoch", 0), state.get("place", 0)
        sizes = _sizes(self.splits["train"])
        while True:
            batches = list(_epoch(sizes, size, seed, epoch))
            for i in range(place, len(batches)):
                yield self._batch("train", batches[i], size), {"epoch": epoch, "place": i + 1}
            epoch, place = epoch + 1, 0

    def _batch(self, split: str, rows: np.ndarray, size: int) -> Batch:
        config, examples = self._config, self.splits[split]
        texts = [[column[i] for i in rows] for column in examples.texts]
        encoded = self.tokenizer.encode(texts, config.length)
        self._say_once(encoded)
        longest = max(len(row.ids) for row in encoded)
        length = next(length for length in config.lengths if length >= longest)
        batch = {key: np.zeros((size, length), np.int32) for key in ("mask", "token_types")}
        batch["tokens"] = np.full((size, length), config.pad_id, np.int32)
        for i, row in enumerate(encoded):
            batch["tokens"][i, : len(row.ids)] = row.ids
            batch["token_types"][i, : len(row.ids)] = row.token_types
            batch["mask"][i, : len(row.ids)] = 1
        fill = size - len(rows)
        batch["labels"] = np.pad(examples.labels[rows], (0, fill))
        batch["example"] = np.pad(rows.astype(np.int32), (0, fill))
        batch["is_example"] = np.pad(np.ones(len(rows), np.int32), (0, fill))
        return batch

    def _say_once(self, encoded: list[Encoded]) -> None:
        if not self._said and any(row.was_cut for row in encoded):
            self._said = True
            line = f"examples of more than {self._config.length} tokens are cut"
            print(line, file=sys.stderr, flush=True)


def _epoch(sizes: np.ndarray, size: int, seed: int, epoch: int) -> Iterator[np.ndarray]:
    """Yields the examples of each batch of an epoch; those of a batch are of like length."""
    random = np.random.default_rng([seed, epoch])
    order = random.permutation(len(sizes))
    batches = []
    for begin in range(0, len(order), size * _WINDOW):
        window = order[begin : begin + size * _WINDOW]
        window = window[np.argsort(sizes[window], kind="stable")]
        batches += [window[i : i + size] for i in range(0, len(window), size)]
    for i in random.permutation(len(batches)):
        yield batches[i]


def _sizes(examples: Examples) -> np.ndarray:
    """Counts the characters of each example, by which its tokens are guessed."""
    return np.sum([[len(text) for text in column] for column in examples.texts], axis=0)


def _check_tokenizer(tokenizer: SentenceTokenizer, path: str | Path, config: Any) -> None:
    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f"the tokenizer {path} has {tokenizer.vocab_size} ids and the model a vocabulary of "
            f"{config.vocab_size}; they do not belong together"
        )
    if tokenizer.pad_id not in (None, config.pad_id):
        raise UserError(
            f"the tokenizer {path} pads with {tokenizer.pad_id} and the model with "
            f"{config.pad_id}; they do not belong together"
        )
    if len(TASKS[config.task].texts) == 2 and config.length < tokenizer.special_tokens(2) + 2:
        raise UserError(f"config.data.seq_len={config.length} leaves no room for two sentences")
