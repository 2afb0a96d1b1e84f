"""Time and memory of an update of 8-bit Adam beside Optax's, in one process, in turn.

  python benchmarks/adam8bit.py
  python benchmarks/adam8bit.py --compile_for=tpu     (extra tpu-target)
  python benchmarks/adam8bit.py --compile_for=cuda    (extra gpu-target)

Prints the median of the ratios of times, and the bytes of state and of temporaries of the compiled
updates. What is compiled for a device that is not there is not run.
"""

import argparse
import importlib.metadata
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import SingleDeviceSharding

from galore_jax import adamw8bit
from galore_jax.memory import targets, tree_bytes

SHAPES = {"attention": (8, 512, 512), "mlp": (8, 512, 1376), "embedding": (32_000, 512)}
TARGETS = {"here": "auto", "tpu": "tpu-v5e", "cuda": "rtx4090"}


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
    targets.prepare_process()
    target = targets.find_target(TARGETS[arguments.compile_for])
    label, device = target.label, target.device
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
