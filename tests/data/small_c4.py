"""Small C4s in each of the forms that are read."""

import contextlib
import gzip
import itertools
import json
import random
import struct
from pathlib import Path

from array_record.python.array_record_module import ArrayRecordReader

from galore_jax.data import sample

WORDS = ("the", "a", "small", "large", "model", "reads", "writes", "text", "and", "stops", "here")


def make_texts(count: int, seed: int) -> list[str]:
    """Texts of 1 to 60 words, each with a number of its own."""
    rng = random.Random(seed)
    return [
        f"{seed} {i} " + " ".join(rng.choices(WORDS, k=rng.randint(1, 60))) for i in range(count)
    ]


TEXTS = {"train": make_texts(70, 1), "validation": make_texts(23, 2)}


def read_texts(source, split: str, *, seed=None, place=(), count=None):
    """The next ``count`` texts, or all."""
    with contextlib.closing(source.texts(split, seed=seed, place=place)) as texts:
        return [text for text, _ in itertools.islice(texts, count)]


def write_json(root: Path, texts: dict[str, list[str]] = TEXTS, shards: int = 3) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    for split, documents in texts.items():
        size = -(-len(documents) // shards)
        for i in range(shards):
            path = root / f"c4-{split}.{i:05d}-of-{shards:05d}.json.gz"
            with gzip.open(path, "wt", encoding="utf-8") as file:
                for text in documents[i * size : (i + 1) * size]:
                    file.write(json.dumps({"text": text, "url": "u"}) + "\n")
    return root


def write_array_record(root: Path, texts: dict[str, list[str]] = TEXTS) -> Path:
    sample.write_c4(root / "c4" / "en" / sample.VERSION, texts)
    return root


def write_tfrecord(root: Path, texts: dict[str, list[str]] = TEXTS) -> Path:
    """The array_record data set again in TFRecord's framing, which TFDS needs TensorFlow for."""
    folder = write_array_record(root, texts) / "c4" / "en" / sample.VERSION
    for path in folder.glob("*.array_record*"):
        with Path(str(path).replace("array_record", "tfrecord")).open("wb") as file:
            for record in ArrayRecordReader(str(path)).read_all():
                # The checksums are 0: the reader does not look at them.
                file.write(struct.pack("<QI", len(record), 0) + record + struct.pack("<I", 0))
        path.unlink()
    info = folder / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    return root


WRITERS = {"json": write_json, "array_record": write_array_record, "tfrecord": write_tfrecord}
