"""What a task is: it tells the trainer its data, loss and evaluation."""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, Protocol

import jax

from galore_jax.data.batches import Batches

Batch = dict[str, jax.Array]  # each with a leading axis of sequences


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What an evaluation found.

    Attributes:
      loss: the mean over what is counted.
      metrics: numbers for ``metrics.jsonl``.
      text: the same in a few words.
      over: on how much, in a few words.
      score: to choose the best checkpoint by, the more the better; None where the last is kept.
    """

    loss: float
    metrics: dict[str, float]
    text: str
    over: str
    score: float | None = None


class Tokenizer(Protocol):
    """A tokenizer whose files a run keeps."""

    def copy(self, folder: Any) -> None:
        """Copies the files from which it was opened to a folder."""
        ...


class Data(Protocol):
    """Opened data of a task."""

    source: str

    @property
    def tokenizer(self) -> Tokenizer:
        """Returns the tokenizer of the texts."""
        ...

    def train_batches(self, *, batch_size: int, seed: int) -> Batches:
        """Gives batches without end."""
        ...


class Task(Protocol):
    """What a model is trained to do.

    Attributes:
      keeps_best: whether the checkpoint of the best evaluation is kept beside the newest.
    """

    keeps_best: ClassVar[bool]

    def open_data(self) -> Any:
        """Opens the data; a UserError says what is missing or does not fit the model."""
        ...

    def describe(self, batch_size: int) -> str:
        """Says in a few words what an update reads."""
        ...

    def abstract_batch(self, sequences: int) -> Batch:
        """Returns the shapes of the largest batch."""
        ...

    def count(self, batch: Any) -> Any:
        """Counts what losses are averaged over, () int32."""
        ...

    def tokens(self, batch: Any) -> Any:
        """Counts the tokens that were learned from, () int32."""
        ...

    def loss(self, outputs: Any, batch: Batch) -> jax.Array:
        """Sums the loss over what is counted, () float32."""
        ...

    def judge(self, outputs: Any, batch: Batch) -> Any:
        """Computes on the device what ``evaluate`` needs of a held-out batch."""
        ...

    def evaluate(
        self,
        judge: Callable[[Any, Any], Any],
        params: Any,
        data: Any,
        *,
        batch_size: int,
        most_targets: int,
        stop: Callable[[], bool] = lambda: False,
    ) -> Evaluation | None:
        """Evaluates on held-out data; None where ``stop``, asked before every batch, was true."""
        ...
