"""Devices to compile for: this machine's own, or others that need not be there."""

import contextlib
import dataclasses
import difflib
import importlib.resources
import importlib.util
import os
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies

from galore_jax.errors import UserError
from galore_jax.quiet_cuda import quiet_cuda

# Compilation without the card: no timing of kernels to choose among them.
_GPU_FLAGS = ("--xla_gpu_autotune_level=0", "--xla_gpu_enable_triton_gemm=false")
_HERE = ("auto", "cpu")


@dataclasses.dataclass(frozen=True)
class Target:
    """A device.

    Attributes:
      name: what ``--target`` calls it.
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

    @property
    def is_here(self) -> bool:
        """Whether it is this machine's own device."""
        return self.name in _HERE


def target_names() -> list[str]:
    """The names that :func:`find_target` knows.

    >>> "rtx4090" in target_names()
    True
    """
    return [*_HERE, *_facts()]


def prepare_process() -> None:
    """Sets what compiling for a GPU that is not there needs; before JAX is first used.

    Without effect on a machine with a GPU of its own, whose flags are left alone.
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
    """The device of a name, or of a TOML file like ``targets.toml`` with one table.

    ``auto`` is this machine's own; ``cpu`` its processor, whose memory is the machine's.

    Raises:
      UserError: an unknown name (the nearest is named), a file that is missing or incomplete, or
        a compiler that is not installed (the extra is named).

    >>> find_target("cpu").label
    'cpu'
    """
    if name in _HERE:
        device = jax.devices("cpu")[0] if name == "cpu" else jax.local_devices()[0]
        return Target(name, device.device_kind, device.platform, _memory_here(device), device)
    if name.endswith(".toml"):
        path = Path(name)
        if not path.is_file():
            raise UserError(f"--target={name}: there is no such file")
        with _named(name):
            tables = tomllib.loads(path.read_text())
            if len(tables) != 1:
                raise UserError(f"--target={name} must have one table, it has {len(tables)}")
            return _compiled_for(*next(iter(tables.items())))
    facts = _facts()
    if name not in facts:
        near = difflib.get_close_matches(name, target_names(), n=1)
        hint = f"did you mean {near[0]}?" if near else "or a file of your own, NAME.toml"
        raise UserError(f"--target={name} is none of {', '.join(target_names())}; {hint}")
    return _compiled_for(name, facts[name])


def _facts() -> dict[str, dict[str, Any]]:
    text = importlib.resources.files("galore_jax").joinpath("targets.toml").read_text()
    return tomllib.loads(text)


def _compiled_for(name: str, facts: dict[str, Any]) -> Target:
    with _named(name):
        platform = facts["platform"]
        if platform == "tpu":
            topology = {"platform": "tpu", "topology_name": facts["topology"]}
            device = _device(name, "tpu-target", "libtpu", **topology)
        elif platform == "cuda":
            topology = {"platform": "cuda", "topology": "1x1x1"}
            topology["target_config"] = _target_config(facts)
            device = _device(name, "gpu-target", "jax_plugins.xla_cuda12", **topology)
        else:
            raise UserError(f"--target={name}: platform must be cuda or tpu, got {platform!r}")
        return Target(
            name,
            facts["label"],
            platform,
            int(facts["memory"]),
            device,
            facts.get("bfloat16_products", True),
        )


@contextlib.contextmanager
def _named(name: str) -> Iterator[None]:
    try:
        yield
    except KeyError as error:
        raise UserError(f"--target={name} lacks {error}; see galore_jax/targets.toml") from error
    except (tomllib.TOMLDecodeError, TypeError, AttributeError) as error:
        raise UserError(f"--target={name} is not like galore_jax/targets.toml: {error}") from error


def _device(name: str, extra: str, module: str, **topology: str) -> Any:
    try:
        return topologies.get_topology_desc(**topology).devices[0]
    except (RuntimeError, ValueError, NotImplementedError, ImportError) as error:
        raise _missing(name, extra, module, error) from error


def _missing(name: str, extra: str, module: str, error: Exception) -> UserError:
    try:
        found = importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        found = False
    if not found:
        return UserError(f"--target={name} needs its compiler: pip install 'galore-jax[{extra}]'")
    return UserError(f"--target={name} cannot be compiled for here: {error}")


def _memory_here(device: Any) -> int | None:
    if device.platform == "cpu":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    stats = device.memory_stats()
    return None if stats is None else stats.get("bytes_limit")


def _target_config(facts: dict[str, Any]) -> str:
    """XLA's GpuTargetConfigProto, as text."""
    major, minor = str(facts["compute_capability"]).split(".")
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: {facts["shared_memory_per_core"]}
  threads_per_core_limit: {facts["threads_per_core"]}
  core_count: {facts["cores"]}
  fpus_per_core: {facts["fpus_per_core"]}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {facts["bandwidth"]}
  l2_cache_size: {facts["l2_cache"]}
  clock_rate_ghz: {facts["clock_ghz"]}
  device_memory_size: {facts["memory"]}
  shared_memory_per_block_optin: {facts["shared_memory_per_block"]}
  cuda_compute_capability {{ major: {major} minor: {minor} }}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 8 }}
device_description_str: "{facts["label"]}"
"""
