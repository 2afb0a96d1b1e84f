import json
import random
import shutil

import numpy as np
import pytest
import sentencepiece
import tokenizers
from small_c4 import TEXTS
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from galore_jax.data.sentencepiece_json import as_json_tokenizer
from galore_jax.data.tokenizer import TextStream, open_tokenizer, train_tokenizer
from galore_jax.errors import UserError

ODD = [
    "",
    "   ",
    "  two  spaces ",
    "naïve café ﬁne ① ½",
    "日本語　全角",
    "emoji 😀 👩‍👩‍👧",
    "tab\tnew\nline\r\n",
    "1234567890 3.14",
    "e\u0301 \u00a0x\u00a0 \u200b",
    "▁ ▁▁x",
]


def test_encodes_with_the_end_token_and_decodes(tokenizer_path):
    tokenizer = open_tokenizer(tokenizer_path)
    ids = tokenizer.encode("the model reads text")
    assert ids[-1] == tokenizer.eos_id == 1
    assert tokenizer.eos_id not in ids[:-1]
    assert tokenizer.decode(ids[:-1]) == "the model reads text"
    assert (tokenizer.vocab_size, tokenizer.pad_id) == (320, 0)
    np.testing.assert_array_equal(tokenizer.encode_prompt("the model reads text"), ids[:-1])


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


# tokenizer.json.


@pytest.fixture(scope="module")
def bytes_folder(tmp_path_factory):
    """A byte-level tokenizer.json, as GPT-2 and its kin have, in a folder with its config."""
    folder = tmp_path_factory.mktemp("bytes")
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS["train"], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"eos_token": "</s>", "bos_token": {"content": "<s>"}, "pad_token": "<pad>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(special))
    return folder


@pytest.mark.parametrize("name", ["", "tokenizer.json"])
def test_tokenizer_json(bytes_folder, name):
    tokenizer = open_tokenizer(bytes_folder / name)
    assert (tokenizer.vocab_size, tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id) == (
        max(json.loads((bytes_folder / "tokenizer.json").read_text())["model"]["vocab"].values())
        + 1,
        0,
        1,
        2,
    )
    for text in [*TEXTS["train"], *ODD[1:]]:
        ids = tokenizer.encode(text)
        assert ids.dtype == np.int32
        assert ids[-1] == 2
        assert tokenizer.decode(ids) == text
        np.testing.assert_array_equal(tokenizer.encode_prompt(text), ids[:-1])
    assert tokenizer.encode_prompt("").tolist() == [1]  # nothing to go on from but the beginning
    assert tokenizer.decode([-1, 10**6]) == ""


def test_what_a_tokenizer_json_puts_around_a_text(bytes_folder, tmp_path):
    shutil.copytree(bytes_folder, tmp_path / "copy")
    path = tmp_path / "copy" / "tokenizer.json"
    raw = tokenizers.Tokenizer.from_file(str(path))
    raw.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    raw.enable_truncation(3)
    raw.enable_padding(length=99)
    raw.save(str(path))
    plain = open_tokenizer(bytes_folder).encode_prompt("the model reads text").tolist()
    tokenizer = open_tokenizer(path)
    assert tokenizer.encode("the model reads text").tolist() == [1, *plain, 2]
    assert tokenizer.encode_prompt("the model reads text").tolist() == [1, *plain]


@pytest.mark.parametrize(
    ("file", "content", "eos_id"),
    [
        ("special_tokens_map.json", {"eos_token": {"content": "<s>"}}, 1),
        ("config.json", {"eos_token_id": [2, 1]}, 2),
        ("config.json", {"eos_token_id": 0}, 0),
    ],
)
def test_where_the_end_token_is_told(file, content, eos_id, bytes_folder, tmp_path):
    shutil.copy(bytes_folder / "tokenizer.json", tmp_path)
    with pytest.raises(UserError, match=r"no tokenizer_config\.json beside it has an eos_token"):
        open_tokenizer(tmp_path)
    (tmp_path / file).write_text(json.dumps(content))
    tokenizer = open_tokenizer(tmp_path)
    assert tokenizer.eos_id == eos_id
    # It stays told where the tokenizer goes.
    (tmp_path / "to").mkdir()
    tokenizer.save(tmp_path / "to")
    assert open_tokenizer(tmp_path / "to").eos_id == eos_id


@pytest.mark.parametrize("content", ["", "{}", '{"version": "1.0", "model": {"type": "X"}}'])
def test_not_a_tokenizer_json(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(UserError, match=r"tokenizer\.json cannot be read") as error:
        open_tokenizer(tmp_path)
    assert "\n" not in str(error.value)


# SentencePiece models as tokenizer.json.


@pytest.mark.parametrize(
    "settings",
    [
        {"model_type": "bpe", "byte_fallback": True},
        {
            "model_type": "bpe",
            "byte_fallback": True,
            "normalization_rule_name": "identity",
            "remove_extra_whitespaces": False,
            "split_digits": True,
        },
        {"model_type": "bpe", "byte_fallback": True, "add_dummy_prefix": False},
        {"model_type": "bpe", "byte_fallback": True, "user_defined_symbols": ["<mask>", "mod"]},
        {"model_type": "bpe"},
        {"model_type": "unigram", "byte_fallback": True},
        {"model_type": "unigram"},
    ],
    ids=lambda settings: "-".join(map(str, settings.values())),
)
def test_json_gives_the_ids_of_sentencepiece(settings, tmp_path):
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS["train"]),
        model_prefix=str(tmp_path / "spiece"),
        vocab_size=360,
        hard_vocab_limit=False,
        minloglevel=2,
        **settings,
    )
    path = tmp_path / "spiece.model"
    wanted, tokenizer = open_tokenizer(path), as_json_tokenizer(path)
    texts = [*TEXTS["train"], *TEXTS["validation"], *ODD]
    for text in texts:
        assert [*tokenizer.encode(text).ids, wanted.eos_id] == wanted.encode(text).tolist(), text
    (tmp_path / "saved").mkdir()
    wanted.save(tmp_path / "saved")
    saved = open_tokenizer(tmp_path / "saved")
    assert (saved.vocab_size, saved.eos_id) == (wanted.vocab_size, wanted.eos_id)
    assert saved.bos_id == wanted.bos_id == 1
    for text in texts:
        np.testing.assert_array_equal(saved.encode(text), wanted.encode(text))
        if settings.get("byte_fallback"):  # else SentencePiece shows unknown pieces as a sign
            assert saved.decode(saved.encode(text)) == wanted.decode(wanted.encode(text))


def test_a_begin_token_that_is_asked_for(tmp_path):
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS["train"]),
        model_prefix=str(tmp_path / "tokenizer"),
        vocab_size=320,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    plain = open_tokenizer(tmp_path).encode("text").tolist()
    (tmp_path / "tokenizer_config.json").write_text('{"add_bos_token": true}')
    asked = open_tokenizer(tmp_path)
    assert asked.encode("text").tolist() == [1, *plain]
    for write in (asked.copy, asked.save):
        (tmp_path / write.__name__).mkdir()
        write(tmp_path / write.__name__)
        again = open_tokenizer(tmp_path / write.__name__)
        assert again.encode("text").tolist() == [1, *plain]


def test_models_of_words_stay_as_they_are(tmp_path):
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS["train"]),
        model_prefix=str(tmp_path / "words"),
        model_type="char",
        vocab_size=320,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    with pytest.raises(UserError, match="only models of byte pairs or unigrams"):
        open_tokenizer(tmp_path / "words.model").save(tmp_path)


# Text that comes a token at a time.


@pytest.mark.parametrize("kind", ["sentencepiece", "bytes"])
def test_a_stream_gives_the_text_of_all_ids(kind, tokenizer_path, bytes_folder):
    tokenizer = open_tokenizer(tokenizer_path if kind == "sentencepiece" else bytes_folder)
    for text in ["the model reads text", *ODD, "😀" * 30]:
        ids = tokenizer.encode(text)
        stream = TextStream(tokenizer)
        pieces = [stream.add(i) for i in ids]
        assert "\ufffd" not in "".join(pieces)
        assert "".join(pieces) + stream.end() == tokenizer.decode(ids)
        # After a prompt, what it gives is what follows the prompt's text.
        before, after = ids[:3], ids[3:]
        if not tokenizer.decode(before).endswith("\ufffd"):
            stream = TextStream(tokenizer, before)
            rest = "".join(map(stream.add, after)) + stream.end()
            assert tokenizer.decode(before) + rest == tokenizer.decode(ids)


@pytest.mark.parametrize("kind", ["sentencepiece", "bytes"])
def test_a_stream_of_any_ids_loses_none(kind, tokenizer_path, bytes_folder):
    tokenizer = open_tokenizer(tokenizer_path if kind == "sentencepiece" else bytes_folder)
    rng = random.Random(0)
    for _ in range(50):
        ids = [rng.randrange(tokenizer.vocab_size + 5) for _ in range(60)]
        stream = TextStream(tokenizer)
        text = "".join(map(stream.add, ids)) + stream.end()
        assert text.replace("\ufffd", "") == tokenizer.decode(ids).replace("\ufffd", "")


def test_half_a_character_waits_for_the_rest(bytes_folder):
    tokenizer = open_tokenizer(bytes_folder)
    first, *rest = tokenizer.encode_prompt("é")
    assert rest
    stream = TextStream(tokenizer)
    assert stream.add(first) == ""
    assert "".join(map(stream.add, rest)) == "é"
    assert stream.add(first) == ""
    assert stream.end() == "\ufffd"
