"""Run by test_scale_out_tunix.py in a process with 8 CPU devices: JSON of what it saw."""

import dataclasses
import json
import math
import os
import re
import sys
import warnings
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from tunix.sft.peft_trainer import PeftTrainer, TrainingConfig

import galore_jax

warnings.simplefilter("ignore")  # Tunix's own, of JAX's mesh context
sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
import scale_out_tunix as example  # noqa: E402

STEPS, STOP = 20, 12
KINDS = {
    "GaLore AdamW": ("galore_adamw", {"eps": 1e-6}),  # the reference's
    "8 bits": ("galore_adamw8bit", {"projector_bits": 4, "rotate_moments": True}),
}
example.MODEL = dataclasses.replace(example.MODEL, num_layers=1)


def train(kind, mesh, steps=STEPS, checkpoints=None):
    name, options = kind
    optimizer = example.make_optimizer(name, **options)
    return example.train(example.make_model(mesh), mesh, optimizer, steps, checkpoints)


def compare(kind, mesh):
    alone, _ = train(kind, example.make_mesh((1, 1)))
    losses, trainer = train(kind, mesh)
    gap = float(np.abs(np.subtract(alone, losses)).max())
    return {"losses": losses, "gap": gap, "layout": example.layout(trainer)}


def stopped_and_resumed(kind, mesh, folder):
    first, _ = train(kind, mesh, STOP, folder)
    second, trainer = train(kind, mesh, STEPS, folder)
    return {"losses": [first, second], "layout": example.layout(trainer)}


def failure(optimizer, mesh, checkpoints):
    """What training and saving with it raises."""
    try:
        example.train(example.make_model(mesh), mesh, optimizer, 1, checkpoints)
    except ValueError as error:
        return str(error)


def collectives(optimizer, mesh, **refresh):
    """Bytes of the results of each kind of collective in a whole training step, on one device."""
    with mesh:
        trainer = PeftTrainer(
            example.make_model(mesh), optimizer, TrainingConfig(eval_every_n_steps=STEPS)
        )
        batch = jax.device_put(next(example.batches()), NamedSharding(mesh, P("fsdp")))

        @nnx.jit
        def step(model, optimizer):
            inputs = example.model_input(batch)
            optimizer.update(model, nnx.grad(trainer.loss_fn)(model, **inputs), **refresh)

        text = step.lower(trainer.model, trainer.optimizer).compile().as_text()
    kinds = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
    found = dict.fromkeys(kinds.split("|"), 0)
    for shapes, kind in re.findall(rf"= (.*?) ({kinds})\(", text):
        for dtype, dims in re.findall(r"([a-z]+\d*)\[([\d,]*)\]", shapes):
            bits = 8 if dtype == "pred" else int(re.sub(r"\D", "", dtype))
            found[kind] += bits // 8 * math.prod(int(x) for x in dims.split(",") if x)
    return found


def main(folder):
    mesh = example.make_mesh((4, 2))
    seen = {name: compare(kind, mesh) for name, kind in KINDS.items()}
    seen["resumed"] = stopped_and_resumed(KINDS["8 bits"], mesh, folder / "galore")
    contrib = example.make_optimizer("optax_galore")
    seen["optax galore"] = failure(contrib, mesh, None)
    tx = example.make_optimizer("galore_adamw")
    seen["collectives"] = {
        "AdamW": collectives(example.make_optimizer("adamw"), mesh),
        "GaLore": collectives(tx, mesh, refresh=False),
        "GaLore at a refresh": collectives(tx, mesh, refresh=True),
    }
    print(json.dumps(seen), flush=True)
    # Last, because what Orbax has begun to save outlives the error.
    print(json.dumps(failure(galore_jax.for_nnx(contrib), mesh, folder / "contrib")), flush=True)
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
