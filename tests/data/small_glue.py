"""Small tasks of GLUE on disk, and a tokenizer for them."""

import numpy as np
import tensorflow_datasets as tfds
import tokenizers

from galore_jax.data.glue_tasks import TASKS
from galore_jax.data.tfds_folders import write_tfds

WORDS = ["a", "the", "good", "bad", "film", "plot", "is", "was", "not", "very", "and", "it"]
TEXTS = [" ".join(np.random.default_rng(i).choice(WORDS, 3 + i % 9)) + f" {i}" for i in range(30)]


def rows_of(task, count, shift=0):
    """(text, ..., label) of some examples."""
    spec = TASKS[task]
    made = []
    for i in range(count):
        texts = [TEXTS[(i + shift + 7 * j) % len(TEXTS)] for j in range(len(spec.texts))]
        label = (i % 11) / 2 if len(spec.labels) == 1 else i % len(spec.labels)
        made.append((*texts, label))
    return made


def splits_of(task):
    sizes = {"train": len(TEXTS), **dict.fromkeys(TASKS[task].held_out, 11)}
    return {split: rows_of(task, size, shift) for shift, (split, size) in enumerate(sizes.items())}


def write_glue(folder, task, *, features=None, row=None, splits=None):
    """Writes a task as TFDS does; returns its rows."""
    spec, splits = TASKS[task], splits or splits_of(task)
    if features is None:
        features = {name: tfds.features.Text() for name in spec.texts}
        features["idx"] = tfds.features.Tensor(shape=(), dtype=np.int32)
        features["label"] = (
            tfds.features.Tensor(shape=(), dtype=np.float32)
            if len(spec.labels) == 1
            else tfds.features.ClassLabel(names=list(spec.labels))
        )
    if row is None:
        row = lambda values: dict(  # noqa: E731
            zip((*spec.texts, "label", "idx"), (*values, 0), strict=True)
        )
    write_tfds(
        folder / "glue" / task / "2.0.0",
        {split: [row(values) for values in rows] for split, rows in splits.items()},
        features=tfds.features.FeaturesDict(features),
        module="tensorflow_datasets.text.glue",
        description="A small task.",
    )
    return splits


def write_tsv(folder, task, *, change=lambda rows: rows, header=lambda names: names):
    """Writes a task as the public .tsv files; returns its rows."""
    spec, splits = TASKS[task], splits_of(task)
    columns = spec.tsv.columns
    (folder / spec.tsv.folder).mkdir()
    for split, file in zip(splits, ("train.tsv", *spec.tsv.held_out), strict=True):
        lines = []
        if isinstance(columns[0], str):
            lines.append("\t".join(header(["index", *columns])))
        for i, (*texts, label) in enumerate(change(splits[split])):
            if isinstance(columns[0], str):
                name = str(label)
                if task in ("rte", "qnli", "mnli"):
                    name = spec.labels[label]
                cells = [str(i), *texts, name]
            else:
                cells = ["source", str(label), "", *texts]
            lines.append("\t".join(cells))
        (folder / spec.tsv.folder / file).write_text("\n".join(lines) + "\n")
    return splits


def write_tokenizer(folder, *, special=True):
    """Writes a tokenizer of words with BERT's special tokens."""
    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, *map(str, range(30))]
    ids = {word: i for i, word in enumerate(vocab)}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    if special:
        made.post_processor = tokenizers.processors.TemplateProcessing(
            single="[CLS] $A [SEP]",
            pair="[CLS] $A [SEP] $B:1 [SEP]:1",
            special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
        )
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"pad_token": "[PAD]"}')
