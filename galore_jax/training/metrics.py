"""The record of a run: ``metrics.jsonl``, ``config.json`` and ``versions.json``.

``metrics.jsonl`` is append-only, one JSON object a line. After an interruption it is cut back to
the step that is resumed from, so that in the end it holds what an uninterrupted run's would.
"""

import contextlib
import importlib.metadata
import json
import os
import platform
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from galore_jax.errors import UserError

_PACKAGES = (
    "jax jaxlib flax optax orbax-checkpoint grain array_record tensorflow-datasets sentencepiece "
    "botocore ml_collections numpy galore_jax"
)
_NON_FINITE = ("NaN", "Infinity", "-Infinity")


class MetricsLog(contextlib.AbstractContextManager):
    """Appends lines to ``workdir/metrics.jsonl``, and the same numbers to TensorBoard if asked.

    Training lines have at least the keys ``step, loss, learning_rate, tokens, tokens_per_second``,
    evaluation lines ``step, eval_loss, eval_perplexity, eval_tokens``.

    Each line reaches the operating system before ``write`` returns, so a SIGKILL loses at most the
    line being written. Numbers read back bit for bit. JSON has no NaN or infinity: they are the
    strings "NaN", "Infinity" and "-Infinity", which Python's ``float`` understands.

    Args:
      workdir: the run's folder, made if it is missing.
      resume_step: the step that the run resumes from; lines of later steps, and one that a kill cut
        short, are dropped. None begins a new file and keeps an old one as ``metrics.jsonl.bak``.
      tensorboard: whether to write TensorBoard event files to ``workdir/tensorboard`` as well.

    Raises:
      UserError: a file cannot be written, or ``tensorboard`` without tensorboardX installed.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as workdir:
    ...     with MetricsLog(workdir, resume_step=None) as metrics:
    ...         metrics.write({"step": 1, "loss": np.float32(9.1)})
    ...     read_metrics(workdir)
    [{'step': 1, 'loss': 9.100000381469727}]
    """

    def __init__(
        self,
        workdir: str | os.PathLike[str],
        *,
        resume_step: int | None,
        tensorboard: bool = False,
    ):
        workdir = Path(workdir)
        path = workdir / "metrics.jsonl"
        try:
            workdir.mkdir(parents=True, exist_ok=True)
            self._tensorboard = _summary_writer(workdir, resume_step) if tensorboard else None
            if resume_step is not None:
                lines = (line for line in read_metrics(workdir) if line["step"] <= resume_step)
                _replace(path, "".join(map(_dumps, lines)))
            elif path.exists():  # from a run killed before its first checkpoint, most likely
                path.replace(path.with_name(path.name + ".bak"))
            self._file = path.open("ab", buffering=0)
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}") from error

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def write(self, line: Mapping[str, Any]) -> None:
        """Appends one line; values are numbers (Python's, NumPy's or 0-d arrays) or strings.

        Raises:
          UserError: the file cannot be written; most likely no space is left.
        """
        line = {key: _plain(value) for key, value in line.items()}
        rest = memoryview(_dumps(line).encode())
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            raise UserError(f"cannot write {self._file.name}: {error.strerror}") from error
        if self._tensorboard is not None:
            for key, value in line.items():
                if key != "step" and isinstance(value, int | float):
                    self._tensorboard.add_scalar(key, value, line["step"])
            self._tensorboard.flush()

    def close(self) -> None:
        """Closes the files."""
        self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()


def read_metrics(workdir: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Reads the lines of ``workdir/metrics.jsonl``, NaN and infinities as floats again.

    A line that a kill left half-written, or a full disk or power cut as garbage, is left out.
    """
    path = Path(workdir) / "metrics.jsonl"
    lines = []
    for raw in path.read_bytes().split(b"\n")[:-1] if path.exists() else ():
        try:
            line = json.loads(raw)
        except ValueError:
            continue
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            lines.append({k: float(v) if v in _NON_FINITE else v for k, v in line.items()})
    return lines


def write_run_record(workdir: Path, config_json: Mapping[str, Any], *, first: bool) -> None:
    """Writes ``config.json`` and, when the run begins, ``versions.json``, each atomically.

    Args:
      workdir: the run's folder.
      config_json: the resolved config, in JSON values.
      first: whether the run begins; the versions stay those that it began with.

    Raises:
      UserError: the folder cannot be written.
    """
    device = jax.local_devices()[0]
    versions = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "backend": device.platform,
        "device_kind": device.device_kind,
        **dict.fromkeys(_PACKAGES.split()),
    }
    for package in _PACKAGES.split():
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    records = {"config.json": config_json, **({"versions.json": versions} if first else {})}
    for name, record in records.items():
        _replace(workdir / name, json.dumps(record, indent=2, allow_nan=False) + "\n")


def _summary_writer(workdir: Path, resume_step: int | None) -> Any:
    try:
        import tensorboardX
    except ImportError as error:
        raise UserError(
            "TensorBoard files need tensorboardX: pip install 'galore-jax[tensorboard]', "
            "or turn the option off"
        ) from error
    return tensorboardX.SummaryWriter(
        str(workdir / "tensorboard"),
        # Where two versions of a step are there, TensorBoard shows the later from this step on.
        purge_step=0 if resume_step is None else resume_step + 1,
        filename_suffix=f".{time.time_ns()}",  # else two starts within a second share one file
    )


def _plain(value: Any) -> Any:
    """Makes a Python number: float32 widens exactly, so its shortest repr reads back bit-equal."""
    return value if isinstance(value, str | None) else np.asarray(value).item()


def _dumps(line: Mapping[str, Any]) -> str:
    """Writes strict JSON: a NaN or an infinity as a string."""
    return json.dumps(json.loads(json.dumps(line), parse_constant=str)) + "\n"


def _replace(path: Path, content: str) -> None:
    """Writes the whole file or nothing, also when the machine stops half way."""
    partial = path.with_name(path.name + ".tmp")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise UserError(f"cannot write {path}: {error.strerror}") from error
