"""A SentencePiece model as the ``tokenizer.json`` that transformers opens."""

import re
import struct
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from galore_jax.errors import UserError

_SPACE = "▁"
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4  # types of pieces
_UNIGRAM, _BPE = 1, 2  # types of models


class _Piece(NamedTuple):
    text: str
    score: float
    kind: int


class _Model(NamedTuple):
    """What a SentencePiece model file says, with the defaults of ``sentencepiece_model.proto``."""

    pieces: list[_Piece]
    kind: int
    byte_fallback: bool
    space_behind: bool
    characters: bytes  # the compiled rules that replace characters
    space_in_front: bool
    drop_spaces: bool  # at both ends, and all but one of several
    mark_spaces: bool


def as_json_tokenizer(path: Path, *, begin: int | None = None) -> tokenizers.Tokenizer:
    """Makes a tokenizer that gives the ids of a SentencePiece model.

    It differs where a text has the name of a special token in it, such as ``</s>``: that becomes
    the token.

    Args:
      path: the model's file, of byte pairs or unigrams.
      begin: the id that goes in front of every text, if any.

    Raises:
      UserError: a model of words or characters.
    """
    model = _read(path.read_bytes())
    if model.kind not in (_UNIGRAM, _BPE) or model.space_behind:
        raise UserError(f"tokenizer {path}: only models of byte pairs or unigrams become JSON")
    whole = [piece.text for piece in model.pieces if piece.kind == _USER_DEFINED]
    tokenizer = tokenizers.Tokenizer(_bpe(model, whole) if model.kind == _BPE else _unigram(model))

    steps: list[Any] = []
    if model.characters:
        steps.append(normalizers.Precompiled(model.characters))
    if model.drop_spaces:
        steps.append(normalizers.Replace(Regex("^ +| +$"), ""))
        steps.append(normalizers.Replace(Regex(" {2,}"), " "))
    if model.space_in_front:
        steps.append(normalizers.Prepend(" "))
    if model.mark_spaces:
        steps.append(normalizers.Replace(" ", _SPACE))
    tokenizer.normalizer = normalizers.Sequence(steps)  # type: ignore[assignment]
    if whole:  # longest first, as SentencePiece looks for them
        longest_first = sorted(whole, key=len, reverse=True)
        pattern = Regex("|".join(map(re.escape, longest_first)))
        tokenizer.pre_tokenizer = pre_tokenizers.Split(pattern, "isolated")  # type: ignore
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if model.space_in_front:
        steps.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(steps)  # type: ignore[assignment]
    special = [piece.text for piece in model.pieces if piece.kind in (_UNKNOWN, _CONTROL)]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    if begin is not None:
        bos = model.pieces[begin].text
        tokenizer.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
            single=f"{bos} $A",
            pair=f"{bos} $A {bos} $B",
            special_tokens=[(bos, begin)],
        )
    return tokenizer


def _unigram(model: _Model) -> Any:
    pieces = [(piece.text, piece.score) for piece in model.pieces]
    return models.Unigram(pieces, _unknown(model), model.byte_fallback)


def _bpe(model: _Model, whole: list[str]) -> Any:
    """Finds the merges, which SentencePiece does not keep: any two pieces that make a third.

    The piece of the higher score is merged first.
    """
    ids = {piece.text: i for i, piece in enumerate(model.pieces)}
    normal = {piece.text: piece.score for piece in model.pieces if piece.kind == _NORMAL}
    merges = []
    for piece, score in normal.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in normal and right in normal:
                merges.append((-score, ids[piece], ids[left], left, right))
    return models.BPE(
        ids,
        [(left, right) for *_, left, right in sorted(merges)],
        unk_token=model.pieces[_unknown(model)].text,
        fuse_unk=True,
        byte_fallback=model.byte_fallback,
        ignore_merges=bool(whole),
    )


def _unknown(model: _Model) -> int:
    return next(i for i, piece in enumerate(model.pieces) if piece.kind == _UNKNOWN)


def _read(message: bytes) -> _Model:
    # The module for it that sentencepiece brings runs with the newest protobuf alone.
    fields = _fields(message)
    trainer = _fields(fields[2][0] if fields[2] else b"")
    rules = _fields(fields[3][0] if fields[3] else b"")

    def last(values: list[Any], default: Any) -> Any:
        return values[-1] if values else default

    def piece(message: bytes) -> _Piece:
        found = _fields(message)
        (score,) = struct.unpack("<f", last(found[2], bytes(4)))
        return _Piece(last(found[1], b"").decode(), score, last(found[3], _NORMAL))

    return _Model(
        pieces=[piece(message) for message in fields[1]],
        kind=last(trainer[3], _UNIGRAM),
        byte_fallback=bool(last(trainer[35], False)),
        space_behind=bool(last(trainer[24], False)),
        characters=last(rules[2], b""),
        space_in_front=bool(last(rules[3], True)),
        drop_spaces=bool(last(rules[4], True)),
        mark_spaces=bool(last(rules[5], True)),
    )


def _fields(message: bytes) -> defaultdict[int, list[Any]]:
    """Reads the fields of a protocol buffer by their numbers: integers, or bytes."""
    fields, at = defaultdict(list), 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte, at = message[at], at + 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
            shift += 7

    while at < len(message):
        number, wire = divmod(varint(), 8)
        if wire == 0:
            fields[number].append(varint())
            continue
        size = {1: 8, 5: 4}[wire] if wire != 2 else varint()
        fields[number].append(message[at : at + size])
        at += size
    return fields
