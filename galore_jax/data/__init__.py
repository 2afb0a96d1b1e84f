"""Token batches for language-model training: C4, and an offline sample of real English."""

import logging


def _is_wanted(record: logging.LogRecord) -> bool:
    # With jaxlib before 0.11 Grain's import warns of a profiler of its workers, of which none run.
    return "Grain multiprocess worker profiling" not in record.getMessage()


logging.getLogger("absl").addFilter(_is_wanted)
