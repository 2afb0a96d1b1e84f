"""SentencePiece models as tokenizer.json: the same ids for the same text."""

import io
import random

import pytest
import sentencepiece
import tokenizers

from galore_jax.data.sentencepiece_json import as_json_tokenizer
from galore_jax.errors import UserError

WORDS = "low lower lowest new newer the of galore café naïve stream 12 345 ab-ab <tag> ﬁne №5"
TEXTS = [" ".join(random.Random(i).choices(WORDS.split(), k=30)) for i in range(300)]
HARD = [
    "",
    " ",
    "  two  spaces and\ttabs \n\n lines ",
    "日本語 and 🤗",
    "ﬁ № １２ é é",  # noqa: RUF001
    "a" * 70 + " lowestlowernewer",
    *TEXTS[:50],
]


def train(tmp_path, **options):
    """A small model, and its file."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_writer=model, minloglevel=2, **options
    )
    path = tmp_path / "tokenizer.model"
    path.write_bytes(model.getvalue())
    return sentencepiece.SentencePieceProcessor(model_file=str(path)), path


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
@pytest.mark.parametrize("byte_fallback", [True, False])
@pytest.mark.parametrize("more", [{}, {"add_dummy_prefix": False}, {"split_by_whitespace": False}])
def test_ids_are_those_of_sentencepiece(tmp_path, model_type, byte_fallback, more):
    size = 400 if byte_fallback else 110
    options = {"model_type": model_type, "vocab_size": size, "byte_fallback": byte_fallback}
    given, path = train(tmp_path, **options, hard_vocab_limit=False, **more)
    converted = as_json_tokenizer(path)
    assert converted.get_vocab_size() == given.vocab_size()
    converted.save(str(tmp_path / "tokenizer.json"))
    converted = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in HARD:
        ids = given.encode(text)
        assert converted.encode(text, add_special_tokens=False).ids == ids, text
        if byte_fallback:
            assert converted.decode(ids) == given.decode(ids)


def test_a_model_of_words_is_refused(tmp_path):
    _, path = train(tmp_path, model_type="word", vocab_size=20)
    with pytest.raises(UserError, match="only models of byte pairs or unigrams"):
        as_json_tokenizer(path)
