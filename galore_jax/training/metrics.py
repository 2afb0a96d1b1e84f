"""What a run writes down about itself: `metrics.jsonl`, `config.json`, `versions.json`.

`metrics.jsonl` is append-only, one JSON object a line. After an interruption it is cut back to the
step that is resumed from, so that in the end it holds what an uninterrupted run's would.
"""

import importlib.metadata
import json
import math
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
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "grain",
    "array_record",
    "tensorflow-datasets",
    "sentencepiece",
    "botocore",
    "ml_collections",
    "numpy",
    "galore-jax",
)


class MetricsLog:
    """Appends lines to `workdir/metrics.jsonl`, and the same numbers to TensorBoard if asked.

    Training lines have the keys `step, loss, learning_rate, grad_norm, tokens, tokens_per_second`;
    evaluation lines `step, eval_loss, eval_perplexity, eval_tokens`; either may have more.

    Each line reaches the operating system before `write` returns, so a SIGKILL loses at most the
    line being written. Numbers are written with as many digits as reading them back bit for bit
    takes. JSON has no NaN or infinity: they are the strings "NaN", "Infinity" and "-Infinity",
    which Python's `float` and `read_metrics` understand.

    Args:
      workdir: The run's folder, made if it is missing.
      resume_step: The step that the run resumes from: lines of later steps, which the run will
        write again, and a line that a kill cut short are dropped, in one atomic replacement of the
        file. None begins a new file; one that is there is kept as `metrics.jsonl.bak`.
      tensorboard: Whether to write TensorBoard event files to `workdir/tensorboard` as well.

    Raises:
      UserError: `tensorboard` without tensorboardX installed.

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
        workdir.mkdir(parents=True, exist_ok=True)
        path = workdir / "metrics.jsonl"
        self._tensorboard = _summary_writer(workdir, resume_step) if tensorboard else None
        if resume_step is not None:
            kept = [line for line in _whole_lines(path) if line["step"] <= resume_step]
            _replace(path, "".join(_dumps(line) + "\n" for line in kept))
        elif path.exists():  # from a run killed before its first checkpoint, most likely
            path.replace(path.with_name(path.name + ".bak"))
        self._file = path.open("ab", buffering=0)

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def write(self, line: Mapping[str, Any]) -> None:
        """Appends one line; values are numbers (Python's, NumPy's or 0-d arrays) or strings.

        Raises:
          UserError: The file cannot be written; most likely no space is left.
        """
        line = {key: _plain(value) for key, value in line.items()}
        rest = memoryview((_dumps(line) + "\n").encode())
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
    """The lines of `workdir/metrics.jsonl` as dicts, NaN and infinities as floats again."""
    return _whole_lines(Path(workdir) / "metrics.jsonl")


def write_run_record(workdir: Path, config_json: Mapping[str, Any], *, first: bool) -> None:
    """Writes `config.json` and, when the run begins, `versions.json`, each atomically.

    Args:
      workdir: The run's folder.
      config_json: The resolved config, in JSON values.
      first: Whether the run begins; the versions stay those that it began with.

    Raises:
      UserError: The folder cannot be written.
    """
    device = jax.local_devices()[0]
    versions = {
        "python": platform.python_version(),
        **{package.replace("galore-jax", "galore_jax"): _version(package) for package in _PACKAGES},
        "platform": platform.platform(),
        "backend": device.platform,
        "device_kind": device.device_kind,
    }
    records = {"config.json": config_json, **({"versions.json": versions} if first else {})}
    for name, record in records.items():
        _replace(workdir / name, json.dumps(record, indent=2, allow_nan=False) + "\n")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _summary_writer(workdir: Path, resume_step: int | None) -> Any:
    try:
        import tensorboardX
    except ImportError as error:
        raise UserError(
            "TensorBoard files need tensorboardX: pip install 'galore-jax[tensorboard]', "
            "or turn the option off"
        ) from error
    # Of what was written from `purge_step` on, TensorBoard shows only the later of two versions.
    purge_step = 0 if resume_step is None else resume_step + 1
    return tensorboardX.SummaryWriter(
        str(workdir / "tensorboard"),
        purge_step=purge_step,
        filename_suffix=f".{time.time_ns()}",  # else two starts within a second share one file
    )


def _whole_lines(path: Path) -> list[dict[str, Any]]:
    """All lines but what a kill left half-written, or a full disk or power cut as garbage."""
    lines = []
    content = path.read_bytes() if path.exists() else b""
    for raw in content.split(b"\n")[:-1]:
        try:
            line = json.loads(raw)
        except ValueError:
            continue
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            lines.append({key: _NON_FINITE.get(value, value) for key, value in line.items()})
    return lines


_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def _plain(value: Any) -> Any:
    """A Python number: float32 widens exactly, so its shortest repr reads back bit-equal."""
    return value if isinstance(value, str | None) else np.asarray(value).item()


def _dumps(line: Mapping[str, Any]) -> str:
    def strict(value: Any) -> Any:
        if isinstance(value, float) and not math.isfinite(value):
            return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
        return value

    return json.dumps({key: strict(value) for key, value in line.items()}, allow_nan=False)


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
        partial.unlink(missing_ok=True)
        raise UserError(f"cannot write {path}: {error.strerror}") from error
