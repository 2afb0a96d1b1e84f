"""SentencePiece tokenizers: any model by path, and one trained on the sample."""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import sentencepiece

from galore_jax.errors import UserError


class Tokenizer:
    """A SentencePiece model for language-model training.

    Attributes:
      vocab_size: number of ids; ids are 0 to vocab_size - 1.
      eos_id: the end of a document.
      pad_id: fills short rows; 0 where the model has none (padding is masked out of the loss).
    """

    def __init__(self, path: str | os.PathLike[str]):
        """Loads a model file.

        Raises:
          UserError: no such file, not a SentencePiece model, or one without an end token.
        """
        if not Path(path).is_file():
            raise UserError(f"tokenizer {path}: there is no such file; give a SentencePiece model")
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (OSError, RuntimeError) as error:
            raise UserError(f"tokenizer {path} is not a SentencePiece model") from error
        self.vocab_size: int = self._processor.vocab_size()
        self.eos_id: int = self._processor.eos_id()
        if self.eos_id < 0:
            raise UserError(f"tokenizer {path} has no end-of-sentence token: documents need one")
        self.pad_id: int = max(self._processor.pad_id(), 0)

    def encode(self, text: str) -> np.ndarray:
        """Returns the document's ids and the end token, (length,) int32."""
        return np.asarray([*self._processor.encode(text), self.eos_id], np.int32)

    def decode(self, ids: np.ndarray) -> str:
        """Returns the text of ids, without special tokens."""
        return self._processor.decode([int(i) for i in ids])


def train_tokenizer(texts: Iterator[str], path: Path, *, vocab_size: int) -> None:
    """Trains a byte-pair model of ``vocab_size`` ids, always the same for the same documents.

    The padding has id 0, the end token 1, unknown pieces 2.
    """
    with path.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=texts,
            model_writer=file,
            model_type="bpe",
            vocab_size=vocab_size,
            character_coverage=0.9995,
            byte_fallback=True,
            max_sentence_length=16_384,
            num_threads=2,
            pad_id=0,
            eos_id=1,
            unk_id=2,
            bos_id=-1,
            minloglevel=2,
        )
