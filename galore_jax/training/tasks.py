"""Tasks: what a model is trained to do, that is loss, metrics and batches."""

import dataclasses
import math
from typing import Any

import jax
import numpy as np

from galore_jax.data.batches import DataConfig, TextData
from galore_jax.models.llama import Predictions
from galore_jax.models.losses import cross_entropy

Batch = dict[str, jax.Array]  # each with a leading axis of sequences


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

    data: DataConfig
    vocab_size: int
    chunk_tokens: int

    def open_data(self) -> TextData:
        """Opens the texts.

        Raises:
          UserError: data or tokenizer missing, unreadable, or not fit for the model.
        """
        return TextData(self.data, vocab_size=self.vocab_size)

    def abstract_batch(self, sequences: int) -> Batch:
        """Returns the shapes of a batch."""
        shape: Any = jax.ShapeDtypeStruct((sequences, self.data.seq_len), np.int32)
        return {"tokens": shape, "targets": shape}

    def count(self, batch: Any) -> Any:
        """Counts the targets of a batch, () int32, over which losses are averaged."""
        return (batch["targets"] >= 0).sum(dtype=np.int32)

    def loss(self, outputs: Predictions, batch: Batch) -> jax.Array:
        """Sums the negative log-likelihood of a batch's targets, () float32, in nats."""
        return cross_entropy(
            outputs.hidden, outputs.head, batch["targets"], chunk_tokens=self.chunk_tokens
        )[0]

    def evaluation(self, loss: float, count: int) -> dict[str, float]:
        """Makes an evaluation's metrics of the mean loss over ``count`` held-out targets."""
        return {"eval_loss": loss, "eval_perplexity": perplexity(loss), "eval_tokens": count}


Task = LanguageModelling


def perplexity(loss: float) -> float:
    """Returns the exponential of a loss in nats; infinite where that overflows.

    >>> perplexity(0.0), perplexity(1e3)
    (1.0, inf)
    """
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf
