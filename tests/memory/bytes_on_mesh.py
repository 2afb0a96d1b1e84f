"""Run by test_mesh.py in a process with 8 CPU devices: JSON of counted and real bytes."""

import dataclasses
import json
import math
import sys

import jax
import optax
from jax.sharding import AbstractMesh, AxisType, NamedSharding

import galore_jax
from galore_jax.memory import count_state, tree_bytes
from galore_jax.memory.mesh import count_on_mesh, sharded_shapes
from galore_jax.models.config import LlamaConfig
from galore_jax.models.llama import init_params

MODEL = LlamaConfig(32, 96, num_layers=3, num_heads=4, num_kv_heads=2, vocab_size=72)
TARGETS = {"rank": 8, "target_modules": ("attn", "mlp"), "stacked_modules": "^blocks"}
OPTIMIZERS = {
    "adamw": optax.adamw(0.1),
    "galore": galore_jax.galore_adamw(0.1, **TARGETS),
    "8 bits": galore_jax.galore_adamw8bit(
        0.1, projector_bits=4, block_size=32, min_8bit_size=0, **TARGETS
    ),
}
MESHES = ({"fsdp": 8}, {"tp": 4}, {"fsdp": 4, "tp": 2})


def on_first_device(tree):
    return jax.tree.map(lambda x: x.addressable_shards[0].data, tree)


def rows(placed, opt_state):
    """The rows of a report, from the arrays of the first device."""
    weights = tree_bytes(on_first_device(placed))
    return [weights, weights, *dataclasses.astuple(count_state(on_first_device(opt_state)))]


def on_a_mesh(axes, kind):
    sizes, names = tuple(axes.values()), tuple(axes)
    devices = jax.devices()[: math.prod(sizes)]
    mesh = jax.make_mesh(sizes, names, devices=devices, axis_types=(kind,) * len(sizes))
    _, params = init_params(MODEL, jax.random.key(0))
    explicit = AbstractMesh(sizes, names, axis_types=(AxisType.Explicit,) * len(sizes))
    shapes = sharded_shapes(params, explicit, "^blocks")
    shardings = jax.tree.map(lambda of: NamedSharding(mesh, of.sharding.spec), shapes)
    return params, jax.device_put(params, shardings)


def main():
    found = []
    for axes in MESHES:
        for kind in (AxisType.Auto, AxisType.Explicit):
            params, placed = on_a_mesh(axes, kind)
            for name, tx in OPTIMIZERS.items():
                report = count_on_mesh(params, tx, axes, "^blocks")
                found.append(
                    {
                        "name": f"{axes} {kind.name} {name}",
                        "counted": [row.bytes for row in report.rows],
                        "real": rows(placed, tx.init(placed)),
                        "replicated": [row.name for row in report.replicated],
                    }
                )
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
