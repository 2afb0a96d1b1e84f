"""Sizes and numerics of a BERT or RoBERTa encoder with a head for sentences."""

import dataclasses
from typing import Literal, get_args

import jax.numpy as jnp
from jax.typing import DTypeLike

from galore_jax.errors import UserError
from galore_jax.models.config import floating_dtype

Kind = Literal["bert", "roberta"]


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """A ``BertForSequenceClassification`` or ``RobertaForSequenceClassification``.

    Attributes:
      kind: ``"bert"`` or ``"roberta"``. They differ in their positions (RoBERTa's begin after
        ``pad_id`` and count no padding) and in where the head drops.
      hidden_size: D.
      intermediate_size: the width inside the feed-forward part.
      num_layers: L.
      num_heads: a divisor of ``hidden_size``.
      vocab_size: V.
      position_rows: rows of the table of positions, of which RoBERTa leaves ``pad_id + 1`` unused.
      type_vocab_size: token types.
      layer_norm_eps: added to the variance inside LayerNorm.
      pad_id: the token that fills short rows.
      hidden_dropout, attention_dropout: parts that training drops: of the outputs of embedding and
        sublayers, and of attention's probabilities.
      classifier_dropout: of the head's inputs; None for ``hidden_dropout``.
      labels: the names of the classes; a single one means regression.
      init_std: standard deviation of initial embeddings and kernels.
      dtype: of activations and matrix products. Norms, softmax and logits are float32.
      param_dtype: dtype of the parameters.
      remat: keep only each block's input and recompute the block in the backward pass.

    Raises:
      UserError: sizes that do not fit together, a number out of its range, an unknown dtype.

    >>> config = EncoderConfig("roberta", 16, 32, 2, 2, vocab_size=50, position_rows=66, pad_id=1)
    >>> config.max_positions, config.num_labels
    (64, 2)
    """

    kind: Kind
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    vocab_size: int = 50265
    position_rows: int = 514
    type_vocab_size: int = 1
    layer_norm_eps: float = 1e-5
    pad_id: int = 1
    hidden_dropout: float = 0.1
    attention_dropout: float = 0.1
    classifier_dropout: float | None = None
    labels: tuple[str, ...] = ("LABEL_0", "LABEL_1")
    init_std: float = 0.02
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32
    remat: bool = False

    def __post_init__(self):
        for name in ("dtype", "param_dtype"):
            object.__setattr__(self, name, floating_dtype(name, getattr(self, name)))
        if self.kind not in get_args(Kind):
            raise UserError(f"the kind of encoder is {self.kind!r}; it must be bert or roberta")
        sizes = ("hidden_size", "intermediate_size", "num_layers", "num_heads", "vocab_size")
        for name in (*sizes, "position_rows", "type_vocab_size"):
            size = getattr(self, name)
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise UserError(f"{name} is {size!r}; it must be a positive integer")
        for name in ("layer_norm_eps", "init_std"):
            if not _is_number(getattr(self, name)) or getattr(self, name) <= 0:
                raise UserError(f"{name} is {getattr(self, name)!r}; it must be positive")
        for name in ("hidden_dropout", "attention_dropout", "classifier_dropout"):
            rate = getattr(self, name)
            if rate is None and name == "classifier_dropout":
                continue
            if rate is None or not _is_number(rate) or not 0 <= rate < 1:
                raise UserError(f"{name} is {rate!r}; it must be at least 0 and less than 1")
        if self.hidden_size % self.num_heads:
            raise UserError(
                f"hidden_size {self.hidden_size} is not a multiple of num_heads {self.num_heads}"
            )
        if isinstance(self.pad_id, bool) or not isinstance(self.pad_id, int):
            raise UserError(f"the padding token is {self.pad_id!r}; it must be an id")
        if not 0 <= self.pad_id < self.vocab_size:
            raise UserError(
                f"the padding token is {self.pad_id}, which is no id of a vocabulary of "
                f"{self.vocab_size}"
            )
        if self.max_positions < 1:
            raise UserError(
                f"a table of {self.position_rows} positions leaves none after padding id "
                f"{self.pad_id}"
            )
        if not self.labels:
            raise UserError("a head needs at least one label")

    @property
    def max_positions(self) -> int:
        """The longest row."""
        first = self.pad_id + 1 if self.kind == "roberta" else 0
        return self.position_rows - first

    @property
    def num_labels(self) -> int:
        """The width of the head's output, 1 for regression."""
        return len(self.labels)

    @property
    def head_size(self) -> int:
        """The width of one head of attention."""
        return self.hidden_size // self.num_heads

    @property
    def head_dropout(self) -> float:
        """The part of the head's inputs that training drops."""
        return self.hidden_dropout if self.classifier_dropout is None else self.classifier_dropout

    @property
    def drops(self) -> bool:
        """Whether training drops anything."""
        return max(self.hidden_dropout, self.attention_dropout, self.head_dropout) > 0


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
