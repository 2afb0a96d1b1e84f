"""Tokenizers: SentencePiece models, and the ``tokenizer.json`` of Hugging Face folders."""

import abc
import functools
import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
import tokenizers

from galore_jax.data.sentencepiece_json import as_json_tokenizer
from galore_jax.errors import UserError

_JSON = "tokenizer.json"
_MODELS = ("tokenizer.model", "spiece.model", "spm.model")  # SentencePiece, by its usual names
_CONFIG = "tokenizer_config.json"
# Files that say more about a tokenizer, and go with it.
BESIDE = (_CONFIG, "special_tokens_map.json", "chat_template.jinja")

_BYTE_PIECE = re.compile("<0x[0-9A-Fa-f]{2}>")
_CONTEXT = 8  # ids before a piece of text with which it is decoded
_HALF = "\ufffd"  # what decoders give for bytes that are no whole character

Ids = Sequence[int] | np.ndarray


class Tokenizer(abc.ABC):
    """Text to ids and back.

    Attributes:
      vocab_size: ids are less than this.
      eos_id: the end of a document.
      bos_id: the beginning of a text; None if there is none. Not every tokenizer that has one puts
        it in front of what it encodes.
      pad_id: fills short rows; 0 where there is none (padding is masked out of the loss).
    """

    vocab_size: int
    eos_id: int
    bos_id: int | None
    pad_id: int

    def encode(self, text: str) -> np.ndarray:
        """Returns a document's ids and the end token, (length,) int32."""
        return np.asarray([*self._encode(text), self.eos_id], np.int32)

    def encode_prompt(self, text: str) -> np.ndarray:
        """Returns the ids of a text that is to go on, (length,) int32; at least a begin token."""
        ids = self._encode(text)
        return np.asarray(ids if ids or self.bos_id is None else [self.bos_id], np.int32)

    def decode(self, ids: Ids) -> str:
        """Returns the text of ids, without special tokens and ids that the tokenizer lacks."""
        return self._decode([int(i) for i in ids if 0 <= i < self.vocab_size])

    @abc.abstractmethod
    def token_bytes(self, token: int) -> int:
        """Returns how many bytes of UTF-8 an id stands for; none for special tokens."""

    @abc.abstractmethod
    def copy(self, folder: Path) -> None:
        """Copies the files from which this was opened to a folder."""

    @abc.abstractmethod
    def save(self, folder: Path) -> None:
        """Writes files to a folder with which transformers opens it too."""

    @abc.abstractmethod
    def _encode(self, text: str) -> list[int]: ...

    @abc.abstractmethod
    def _decode(self, ids: list[int]) -> str: ...


def open_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    """Opens a tokenizer.

    Args:
      path: a SentencePiece model, a ``tokenizer.json``, or a folder that has one of them;
        ``tokenizer.json`` first.

    Raises:
      UserError: no such file, not a tokenizer, or one without an end token.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        names = (_JSON, *_MODELS)
        found = [path / name for name in names if (path / name).is_file()]
        if not found:
            raise UserError(f"tokenizer {path}: there is no such file as {' or '.join(names[:2])}")
        path = found[0]
    if not path.is_file():
        raise UserError(
            f"tokenizer {path}: there is no such file; give a SentencePiece model, a {_JSON} or a "
            "folder that has one"
        )
    return JsonTokenizer(path) if path.suffix == ".json" else SentencePieceTokenizer(path)


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model.

    A ``tokenizer_config.json`` beside it may ask for the begin token with ``add_bos_token``.
    """

    def __init__(self, path: str | os.PathLike[str]):
        """Loads a model file.

        Raises:
          UserError: no such file, not a SentencePiece model, or one without an end token.
        """
        self._path = Path(path)
        if not self._path.is_file():
            raise UserError(f"tokenizer {path}: there is no such file; give a SentencePiece model")
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (OSError, RuntimeError) as error:
            raise UserError(f"tokenizer {path} is not a SentencePiece model") from error
        self.vocab_size = self._processor.vocab_size()
        self.eos_id = self._processor.eos_id()
        if self.eos_id < 0:
            raise UserError(f"tokenizer {path} has no end-of-sentence token: documents need one")
        self.pad_id = max(self._processor.pad_id(), 0)
        wants_bos = _read_json(self._path.with_name(_CONFIG)).get("add_bos_token", False)
        bos_id = self._processor.bos_id()
        self.bos_id = bos_id if bos_id >= 0 else None
        self._begin = [bos_id] if wants_bos and bos_id >= 0 else []

    def token_bytes(self, token: int) -> int:
        """Returns the bytes of a piece, whose marks of spaces are spaces."""
        model = self._processor
        if model.is_control(token) or model.is_unknown(token) or model.is_unused(token):
            return 0
        return 1 if model.is_byte(token) else _piece_bytes(model.id_to_piece(token))

    def copy(self, folder: Path) -> None:
        """Copies ``tokenizer.model``, and the files about it."""
        shutil.copyfile(self._path, folder / _MODELS[0])
        _copy_beside(self._path, folder)

    def save(self, folder: Path) -> None:
        """Writes ``tokenizer.json``, which gives the same ids, and ``tokenizer_config.json``.

        Raises:
          UserError: a model of words or characters.
        """
        begin = self._begin[0] if self._begin else None
        as_json_tokenizer(self._path, begin=begin).save(str(folder / _JSON))
        pad_id = self._processor.pad_id()
        special = {"bos": self.bos_id, "eos": self.eos_id, "unk": self._processor.unk_id()}
        special["pad"] = pad_id if pad_id >= 0 else None
        pieces = {
            kind: self._processor.id_to_piece(i) for kind, i in special.items() if i is not None
        }
        _write_config(folder, pieces)

    def _encode(self, text: str) -> list[int]:
        return [*self._begin, *self._processor.encode(text)]

    def _decode(self, ids: list[int]) -> str:
        return self._processor.decode(ids)


class JsonTokenizer(Tokenizer):
    """A ``tokenizer.json``, as the library ``tokenizers`` writes it.

    Which tokens end and begin a text is read from the files beside it: ``tokenizer_config.json``,
    ``special_tokens_map.json`` or the model's ``config.json``. What the file puts in front of a
    text, such as a begin token, ``encode`` puts there too.
    """

    def __init__(self, path: str | os.PathLike[str]):
        """Loads the file.

        Raises:
          UserError: it cannot be read, or no file beside it says which token ends a text.
        """
        self._path = Path(path)
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises nothing more specific
            reason = " ".join(str(error).split())
            raise UserError(f"tokenizer {path} cannot be read: {reason}") from error
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self.vocab_size = max(self._tokenizer.get_vocab().values()) + 1
        eos_id, self.bos_id = self._special("eos"), self._special("bos")
        if eos_id is None:
            raise UserError(
                f"tokenizer {path}: no {_CONFIG} beside it has an eos_token of its vocabulary; "
                "documents need an end token"
            )
        self.eos_id = eos_id
        self.pad_id = self._special("pad") or 0

    def token_bytes(self, token: int) -> int:
        """Returns the bytes of a token: one for each character where these stand for bytes."""
        text = self._tokenizer.id_to_token(token)
        if text is None or token in self._special_ids:
            return 0
        if self._has_byte_characters:
            return len(text)
        return 1 if _BYTE_PIECE.fullmatch(text) else _piece_bytes(text)

    def copy(self, folder: Path) -> None:
        """Copies ``tokenizer.json``, and the files about it."""
        shutil.copyfile(self._path, folder / _JSON)
        _copy_beside(self._path, folder)
        if not (folder / _CONFIG).exists():
            special = {"bos": self.bos_id, "eos": self.eos_id}
            found = {k: self._tokenizer.id_to_token(i) for k, i in special.items() if i is not None}
            _write_config(folder, found)

    def save(self, folder: Path) -> None:
        """Does what ``copy`` does."""
        self.copy(folder)

    @functools.cached_property
    def _special_ids(self) -> set[int]:
        added = self._tokenizer.get_added_tokens_decoder()
        return {i for i, token in added.items() if token.special}

    @functools.cached_property
    def _has_byte_characters(self) -> bool:
        return "ByteLevel" in json.dumps(json.loads(self._tokenizer.to_str())["decoder"])

    def _special(self, kind: str) -> int | None:
        return special_token(self._path, self._tokenizer, kind)

    def _encode(self, text: str) -> list[int]:
        ids = self._tokenizer.encode(text).ids
        return ids[:-1] if ids[-1:] == [self.eos_id] else ids

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids)


def special_token(path: Path, tokenizer: tokenizers.Tokenizer, kind: str) -> int | None:
    """Finds the id of the ``bos``, ``eos`` or ``pad`` token, from the files beside a tokenizer."""
    for name in BESIDE[:2]:
        token = _read_json(path.with_name(name)).get(f"{kind}_token")
        token = token.get("content") if isinstance(token, dict) else token
        found = tokenizer.token_to_id(token) if isinstance(token, str) else None
        if found is not None:
            return found
    found = _read_json(path.with_name("config.json")).get(f"{kind}_token_id")
    found = found[0] if isinstance(found, list) and found else found
    size = max(tokenizer.get_vocab().values()) + 1
    return found if isinstance(found, int) and 0 <= found < size else None


def _piece_bytes(piece: str) -> int:
    return len(piece.replace("\N{LOWER ONE EIGHTH BLOCK}", " ").encode())


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} is no JSON object")
    return values


def _write_config(folder: Path, special: dict[str, str | None]) -> None:
    """Writes which tokens begin, end and fill texts."""
    values = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    values |= {f"{kind}_token": token for kind, token in special.items()}
    (folder / _CONFIG).write_text(json.dumps(values, indent=2) + "\n")


def _copy_beside(path: Path, folder: Path) -> None:
    for name in BESIDE:
        if path.with_name(name).is_file():
            shutil.copyfile(path.with_name(name), folder / name)


class TextStream:
    """Makes text of ids that come one at a time, as soon as their characters are whole.

    A token may be part of a character, and its text may depend on the tokens before it, such as
    whether a space is in front.
    """

    def __init__(self, tokenizer: Tokenizer, ids: Ids = ()):
        """Begins after ``ids``, whose text is not given again."""
        self._tokenizer = tokenizer
        # The ids whose text is known to be out, of which a few are enough, and those after them.
        self._ids = [int(i) for i in ids][-_CONTEXT:]
        self._known = len(self._ids)

    def add(self, token: int) -> str:
        """Returns the text that the next id completes, perhaps none."""
        self._ids.append(int(token))
        text = self._new_text()
        if text.endswith(_HALF):
            return ""
        self._ids = self._ids[-_CONTEXT:]
        self._known = len(self._ids)
        return text

    def end(self) -> str:
        """Returns what is left of a character that was never completed."""
        return self._new_text()

    def _new_text(self) -> str:
        before = self._tokenizer.decode(self._ids[: self._known])
        return self._tokenizer.decode(self._ids)[len(before) :]


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
