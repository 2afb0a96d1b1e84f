"""Time and memory of an update of 8-bit Adam beside Optax's, in one process, in turn.

  python benchmarks/adam8bit.py
  python benchmarks/adam8bit.py --compile_for=tpu     (needs libtpu)
  python benchmarks/adam8bit.py --compile_for=cuda    (needs jax-cuda12-plugin, jax-cuda12-pjrt)

Prints the median of the ratios of times, and the bytes of state and of temporaries of the compiled
updates. What is compiled for a device that is not there is not run.
"""

import argparse
import importlib.metadata
import os
import statistics
import time
from typing import Any

os.environ.setdefault("XLA_FLAGS", "--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false")

import jax
import jax.numpy as jnp
import optax
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from galore_jax import adamw8bit
from galore_jax.memory import tree_bytes

SHAPES = {"attention": (8, 512, 512), "mlp": (8, 512, 1376), "embedding": (32_000, 512)}
# GpuTargetConfigProto of an RTX 4090.
RTX_4090 = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 102400
  threads_per_core_limit: 1536
  core_count: 128
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 1008000000000
  l2_cache_size: 75497472
  clock_rate_ghz: 2.52
  device_memory_size: 25247875072
  shared_memory_per_block_optin: 101376
  cuda_compute_capability { major: 8 minor: 9 }
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 8 }
device_description_str: "NVIDIA GeForce RTX 4090"
"""


def target(name: str) -> tuple[str, Any]:
    """A device's label and the device."""
    if name == "here":
        return jax.devices()[0].device_kind, jax.devices()[0]
    if name == "tpu":
        topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")
        return "TPU v5e", topology.devices[0]
    topology = topologies.get_topology_desc(
        platform="cuda", target_config=RTX_4090, topology="1x1x1"
    )
    return "RTX 4090", topology.devices[0]


def compile_update(tx: optax.GradientTransformation, params, device: Any):
    """The update of gradients, with the state donated."""
    state = jax.eval_shape(tx.init, params)
    place = SingleDeviceSharding(device)
    update = jax.jit(tx.update, donate_argnums=(0, 1), in_shardings=place, out_shardings=place)
    compiled = update.lower(params, state, params).compile()
    plan = compiled.memory_analysis()
    assert plan is not None
    return compiled, tree_bytes(state), plan.temp_size_in_bytes


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--compile_for", choices=("here", "tpu", "cuda"), default="here")
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    label, device = target(arguments.compile_for)
    shapes = {k: jax.ShapeDtypeStruct(s, jnp.float32) for k, s in SHAPES.items()}
    largest = max(tree_bytes(x) for x in shapes.values())
    optimizers = {"optax.adamw": optax.adamw(1e-3), "adamw8bit": adamw8bit(1e-3)}
    compiled = {}
    print(
        f"compiled for {label}, jaxlib {importlib.metadata.version('jaxlib')}: "
        f"{tree_bytes(shapes) / 4e6:.1f}M values"
    )
    print(f"the largest leaf is {largest / 2**20:.1f} MiB in float32")
    for name, tx in optimizers.items():
        compiled[name], state, temporary = compile_update(tx, shapes, device)
        print(f"{name:<12} state {state / 2**20:8.1f} MiB, temporary {temporary / 2**20:8.1f} MiB")
    if arguments.compile_for != "here":
        return
    params = jax.tree.map(lambda x: jax.random.normal(jax.random.key(0), x.shape), shapes)
    states = {name: tx.init(params) for name, tx in optimizers.items()}
    ratios = []
    for _ in range(arguments.rounds):
        seconds = {}
        for name, update in compiled.items():
            gradients = jax.block_until_ready(jax.tree.map(lambda x: 2 * x, params))
            begun = time.perf_counter()
            _, states[name] = jax.block_until_ready(update(gradients, states[name], params))
            seconds[name] = time.perf_counter() - begun
        ratios.append(seconds["adamw8bit"] / seconds["optax.adamw"])
    print(f"adamw8bit / optax.adamw: {statistics.median(ratios):.2f} (median of the ratios)")


if __name__ == "__main__":
    main()
