"""The held-out loss of a model, and how many bits it takes for a byte of text."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from galore_jax.data.batches import TextData
from galore_jax.data.tokenizer import Tokenizer
from galore_jax.errors import UserError
from galore_jax.training.tasks import Task


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """What an evaluation found.

    Attributes:
      loss: mean negative log-likelihood of a target, nats.
      targets: how many tokens were predicted.
      token_counts: how often each id was a target, (vocab_size,) int64.
    """

    loss: float
    targets: int
    token_counts: np.ndarray

    @property
    def perplexity(self) -> float:
        """The exponential of the loss."""
        return perplexity(self.loss)

    def bits_per_byte(self, text_bytes: int) -> float:
        """Returns the bits that the model takes to encode a byte, whatever its tokenizer.

        Args:
          text_bytes: bytes of UTF-8 that the targets stand for, see ``bytes_of_tokens``.

        >>> HeldOut(loss=math.log(2), targets=8, token_counts=np.array([8])).bits_per_byte(32)
        0.25
        """
        return self.loss * self.targets / math.log(2) / max(text_bytes, 1)


def evaluate(
    eval_step: Callable[[Any, Any], jax.Array],
    params: Any,
    task: Task,
    data: TextData,
    *,
    batch_size: int,
    most_targets: int,
    stop: Callable[[], bool] = lambda: False,
    progress: Callable[[int], object] = lambda targets: None,
) -> HeldOut | None:
    """Computes the mean loss over held-out targets, which count alike whatever their batch.

    Args:
      eval_step: from ``galore_jax.training.step.make_eval_step``, compiled.
      params: the weights.
      task: counts the targets.
      data: the held-out texts.
      batch_size: sequences at a time.
      most_targets: ends with the batch that reaches so many.
      stop: asked before every batch; true gives the evaluation up.
      progress: called with the targets so far after every batch.

    Returns:
      The evaluation, or None where it was given up.

    Raises:
      UserError: the held-out part has nothing to predict.
    """
    total, counted = [], 0
    token_counts = np.zeros(data.tokenizer.vocab_size, np.int64)
    with data.eval_batches(batch_size=batch_size) as batches:
        for batch in batches:
            if stop():
                return None
            total.append(eval_step(params, batch))
            counted += int(task.count(batch))
            targets = batch["targets"]
            token_counts += np.bincount(targets[targets >= 0], minlength=token_counts.size)
            progress(counted)
            if counted >= most_targets:
                break
    if not counted:
        raise UserError(f"the held-out part of {data.source} has nothing to predict")
    return HeldOut(math.fsum(jax.device_get(total)) / counted, counted, token_counts)


def perplexity(loss: float) -> float:
    """Returns the exponential of a loss in nats; infinite where that overflows.

    >>> perplexity(0.0), perplexity(1e3)
    (1.0, inf)
    """
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def bytes_of_tokens(tokenizer: Tokenizer) -> np.ndarray:
    """Returns the bytes of text that each id stands for, (vocab_size,) int64; special ones none."""
    return np.array([tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)], np.int64)
