"""SentencePiece models as ``tokenizer.json``, which Hugging Face's libraries read.

The same texts become the same ids, save that the names of control pieces, such as ``</s>``, are
recognised in texts, as is usual there. The normalisation is carried over as it is, and merges are
those pairs of pieces that make a piece, in the order of the pieces' scores.
"""

import os
from pathlib import Path
from typing import Any

from google.protobuf.message import DecodeError
from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from galore_jax.errors import UserError

_SPACE = "▁"
_UNIGRAM, _BPE = 1, 2  # TrainerSpec.model_type
_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4  # SentencePiece.type


def from_sentencepiece(path: str | os.PathLike[str]) -> Tokenizer:
    """Converts a SentencePiece model, a byte-pair or a unigram one.

    Args:
      path: the model's file.

    Returns:
      A tokenizer with the same ids for the same text. It adds no begin or end token.

    Raises:
      UserError: a file that is no SentencePiece model, or one of words or characters.
    """
    # Generated code, whose messages type checkers do not see.
    proto: Any = sentencepiece_model_pb2.ModelProto()  # pyright: ignore
    try:
        proto.ParseFromString(Path(path).read_bytes())
    except (OSError, DecodeError) as error:
        raise UserError(f"tokenizer {path} is not a SentencePiece model") from error
    if not proto.pieces:
        raise UserError(f"tokenizer {path} is not a SentencePiece model: it has no pieces")
    tokenizer = Tokenizer(_model(proto, path))
    tokenizer.normalizer = _normalizer(proto.normalizer_spec)  # pyright: ignore
    scheme = "always" if proto.normalizer_spec.add_dummy_prefix else "never"
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(  # pyright: ignore
        _SPACE, scheme, split=proto.trainer_spec.split_by_whitespace
    )
    bytes_and_spaces = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if proto.normalizer_spec.add_dummy_prefix:
        bytes_and_spaces.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(bytes_and_spaces)  # pyright: ignore
    for kind, special in ((_CONTROL, True), (_UNKNOWN, True), (_USER_DEFINED, False)):
        added = [piece.piece for piece in proto.pieces if piece.type == kind]
        tokenizer.add_tokens([AddedToken(x, special=special, normalized=False) for x in added])
    return tokenizer


def _model(proto: Any, path: Any) -> Any:
    kind, byte_fallback = proto.trainer_spec.model_type, proto.trainer_spec.byte_fallback
    unknown = next(i for i, piece in enumerate(proto.pieces) if piece.type == _UNKNOWN)
    if kind == _UNIGRAM:
        pieces = [(piece.piece, piece.score) for piece in proto.pieces]
        return models.Unigram(pieces, unknown, byte_fallback)
    if kind != _BPE:
        raise UserError(
            f"tokenizer {path} is a model of words or characters; give a BPE or unigram one"
        )
    vocabulary = {piece.piece: i for i, piece in enumerate(proto.pieces)}
    scores = {piece.piece: piece.score for piece in proto.pieces}
    merges = [
        (-scores[piece], vocabulary[piece[:cut]], vocabulary[piece[cut:]], piece[:cut], piece[cut:])
        for piece in vocabulary
        for cut in range(1, len(piece))
        if piece[:cut] in vocabulary and piece[cut:] in vocabulary
    ]
    return models.BPE(
        vocabulary,
        [(left, right) for *_, left, right in sorted(merges)],
        unk_token=proto.pieces[unknown].piece,
        fuse_unk=True,
        byte_fallback=byte_fallback,
    )


def _normalizer(spec: Any) -> Any:
    steps: list[Any] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    return normalizers.Sequence(steps)
