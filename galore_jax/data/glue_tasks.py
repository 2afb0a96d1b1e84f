"""GLUE's tasks: what their texts and labels are called, and where they are on disk."""

from typing import NamedTuple


class Tsv(NamedTuple):
    """Where a task's .tsv files have what.

    Attributes:
      folder: the name of the task's folder.
      columns: the headers of the columns of texts and label; numbers where there are no headers.
      held_out: the files of the held-out splits.
      skips_short_rows: whether rows that lack columns are left out, as in the public qqp.
    """

    folder: str
    columns: tuple[str | int, ...]
    held_out: tuple[str, ...] = ("dev.tsv",)
    skips_short_rows: bool = False


class GlueTask(NamedTuple):
    """A task of GLUE.

    Attributes:
      texts: the features of one sentence, or of a pair.
      labels: the names of the classes, as TFDS numbers them; a single one means a number from 0
        to 5.
      tsv: where the public files have them.
      held_out: the splits to evaluate on, the first of which gives the score.
    """

    texts: tuple[str, ...]
    labels: tuple[str, ...]
    tsv: Tsv
    held_out: tuple[str, ...] = ("validation",)


_PAIR = ("sentence1", "sentence2")
_MNLI_FILES = ("dev_matched.tsv", "dev_mismatched.tsv")
TASKS: dict[str, GlueTask] = {
    "cola": GlueTask(("sentence",), ("unacceptable", "acceptable"), Tsv("CoLA", (3, 1))),
    "stsb": GlueTask(_PAIR, ("similarity",), Tsv("STS-B", (*_PAIR, "score"))),
    "mrpc": GlueTask(
        _PAIR,
        ("not_equivalent", "equivalent"),
        Tsv("MRPC", ("#1 String", "#2 String", "Quality")),
    ),
    "rte": GlueTask(_PAIR, ("entailment", "not_entailment"), Tsv("RTE", (*_PAIR, "label"))),
    "sst2": GlueTask(("sentence",), ("negative", "positive"), Tsv("SST-2", ("sentence", "label"))),
    "mnli": GlueTask(
        ("premise", "hypothesis"),
        ("entailment", "neutral", "contradiction"),
        Tsv("MNLI", (*_PAIR, "gold_label"), _MNLI_FILES),
        ("validation_matched", "validation_mismatched"),
    ),
    "qnli": GlueTask(
        ("question", "sentence"),
        ("entailment", "not_entailment"),
        Tsv("QNLI", ("question", "sentence", "label")),
    ),
    "qqp": GlueTask(
        ("question1", "question2"),
        ("not_duplicate", "duplicate"),
        Tsv("QQP", ("question1", "question2", "is_duplicate"), skips_short_rows=True),
    ),
}
