"""Devices to compile for: this machine's own, and others that need not be there."""

import contextlib
import dataclasses
import difflib
import importlib.resources
import os
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies

from galore_jax.errors import UserError
from galore_jax.quiet_cuda import quiet_cuda

# Without the card, the compiler cannot time kernels to choose among them.
_GPU_FLAGS = ("--xla_gpu_autotune_level=0", "--xla_gpu_enable_triton_gemm=false")
_LOCAL = ("auto", "cpu")
_FOLDER = importlib.resources.files("galore_jax.memory")
_FILE = "galore_jax/memory/targets.toml"


@dataclasses.dataclass(frozen=True)
class Target:
    """A device to compile for.

    Attributes:
      name: its name for ``--target``.
      label: its makers' name for it.
      platform: ``"cpu"``, ``"cuda"``, ``"tpu"``, or JAX's name of this machine's own.
      memory: bytes that programs can have; None if that is not known.
      device: JAX's, to compile for.
      bfloat16_products: whether its compiler takes matrix products in bfloat16.
    """

    name: str
    label: str
    platform: str
    memory: int | None
    device: Any
    bfloat16_products: bool = True


def target_names() -> list[str]:
    """The names that ``find_target`` knows.

    >>> "rtx4090" in target_names()
    True
    """
    return [*_LOCAL, *known_targets()]


def prepare_process() -> None:
    """Sets the environment that compiling for an absent GPU or TPU needs.

    Call it before JAX is first used. Flags that the user has set are left alone.
    """
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    given = os.environ.get("XLA_FLAGS", "").split()
    added = [flag for flag in _GPU_FLAGS if flag.split("=")[0] not in " ".join(given)]
    os.environ["XLA_FLAGS"] = " ".join([*given, *added])
    with quiet_cuda():
        jax.devices()


def find_target(name: str) -> Target:
    """Finds a device by its name, or by a TOML file like ``targets.toml`` with one table.

    ``auto`` is this machine's own; ``cpu`` its processor, whose memory is the machine's.

    Raises:
      UserError: an unknown name (the nearest is named), a file that is missing or incomplete, or
        a compiler that is not installed (the extra is named).

    >>> find_target("cpu").label
    'cpu'
    """
    if name in _LOCAL:
        device = jax.devices("cpu")[0] if name == "cpu" else jax.local_devices()[0]
        return Target(name, device.device_kind, device.platform, _local_memory(device), device)
    tables = known_targets()
    if name.endswith(".toml"):
        if not Path(name).is_file():
            raise UserError(f"--target={name}: there is no such file")
        with _naming(name):
            tables = tomllib.loads(Path(name).read_text())
        if len(tables) != 1:
            raise UserError(f"--target={name} must have one table, it has {len(tables)}")
        (name,) = tables
    if name not in tables:
        near = difflib.get_close_matches(name, target_names(), n=1)
        hint = f"did you mean {near[0]}?" if near else "or a file of your own, NAME.toml"
        raise UserError(f"--target={name} is none of {', '.join(target_names())}; {hint}")
    with _naming(name):
        return _remote_target(name, tables[name])


def known_targets() -> dict[str, dict[str, Any]]:
    """Reads ``targets.toml``: the facts of each device, by its name for ``--target``.

    >>> known_targets()["h100"]["label"]
    'H100 SXM'
    """
    return tomllib.loads(_FOLDER.joinpath("targets.toml").read_text())


def _remote_target(name: str, facts: dict[str, Any]) -> Target:
    platform, label, memory = facts["platform"], facts["label"], int(facts["memory"])
    if platform == "tpu":
        device = _device(name, "tpu-target", platform="tpu", topology_name=facts["topology"])
    elif platform == "cuda":
        major, minor = str(facts["compute_capability"]).split(".")
        text = _FOLDER.joinpath("gpu_target.textproto").read_text()  # a GpuTargetConfigProto
        text = text.format(**facts, major=major, minor=minor)
        device = _device(name, "gpu-target", platform="cuda", topology="1x1x1", target_config=text)
    else:
        raise UserError(f"--target={name}: platform must be cuda or tpu, got {platform!r}")
    bfloat16 = facts.get("bfloat16_products", True)
    return Target(name, label, platform, memory, device, bfloat16)


@contextlib.contextmanager
def _naming(name: str) -> Iterator[None]:
    try:
        yield
    except KeyError as error:
        raise UserError(f"--target={name} lacks {error}; see {_FILE}") from error
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"--target={name} is not like {_FILE}: {error}") from error


def _device(name: str, extra: str, **topology: str) -> Any:
    try:
        return topologies.get_topology_desc(**topology).devices[0]
    except (RuntimeError, ValueError, NotImplementedError, ImportError) as error:
        raise UserError(
            f"--target={name} needs its compiler, pip install 'galore-jax[{extra}]', and cannot be "
            f"compiled for here: {str(error).partition(chr(10))[0]}"
        ) from error


def _local_memory(device: Any) -> int | None:
    if device.platform == "cpu":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    stats = device.memory_stats()
    return None if stats is None else stats.get("bytes_limit")
