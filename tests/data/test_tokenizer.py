import pytest
from small_c4 import TEXTS

from galore_jax.data.tokenizer import open_tokenizer, train_tokenizer
from galore_jax.errors import UserError


def test_encodes_with_the_end_token_and_decodes(tokenizer_path):
    tokenizer = open_tokenizer(tokenizer_path)
    ids = tokenizer.encode("the model reads text")
    assert ids[-1] == tokenizer.eos_id == 1
    assert tokenizer.eos_id not in ids[:-1]
    assert tokenizer.decode(ids[:-1]) == "the model reads text"
    assert (tokenizer.vocab_size, tokenizer.pad_id) == (320, 0)


def test_training_is_deterministic(tokenizer_path, tmp_path):
    train_tokenizer(iter(TEXTS["train"]), tmp_path / "again.model", vocab_size=320)
    with open(tokenizer_path, "rb") as first:
        assert first.read() == (tmp_path / "again.model").read_bytes()


@pytest.mark.parametrize("content", [b"", b'{"version": "1.0"}', b"\x00garbage" * 99])
def test_not_a_sentencepiece_model(tmp_path, content):
    path = tmp_path / "some.model"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"some\.model is not a SentencePiece model"):
        open_tokenizer(path)


def test_missing_and_folder(tmp_path):
    for path in (tmp_path / "nowhere.model", tmp_path):
        with pytest.raises(UserError, match="no such file"):
            open_tokenizer(path)
