"""The task of predicting each next token of texts."""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import numpy as np

from galore_jax.data.batches import DataConfig, TextData
from galore_jax.models.llama import Predictions
from galore_jax.models.losses import cross_entropy
from galore_jax.training.evaluation import evaluate
from galore_jax.training.progress import format_count
from galore_jax.training.tasks import Batch, Evaluation


@dataclasses.dataclass(frozen=True)
class LanguageModelling:
    """Predicting each next token of texts.

    A batch has ``tokens`` and ``targets``, each (sequences, seq_len) int32: the targets are the
    next tokens, negative where there is nothing to predict.

    Attributes:
      data: the texts, and how they are laid out.
      vocab_size: of the model.
      chunk_tokens: rows of logits that exist at a time.
    """

    keeps_best: ClassVar[bool] = False

    data: DataConfig
    vocab_size: int
    chunk_tokens: int

    def open_data(self) -> TextData:
        """Opens the texts.

        Raises:
          UserError: data or tokenizer missing, unreadable, or not fit for the model.
        """
        return TextData(self.data, vocab_size=self.vocab_size)

    def describe(self, batch_size: int) -> str:
        """Says in a few words what an update reads."""
        layout = "packed" if self.data.packing else "a document a row"
        return f"{self.data.name}: {batch_size} x {self.data.seq_len} tokens an update, {layout}"

    def abstract_batch(self, sequences: int) -> Batch:
        """Returns the shapes of a batch."""
        shape: Any = jax.ShapeDtypeStruct((sequences, self.data.seq_len), np.int32)
        return {"tokens": shape, "targets": shape}

    def count(self, batch: Any) -> Any:
        """Counts the targets of a batch, () int32, over which losses are averaged."""
        return (batch["targets"] >= 0).sum(dtype=np.int32)

    def tokens(self, batch: Any) -> Any:
        """Counts the targets too."""
        return self.count(batch)

    def loss(self, outputs: Predictions, batch: Batch) -> jax.Array:
        """Sums the negative log-likelihood of a batch's targets, () float32, in nats."""
        return cross_entropy(
            outputs.hidden, outputs.head, batch["targets"], chunk_tokens=self.chunk_tokens
        )[0]

    def judge(self, outputs: Predictions, batch: Batch) -> jax.Array:
        """Computes the loss."""
        return self.loss(outputs, batch)

    def evaluate(
        self,
        judge: Callable[[Any, Any], jax.Array],
        params: Any,
        data: TextData,
        *,
        batch_size: int,
        most_targets: int,
        stop: Callable[[], bool] = lambda: False,
    ) -> Evaluation | None:
        """Computes loss and perplexity, see ``galore_jax.training.evaluation``."""
        found = evaluate(
            judge,
            params,
            self,
            data,
            batch_size=batch_size,
            most_targets=most_targets,
            stop=stop,
        )
        if found is None:
            return None
        metrics = {"eval_loss": found.loss, "eval_perplexity": found.perplexity}
        return Evaluation(
            found.loss,
            {**metrics, "eval_tokens": found.targets},
            f"eval loss {found.loss:.4f}, perplexity {found.perplexity:.2f}",
            f"over {format_count(found.targets)} held-out tokens",
        )
