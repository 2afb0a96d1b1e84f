"""A run of seconds: the sample corpus and a model of a few thousand weights a layer."""

from pathlib import Path

from configs import sample

ROOT = Path(__file__).parents[1]

# Updates 0, 3, 6, ... refresh the projectors; checkpoints fall between them.
OVERRIDES = {
    "train_steps": 12,
    "batch_size": 4,
    "micro_batch_size": 2,
    "log_every_steps": 1,
    "eval_every_steps": 6,
    "eval_tokens": 200,
    "checkpoint_every_steps": 4,
    "model.hidden_size": 16,
    "model.intermediate_size": 24,
    "model.num_layers": 2,
    "model.num_heads": 2,
    "data.seq_len": 16,
    "schedule.peak_lr": 0.01,
    "schedule.warmup_steps": 2,
    "galore.rank": 4,
    "galore.update_proj_gap": 3,
    "galore.scale": 0.25,
    "optimizer.matrix_lr_scale": 1.0,
}


def tiny_config(arg="", **overrides):
    config = sample.get_config(arg)
    settings = {**OVERRIDES, **{key.replace("__", "."): value for key, value in overrides.items()}}
    config.update_from_flattened_dict(settings)
    return config


def tiny_flags(**overrides):
    settings = {**OVERRIDES, **{key.replace("__", "."): value for key, value in overrides.items()}}
    return [f"--config.{key}={value}" for key, value in settings.items()]
