"""Tokenizers of sentences and pairs: the ``tokenizer.json`` of an encoder's folder."""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import tokenizers

from galore_jax.data.tokenizer import BESIDE, special_token
from galore_jax.errors import UserError

_JSON = "tokenizer.json"


class Encoded(NamedTuple):
    """An example's ids, the types of its tokens, and whether it was cut to fit."""

    ids: list[int]
    token_types: list[int]
    was_cut: bool


class SentenceTokenizer:
    """A ``tokenizer.json`` that puts special tokens around one sentence, and between two.

    Attributes:
      vocab_size: ids are less than this.
      pad_id: the padding token; None where no file beside it names one.
    """

    def __init__(self, path: str | os.PathLike[str]):
        """Loads the file, or that of a folder.

        Raises:
          UserError: there is none, it cannot be read, or it adds no special tokens.
        """
        path = Path(path).expanduser()
        self._path = path / _JSON if path.is_dir() else path
        if not self._path.is_file():
            raise UserError(f"tokenizer {path}: there is no such file as {_JSON}")
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(self._path))
        except Exception as error:  # the library raises nothing more specific
            reason = " ".join(str(error).split())
            raise UserError(f"tokenizer {self._path} cannot be read: {reason}") from error
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self.vocab_size = max(self._tokenizer.get_vocab().values()) + 1
        self.pad_id = special_token(self._path, self._tokenizer, "pad")
        if self.special_tokens(1) < 2:
            raise UserError(
                f"tokenizer {self._path} puts no special tokens before and after a sentence, whose "
                "first one the model classifies by; it is not of a BERT or RoBERTa"
            )

    def special_tokens(self, texts: int) -> int:
        """Counts the tokens that are put around one text, or around and between two."""
        return self._tokenizer.num_special_tokens_to_add(texts > 1)

    def encode(self, texts: Sequence[Sequence[str]], length: int) -> list[Encoded]:
        """Encodes examples, each of one text or two; the longer text is cut first.

        Args:
          texts: a sequence of examples' first texts, and perhaps one of their second.
          length: ids of an example at most.
        """
        rows = list(texts[0]) if len(texts) == 1 else list(zip(*texts, strict=True))
        self._tokenizer.enable_truncation(length, strategy="longest_first")
        return [
            Encoded(row.ids, row.type_ids, bool(row.overflowing))
            for row in self._tokenizer.encode_batch(rows)
        ]

    def copy(self, folder: Path) -> None:
        """Copies ``tokenizer.json``, and the files about it."""
        shutil.copyfile(self._path, folder / _JSON)
        for name in BESIDE:
            if self._path.with_name(name).is_file():
                shutil.copyfile(self._path.with_name(name), folder / name)

    def save(self, folder: Path) -> None:
        """Does what ``copy`` does."""
        self.copy(folder)
