"""The offline sample: real English that an ordinary pip install brings.

botocore (Apache-2.0) carries the documentation of several hundred web services. Its prose is
written once, as a TFDS ``c4/en`` data set under a cache folder, and read as C4 is.
"""

import gzip
import hashlib
import html
import importlib.metadata
import importlib.resources
import importlib.util
import itertools
import json
import random
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from galore_jax.data.fetched import cache_folder
from galore_jax.data.tfds_folders import write_tfds
from galore_jax.data.tokenizer import train_tokenizer
from galore_jax.errors import UserError

VERSION = "3.1.0"  # of TFDS's c4, whose layout this takes
VOCAB_SIZE = 8192
_FORMAT = 1  # to be raised when the corpus or its tokenizer changes
_KEYS = ("content-length", "content-type", "text", "timestamp", "url")
_DOCUMENT_CHARACTERS = 2_400
_SHORTEST_PARAGRAPH = 40
_TOKENIZER_TEXTS = 2_000  # one document in five: more changes the pieces little


def prepare_sample() -> tuple[Path, Path]:
    """Returns the sample's data_dir and tokenizer, built if this is the first time.

    The cache is ``$GALORE_JAX_CACHE``, or ``~/.cache/galore_jax``. A build that is killed leaves
    nothing that counts as built; of two at once, one is kept.

    Raises:
      UserError: botocore is not installed, or the cache cannot be written.
    """
    if importlib.util.find_spec("botocore") is None:
        raise UserError(
            "the sample is made from the package botocore, which is not installed: "
            "pip install 'galore-jax[sample]'"
        )
    version = importlib.metadata.version("botocore")
    cache = cache_folder()
    folder = cache / f"sample-{_FORMAT}-botocore-{version}"
    if not folder.exists():
        print(f"building the sample corpus in {folder} (once, some seconds)", flush=True)
        begun = time.monotonic()
        try:
            documents = _build(folder)
        except (OSError, RuntimeError) as error:  # RuntimeError: array_record's, for a full disk
            raise UserError(
                f"cannot write the sample corpus to {cache}: {' '.join(str(error).split())}; "
                "set GALORE_JAX_CACHE to another folder"
            ) from error
        print(f"{documents} documents in {time.monotonic() - begun:.0f} s", flush=True)
    return folder, folder / "tokenizer.model"


def _build(folder: Path) -> int:
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=folder.name + ".partial-", dir=folder.parent))
    try:
        documents = _documents(Path(str(importlib.resources.files("botocore"))) / "data")
        write_c4(partial / "c4" / "en" / VERSION, documents)
        every = max(1, len(documents["train"]) // _TOKENIZER_TEXTS)
        train_tokenizer(
            iter(documents["train"][::every]), partial / "tokenizer.model", vocab_size=VOCAB_SIZE
        )
        try:
            partial.rename(folder)
        except OSError:
            if not folder.exists():  # else another process was first
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return sum(len(texts) for texts in documents.values())


def write_c4(folder: Path, documents: dict[str, list[str]]) -> None:
    """Writes texts, by split, as TFDS writes C4."""
    write_tfds(
        folder,
        {
            split: [
                {**dict.fromkeys(_KEYS, ""), "text": x, "content-length": str(len(x))}
                for x in texts
            ]
            for split, texts in documents.items()
        },
        features=tfds.features.FeaturesDict({key: tfds.features.Text() for key in _KEYS}),
        module="tensorflow_datasets.text.c4",
        description="Documentation strings of botocore.",
    )


def _documents(root: Path) -> dict[str, list[str]]:
    """Returns the documents of each split, in a random order that is always the same.

    A paragraph occurs once, a service is in one split, and the near-duplicates of training
    paragraphs are not held out.
    """
    seen: set[str] = set()
    services: dict[str, list[list[str]]] = {"train": [], "validation": []}
    for service in sorted(path for path in root.iterdir() if path.is_dir()):
        paragraphs = [text for text in dict.fromkeys(_paragraphs(service)) if text not in seen]
        seen.update(paragraphs)
        # One service in twenty is held out, by a hash of what the names of its relatives share.
        number = hashlib.sha256(service.name.partition("-")[0].encode()).digest()[0]
        services["validation" if number < 256 / 20 else "train"].append(paragraphs)
    services["validation"] = _without_near_duplicates(services["validation"], services["train"])
    documents = {}
    for split, lists in services.items():
        documents[split] = [text for paragraphs in lists for text in _packed(paragraphs)]
        random.Random(0).shuffle(documents[split])
    return documents


def _without_near_duplicates(held_out: list[list[str]], train: list[list[str]]) -> list[list[str]]:
    """Drops each held-out paragraph with more than half of its 8-word sequences in ``train``."""
    paragraphs = list(itertools.chain(*held_out))
    shared = iter(shares_most(paragraphs, list(itertools.chain(*train)), words=8))
    return [[paragraph for paragraph in service if not next(shared)] for service in held_out]


def shares_most(texts: list[str], others: list[str], *, words: int) -> list[bool]:
    """Tells of each text whether more than half of its sequences of words occur in the others.

    >>> shares_most(["a b c", "d e f"], ["b c a b c"], words=2)
    [True, False]
    """
    grams = {gram for text in texts for gram in _grams(text, words)}
    shared = grams.intersection(gram for text in others for gram in _grams(text, words))

    def is_shared(text: str) -> bool:
        grams = _grams(text, words)
        return sum(gram in shared for gram in grams) > len(grams) / 2

    return [is_shared(text) for text in texts]


def _grams(text: str, words: int) -> list[tuple[str, ...]]:
    split = text.split()
    return [tuple(split[i : i + words]) for i in range(max(1, len(split) - words + 1))]


def _paragraphs(service: Path) -> Iterator[str]:
    versions = sorted(path.name for path in service.iterdir() if path.is_dir())
    for version in versions[-1:]:
        for path in sorted((service / version).glob("service-2.json*")):
            content = path.read_bytes()
            model = json.loads(gzip.decompress(content) if path.suffix == ".gz" else content)
            for documentation in _documentation(model):
                yield from _plain_paragraphs(documentation)


def _documentation(node: Any) -> Iterator[str]:
    """Yields every ``documentation`` string of a service's model, in the file's order."""
    children = node.items() if isinstance(node, dict) else enumerate(node)
    for key, value in children:
        if key == "documentation" and isinstance(value, str):
            yield value
        elif isinstance(value, dict | list):
            yield from _documentation(value)


def _plain_paragraphs(documentation: str) -> Iterator[str]:
    """Yields the prose of a documentation string, without tags, entities and line breaks.

    >>> list(_plain_paragraphs("<p>Lists the <b>objects</b> &amp; versions that a bucket holds.</p>"
    ...     "<p>Short.</p>"))
    ['Lists the objects & versions that a bucket holds.']
    """
    for block in re.split(
        r"</?(?:p|li|ul|ol|dl|dt|dd|note|important|br|h\d)\b[^>]*>", documentation
    ):
        text = " ".join(html.unescape(re.sub(r"<[^>]+>", "", block)).split())
        if len(text) >= _SHORTEST_PARAGRAPH:
            yield text


def _packed(paragraphs: list[str]) -> Iterator[str]:
    """Joins consecutive paragraphs, a line each, to about ``_DOCUMENT_CHARACTERS``."""
    document: list[str] = []
    for paragraph in paragraphs:
        document.append(paragraph)
        if sum(map(len, document)) >= _DOCUMENT_CHARACTERS:
            yield "\n".join(document)
            document = []
    if document:
        yield "\n".join(document)
