"""The checkpoint of the best evaluation, for tasks that are judged by a score."""

from pathlib import Path
from typing import Any, NamedTuple

from galore_jax.training.checkpoints import Checkpoints
from galore_jax.training.step import TrainState
from galore_jax.training.tasks import Evaluation


class _Params(NamedTuple):
    """What is kept of a state."""

    params: Any


class Best:
    """Keeps the weights of the evaluation with the highest score, the earliest of several.

    Attributes:
      position: what a checkpoint of the run must remember, JSON values; None before the first.
    """

    def __init__(self, folder: Path, keeps: bool):
        """Does nothing unless it ``keeps``."""
        self._folder, self._keeps = folder, keeps
        self.position: dict[str, Any] | None = None

    def resume(self, position: dict[str, Any] | None) -> None:
        """Goes to the position of a checkpoint."""
        self.position = position

    def offer(self, step: int, evaluation: Evaluation, state: TrainState) -> None:
        """Keeps the weights if their score is higher than those before."""
        score = evaluation.score
        if not self._keeps or score is None:
            return
        if self.position is not None and score <= self.position["score"]:
            return
        self.position = {"step": step, "score": score, "text": evaluation.text}
        with Checkpoints(self._folder, keep=1) as saved:
            saved.save(step, _Params(state.params), self.position)

    def last_words(self) -> str:
        """Says which evaluation was the best, to be added to a line."""
        if self.position is None:
            return ""
        return f"; best at step {self.position['step']}: {self.position['text']}, in {self._folder}"
