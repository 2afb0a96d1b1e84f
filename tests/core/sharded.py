"""Run by test_sharding.py in a process with 8 CPU devices: JSON of what it saw, on stdout."""

import contextlib
import json
import sys
import traceback

import jax
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from galore_jax import adamw8bit, galore

SHAPES = {"tall": (32, 16), "wide": (16, 32), "square": (16, 16), "stack": (4, 16, 32)}
# FSDP over "data" on the axis that is projected away or on the other one, tensor-parallel over
# "model" on rows or columns, both at once, and a stack that is sharded by its leading axis.
ROWS, COLUMNS, BOTH = P("data", None), P(None, "data"), P("data", "model")
PLACEMENTS = {
    "bias": P("model"),
    **{f"{name}_fsdp_rows": ROWS for name in ("tall", "wide", "square")},
    **{f"{name}_fsdp_columns": COLUMNS for name in ("tall", "wide")},
    "tall_tensor_rows": P("model", None),
    "wide_tensor_columns": P(None, "model"),
    "wide_both": BOTH,
    "stack_both": P(None, "data", "model"),
    "stack_fsdp": P("data", None, None),
}
FEW = ("bias", "tall_fsdp_rows", "square_fsdp_rows", "wide_both", "stack_fsdp")
RANK = 4


def tree(names, seed):
    rng = np.random.default_rng(seed)
    shape = lambda name: SHAPES.get(name.split("_")[0], (32,))  # noqa: E731
    return {name: rng.standard_normal(shape(name)).astype("float32") for name in names}


def spec(array, ndim):
    of = getattr(array.sharding, "spec", None)
    if of is None:
        return None
    return [*of, *(None,) * (ndim - len(of))]


def train(method, names, mesh, *, jitted_init=False, bits=None):
    # eps keeps Adam from amplifying rounding where a coordinate of the gradient is close to zero.
    adam8bit = adamw8bit(0.1, eps=1e-2, weight_decay=0.0, block_size=8, min_8bit_size=0)
    tx = galore(
        optax.adam(0.1, eps=1e-2) if bits is None else adam8bit,
        rank=RANK,
        update_proj_gap=2,
        projector=method,
        projector_bits=bits,
        target_modules=("tall", "wide", "square", "stack"),
    )
    put = lambda host: host  # noqa: E731
    if mesh is not None:
        shardings = {name: NamedSharding(mesh, PLACEMENTS[name]) for name in names}
        put = lambda host: jax.device_put(host, shardings)  # noqa: E731
    params, update = put(tree(names, 0)), jax.jit(tx.update)
    state = (jax.jit(tx.init) if jitted_init else tx.init)(params)
    first, seen = state, []
    for step in range(4):
        updates, state = update(put(tree(names, step + 1)), state, params)
        params = jax.jit(optax.apply_updates)(params, updates)
        seen.append(jax.device_get((updates, params)))
    return seen, first, state, updates


def layout(state, updates):
    adam, found = state.inner_state[0], {}
    for name in updates:
        codes = lambda x: getattr(x, "codes", x)  # noqa: E731
        moments = {"mu": codes(adam.mu[name]), "nu": codes(adam.nu[name])}
        arrays = {**moments, "updates": updates[name]}
        if name != "bias":
            arrays["projector"] = codes(state.projector[name])
        found[name] = {key: spec(x, x.ndim) for key, x in arrays.items()}
    return found


def compare(method, names, mesh, jitted_init, bits=None):
    alone, *_ = train(method, names, None, bits=bits)
    # jax.jit of a function that does not use its params, as an init, needs this on explicit meshes.
    explicit = AxisType.Explicit in mesh.axis_types
    try:
        with jax.set_mesh(mesh) if explicit else contextlib.nullcontext():
            seen, first, last, updates = train(
                method, names, mesh, jitted_init=jitted_init, bits=bits
            )
        gaps = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), alone, seen)
        return {
            "gap": max(jax.tree.leaves(gaps)),
            "largest": float(max(np.abs(x).max() for x in jax.tree.leaves(alone[0][0]))),
            "first": layout(first, updates),
            "last": layout(last, updates),
        }
    except Exception:
        return {"error": traceback.format_exc()[-1500:]}


def main():
    assert jax.device_count() == 8
    results = {}
    for kind in (AxisType.Auto, AxisType.Explicit):
        mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind, kind))
        name = kind.name.lower()
        results[f"{name}/svd/eager"] = compare("svd", tuple(PLACEMENTS), mesh, False)
        results[f"{name}/svd/jitted"] = compare("svd", FEW, mesh, True)
        results[f"{name}/svd/8 bits"] = compare("svd", FEW, mesh, False, 8)
        if kind == AxisType.Auto:
            for method in ("eigh", "subspace_iteration", "randomized", "random"):
                results[f"{name}/{method}/eager"] = compare(method, FEW, mesh, False)
    json.dump(results, sys.stdout)


if __name__ == "__main__":
    main()
