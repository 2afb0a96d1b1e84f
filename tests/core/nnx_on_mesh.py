"""Run by test_for_nnx.py in a process with 8 CPU devices: JSON of what it saw, on stdout."""

import json
import re
import sys
import traceback

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import galore_jax

# (D, N, H), (N, H, D), (m, n), a stack, one that is sharded by its layers, and a vector.
KERNELS = {
    "q_proj/w": ((16, 4, 8), ("fsdp", "tp", None)),
    "o_proj/w": ((4, 8, 16), ("tp", None, "fsdp")),
    "up/kernel": ((16, 32), ("fsdp", "tp")),
    "blocks/kernel": ((5, 16, 32), (None, "fsdp", "tp")),
    "layers/kernel": ((4, 16, 32), ("fsdp", None, "tp")),
    "norm/scale": ((16,), ("tp",)),
}
OPTIONS = {
    "rank": 8,
    "update_proj_gap": 5,
    "weight_dimension_numbers": galore_jax.dimension_numbers,
}
EIGHT_BITS = {"projector_bits": 4, "rotate_moments": True, "block_size": 16, "min_8bit_size": 0}
# eps keeps Adam from amplifying rounding where a gradient is close to zero.
OPTIMIZERS = {
    "adamw": galore_jax.galore_adamw(0.01, eps=1e-2, weight_decay=0.1, **OPTIONS),
    "8 bits": galore_jax.galore_adamw8bit(0.01, eps=1e-2, **OPTIONS, **EIGHT_BITS),
    "accumulated": optax.MultiSteps(galore_jax.galore_adamw(0.01, eps=1e-2, **OPTIONS), 2),
}
UPDATES = 20


class Layer(nnx.Module):
    """One kernel, or one scale."""

    def __init__(self, name, value, axes):
        setattr(self, name, nnx.Param(value, **({"sharding": axes} if axes else {})))


class Model(nnx.Module):
    def __init__(self, mesh):
        rng = np.random.default_rng(0)
        for path, (shape, axes) in KERNELS.items():
            module, name = path.split("/")
            value = jnp.asarray(rng.standard_normal(shape))
            if mesh is not None:
                value = jax.device_put(value, NamedSharding(mesh, P(*axes)))
            setattr(self, module, Layer(name, value, axes if mesh is not None else None))


def gradients(model, step):
    """Of half the squared distance to targets that change with the step."""

    def gradient(path, weight):
        key = jax.random.fold_in(jax.random.key(1), step)
        key = jax.random.fold_in(key, len(jax.tree_util.keystr(path)))
        sharding = jax.typeof(weight).sharding
        on_explicit = not sharding.mesh.empty and AxisType.Explicit in sharding.mesh.axis_types
        where = {"out_sharding": sharding} if on_explicit else {}
        return weight - jax.random.normal(key, weight.shape, weight.dtype, **where)

    return jax.tree_util.tree_map_with_path(gradient, nnx.state(model, nnx.Param))


@nnx.jit(donate_argnums=(0, 1))
def train_step(model, optimizer, step):
    optimizer.update(model, gradients(model, step))


def make(tx, mesh):
    model = Model(mesh)
    return model, nnx.Optimizer(model, galore_jax.for_nnx(tx), wrt=nnx.Param)


def layout(tree):
    """The mesh axes of each axis of each array of a tree."""
    found = {}
    for path, x in jax.tree_util.tree_leaves_with_path(tree):
        name = jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value")
        spec = getattr(x.sharding, "spec", ())
        found[name] = [*spec, *(None,) * (x.ndim - len(spec))]
    return found


def train(tx, mesh):
    model, optimizer = make(tx, mesh)
    first = layout(nnx.state(optimizer))
    for step in range(UPDATES):
        train_step(model, optimizer, jnp.int32(step))
    return {
        "weights": [np.asarray(x) for x in jax.tree.leaves(nnx.state(model, nnx.Param))],
        "first": first,
        "last": layout(nnx.state(optimizer)),
    }


def compare(tx, mesh, alone):
    found = train(tx, mesh)
    pairs = zip(alone, found.pop("weights"), strict=True)
    return {**found, "gap": max(float(np.abs(a - b).max()) for a, b in pairs)}


def made_in_jit(tx, mesh):
    """How the state is sharded, and how its variables say so."""
    _, optimizer = nnx.jit(lambda: make(tx, mesh))()
    state = nnx.state(optimizer)
    said = jax.tree.leaves(nnx.get_partition_spec(state), is_leaf=lambda node: isinstance(node, P))
    found = layout(state)
    return {"first": found, "said": dict(zip(found, map(list, said), strict=True))}


def gathered(tx, mesh, refresh):
    """The shapes that all-gathers and all-to-alls of the compiled step make."""
    model, optimizer = make(tx, mesh)

    @nnx.jit
    def step(model, optimizer):
        optimizer.update(model, gradients(model, 0), refresh=refresh)

    text = step.lower(model, optimizer).compile().as_text()
    lines = re.findall(r"= (.*?) (?:all-gather|all-gather-start|all-to-all)\(", text)
    dims = [match for line in lines for match in re.findall(r"\w+\[([\d,]*)\]", line)]
    return [[int(x) for x in of.split(",") if x] for of in dims]


def main():
    assert jax.device_count() == 8
    jax.config.update("jax_enable_x64", True)
    results = {}

    def note(name, fn, *arguments):
        try:
            results[name] = fn(*arguments)
        except Exception:
            results[name] = {"error": traceback.format_exc()[-2500:]}

    alone = {name: train(tx, None)["weights"] for name, tx in OPTIMIZERS.items()}
    for kind in (AxisType.Auto, AxisType.Explicit):
        mesh = jax.make_mesh((4, 2), ("fsdp", "tp"), axis_types=(kind, kind))
        with jax.set_mesh(mesh):
            for name, weights in alone.items():
                if name == "accumulated" and kind == AxisType.Explicit:
                    continue
                note(f"{kind.name}/{name}", compare, OPTIMIZERS[name], mesh, weights)
            note(f"{kind.name}/in jit", made_in_jit, OPTIMIZERS["adamw"], mesh)
            if kind == AxisType.Auto:
                note("gathered", gathered, OPTIMIZERS["adamw"], mesh, False)
                note("gathered at a refresh", gathered, OPTIMIZERS["adamw"], mesh, True)
    json.dump(results, sys.stdout)


if __name__ == "__main__":
    main()
