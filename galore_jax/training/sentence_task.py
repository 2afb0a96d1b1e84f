"""The tasks of GLUE: classes, or a number, of a sentence or a pair."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from galore_jax.data.glue_tasks import TASKS
from galore_jax.data.sentences import SentenceConfig, SentenceData
from galore_jax.training.scores import SCORES, SCORES_OF_TASK
from galore_jax.training.tasks import Batch, Evaluation


@dataclasses.dataclass(frozen=True)
class SentenceTask:
    """Classifying a sentence or a pair, or giving it a number.

    A batch is that of ``galore_jax.data.sentences.SentenceData``. The loss is the cross-entropy of
    the classes in nats, or the squared error of the number. The evaluation counts all examples of
    all held-out splits; its score is the first of the task's scores, on the first split.

    Attributes:
      data: the examples, and how they are laid out.
    """

    keeps_best: ClassVar[bool] = True

    data: SentenceConfig

    @functools.cached_property
    def labels(self) -> tuple[str, ...]:
        """Returns the names of the classes; a single one means a number."""
        return TASKS[self.data.task].labels

    def open_data(self) -> SentenceData:
        """Opens the examples.

        Raises:
          UserError: data or tokenizer missing, unreadable, or not fit for the model.
        """
        return SentenceData(self.data)

    def describe(self, batch_size: int) -> str:
        """Says in a few words what an update reads."""
        what = "sentences" if len(TASKS[self.data.task].texts) == 1 else "pairs"
        return (
            f"{self.data.name} {self.data.task}: {batch_size} {what} of at most {self.data.length} "
            "tokens an update"
        )

    def abstract_batch(self, sequences: int) -> Batch:
        """Returns the shapes of a batch of the longest rows."""
        rows: Any = jax.ShapeDtypeStruct((sequences, self.data.length), np.int32)
        one: Any = jax.ShapeDtypeStruct((sequences,), np.int32)
        numbers: Any = jax.ShapeDtypeStruct((sequences,), np.float32)
        labels = numbers if len(self.labels) == 1 else one
        batch = {"tokens": rows, "mask": rows, "token_types": rows}
        return {**batch, "labels": labels, "example": one, "is_example": one}

    def count(self, batch: Any) -> Any:
        """Counts the examples of a batch, () int32, over which losses are averaged."""
        return batch["is_example"].sum(dtype=np.int32)

    def tokens(self, batch: Any) -> Any:
        """Counts the tokens of a batch without padding, () int32."""
        return batch["mask"].sum(dtype=np.int32)

    def loss(self, outputs: jax.Array, batch: Batch) -> jax.Array:
        """Sums the loss of a batch's examples, () float32."""
        if len(self.labels) == 1:
            losses = jnp.square(outputs[:, 0] - batch["labels"])
        else:
            hit = batch["labels"][:, None] == jnp.arange(len(self.labels))
            losses = -jnp.sum(jnp.where(hit, jax.nn.log_softmax(outputs), 0.0), axis=-1)
        return jnp.sum(jnp.where(batch["is_example"] > 0, losses, 0.0))

    def judge(self, outputs: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """Computes the summed loss, and the predictions (sequences,)."""
        said = outputs[:, 0] if len(self.labels) == 1 else jnp.argmax(outputs, axis=-1)
        return self.loss(outputs, batch), said

    def evaluate(
        self,
        judge: Callable[[Any, Any], tuple[jax.Array, jax.Array]],
        params: Any,
        data: SentenceData,
        *,
        batch_size: int,
        most_targets: int,
        stop: Callable[[], bool] = lambda: False,
    ) -> Evaluation | None:
        """Computes the task's scores; ``most_targets`` is not for the few held-out examples."""
        del most_targets
        metrics, texts, counted, loss, score = {}, [], 0, 0.0, None
        splits = TASKS[self.data.task].held_out
        for split in splits:
            found = predict(judge, params, data, split, batch_size=batch_size, stop=stop)
            if found is None:
                return None
            predictions, split_loss = found
            labels = data.splits[split].labels
            counted, loss = counted + len(labels), loss + split_loss
            suffix = split.removeprefix("validation")
            for name in SCORES_OF_TASK[self.data.task]:
                value = SCORES[name](predictions, labels)
                metrics[f"eval_{name}{suffix}"] = value
                texts.append(f"{name}{suffix.replace('_', ' ')} {100 * value:.2f}")
                score = value if score is None else score
        loss /= counted
        return Evaluation(
            loss,
            {"eval_loss": loss, **metrics, "eval_examples": counted},
            f"eval loss {loss:.4f}, {', '.join(texts)}",
            f"over {counted} held-out examples",
            score,
        )


def predict(
    judge: Callable[[Any, Any], tuple[jax.Array, jax.Array]],
    params: Any,
    data: SentenceData,
    split: str,
    *,
    batch_size: int,
    stop: Callable[[], bool] = lambda: False,
) -> tuple[np.ndarray, float] | None:
    """Predicts the labels of a split.

    Args:
      judge: from ``galore_jax.training.step.make_eval_step``, for jit or compiled.
      params: the weights.
      data: the examples.
      split: which.
      batch_size: sequences at a time.
      stop: asked before every batch; true gives up.

    Returns:
      The predictions in the order of the examples, and the summed loss; None where it was given up.
    """
    predictions = np.zeros_like(data.splits[split].labels)
    total = 0.0
    with data.eval_batches(split, batch_size=batch_size) as batches:
        for batch in batches:
            if stop():
                return None
            loss, said = jax.device_get(judge(params, batch))
            is_example = batch["is_example"] > 0
            predictions[batch["example"][is_example]] = said[is_example]
            total += float(loss)
    return predictions, total
