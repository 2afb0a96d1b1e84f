r"""A LLaMA on many devices: GaLore inside Tunix's PeftTrainer.

The trainer of this repository is for one device. Here the optimizer goes along to Tunix, which
shards a model over a mesh, in three lines: see ``make_optimizer``. Run it on 8 virtual devices of
a CPU, or on as many real ones as the mesh has:

  pip install -e '.[examples]'
  XLA_FLAGS=--xla_force_host_platform_device_count=8 JAX_PLATFORMS=cpu \
      python examples/scale_out_tunix.py --mesh=4,2 --steps=20 --checkpoints=/tmp/scale_out

It trains on bytes of Python's own documentation, prints the loss of every step, and lists how the
optimizer's state is sharded. The same command with more steps resumes from the checkpoint.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx
from jax.sharding import AxisType, Mesh
from tunix.models.llama3.model import Llama3, ModelConfig
from tunix.sft.peft_trainer import PeftTrainer, TrainingConfig, TrainingInput

import galore_jax

MODEL = ModelConfig(
    num_layers=2,
    vocab_size=256,  # bytes
    embed_dim=128,
    hidden_dim=256,
    num_heads=8,
    head_dim=16,
    num_kv_heads=4,
    rope_theta=10_000,
    norm_eps=1e-6,
)
BATCH, LENGTH = 16, 64
GALORE = {
    "rank": 32,
    "update_proj_gap": 5,
    "weight_dimension_numbers": galore_jax.dimension_numbers,
}


def make_optimizer(
    name: str, learning_rate: float = 3e-3, **galore_options: Any
) -> optax.GradientTransformation:
    """An optimizer by its name in the command line; options change GaLore's."""
    options = {**GALORE, **galore_options}
    if name == "adamw":
        return optax.adamw(learning_rate)
    if name == "galore_adamw":
        return galore_jax.for_nnx(galore_jax.galore_adamw(learning_rate, **options))
    if name == "galore_adamw8bit":
        # Blocks of 64 values, which this small model's shards are made of too.
        tx = galore_jax.galore_adamw8bit(learning_rate, block_size=64, min_8bit_size=0, **options)
        return galore_jax.for_nnx(tx)
    if name == "optax_galore":  # to see what fails: no for_nnx, and no axes of the kernels
        return optax.contrib.galore(learning_rate, rank=32, update_proj_gap=5)
    raise ValueError(f"there is no optimizer {name}")


def make_mesh(shape: tuple[int, int]) -> Mesh:
    """A mesh of (fsdp, tp) devices, the names in Tunix's models."""
    devices = jax.devices()[: shape[0] * shape[1]]
    return jax.make_mesh(shape, ("fsdp", "tp"), axis_types=(AxisType.Auto,) * 2, devices=devices)


def make_model(mesh: Mesh) -> Llama3:
    """A new model, each weight sharded as Tunix says."""

    @nnx.jit
    def make() -> Llama3:
        rngs = nnx.Rngs(0)
        model = Llama3(MODEL, rngs=rngs)
        for layer in model.layers:  # Tunix makes these zeros, to be read from a checkpoint
            for linear in (layer.mlp.gate_proj, layer.mlp.up_proj, layer.mlp.down_proj):
                linear.kernel[...] = 0.02 * jax.random.normal(rngs.params(), linear.kernel.shape)
        state = nnx.state(model)
        specs = nnx.get_partition_spec(state)
        nnx.update(model, jax.lax.with_sharding_constraint(state, specs))
        return model

    with mesh:
        return make()


def batches() -> Iterator[TrainingInput]:
    """Batches of text, always the same ones."""
    text = np.frombuffer("\n".join(topics[key] for key in sorted(topics)).encode(), np.uint8)
    rng = np.random.default_rng(0)
    while True:
        starts = rng.integers(0, len(text) - LENGTH, BATCH)
        tokens = np.stack([text[start : start + LENGTH] for start in starts]).astype(np.int32)
        yield TrainingInput(input_tokens=tokens, input_mask=np.ones(tokens.shape, bool))


def model_input(batch: TrainingInput) -> dict[str, Any]:
    """What Tunix's loss passes to the model."""
    rows, length = batch.input_tokens.shape
    return {
        "input_tokens": batch.input_tokens,
        "input_mask": batch.input_mask,
        "positions": jnp.tile(jnp.arange(length), (rows, 1)),
        "attention_mask": jnp.tile(jnp.tril(jnp.ones((length, length), bool)), (rows, 1, 1)),
    }


def train(
    model: Llama3,
    mesh: Mesh,
    optimizer: optax.GradientTransformation,
    steps: int,
    checkpoints: Path | None = None,
    micro_batches: int | None = None,
) -> tuple[list[float], PeftTrainer]:
    """Trains up to ``steps``, from the last checkpoint if there is one; the loss of each step."""
    config = TrainingConfig(
        eval_every_n_steps=steps + 1,
        max_steps=steps,
        gradient_accumulation_steps=micro_batches,
        checkpoint_root_directory=None if checkpoints is None else str(checkpoints.resolve()),
        checkpointing_options=ocp.CheckpointManagerOptions(save_interval_steps=steps),
        data_sharding_axis=("fsdp",),
        pbar_description=None,
    )
    with mesh:
        trainer = PeftTrainer(model, optimizer, config).with_gen_model_input_fn(model_input)
        trainer.train(batches())
    losses = trainer.metrics_logger.get_metric_history("", "loss", "train")
    return [float(loss) for loss in losses], trainer


def layout(trainer: PeftTrainer) -> dict[str, tuple[Any, ...]]:
    """The mesh axes of each axis of every array of the optimizer's state."""
    found = {}
    for path, array in jax.tree_util.tree_leaves_with_path(nnx.state(trainer.optimizer)):
        spec = getattr(array.sharding, "spec", ())
        name = jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value")
        found[name] = (*spec, *(None,) * (array.ndim - len(spec)))
    return found


def main(argv: list[str]) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--mesh", default="4,2", help="devices along fsdp and tp")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--optimizer", default="galore_adamw8bit")
    parser.add_argument("--checkpoints", type=Path)
    flags = parser.parse_args(argv)
    mesh = make_mesh(tuple(map(int, flags.mesh.split(","))))
    model, optimizer = make_model(mesh), make_optimizer(flags.optimizer)
    losses, trainer = train(model, mesh, optimizer, flags.steps, flags.checkpoints)
    for step, loss in enumerate(losses, start=flags.steps - len(losses) + 1):
        print(f"step {step}: loss {loss:.6f}")
    for name, axes in layout(trainer).items():
        print(f"{name}: {', '.join(map(str, axes))}")


if __name__ == "__main__":
    main(sys.argv[1:])
