"""From a config to a model and a task."""

import dataclasses
from pathlib import Path

from galore_jax.data import minilm
from galore_jax.data.batches import DataConfig
from galore_jax.data.glue_tasks import TASKS
from galore_jax.data.sentences import SentenceConfig
from galore_jax.errors import UserError
from galore_jax.models.architectures import ModelConfig
from galore_jax.models.config import LlamaConfig, RopeScaling
from galore_jax.models.encoder_config import EncoderConfig
from galore_jax.models.encoder_json import read_encoder_config
from galore_jax.models.huggingface_config import read_config
from galore_jax.training.config import (
    OWN_ENCODER_KEYS,
    OWN_MODEL_KEYS,
    Config,
    check_config,
    is_sentence_task,
)
from galore_jax.training.language_modelling import LanguageModelling
from galore_jax.training.sentence_task import SentenceTask
from galore_jax.training.tasks import Task


def model_config(config: Config) -> ModelConfig:
    """Makes the model that a config describes: for a task of sentences an encoder, else a LLaMA.

    Raises:
      UserError: sizes that do not fit together, or an unknown dtype.
    """
    numerics = {"dtype": config.dtype, "param_dtype": config.param_dtype, "remat": config.remat}
    if is_sentence_task(config):
        return EncoderConfig(**config.encoder, labels=TASKS[config.task].labels, **numerics)
    model = config.model.to_dict()
    scaling = model.pop("rope_scaling", None)  # which configs of older runs lack
    return LlamaConfig(**model, rope_scaling=scaling and RopeScaling(*scaling), **numerics)


def make_task(config: Config, model: ModelConfig) -> Task:
    """Makes the task that a config describes, for a model.

    Raises:
      UserError: rows longer than the model's positions.
    """
    if isinstance(model, EncoderConfig):
        data = SentenceConfig(
            config.task,
            config.data.name,
            config.data.data_dir,
            config.data.tokenizer,
            min(config.data.seq_len, model.max_positions),
            model.vocab_size,
            model.pad_id,
        )
        return SentenceTask(data)
    most = model.max_positions
    if most is not None and config.data.seq_len > most:
        raise UserError(
            f"config.data.seq_len={config.data.seq_len} must be at most {most}, the positions of "
            "the model"
        )
    data = DataConfig(**config.data.to_dict())
    return LanguageModelling(data, model.vocab_size, model.loss_chunk_tokens)


def resolve(config: Config) -> Config:
    """Returns a config with the sizes, and perhaps the tokenizer, of its ``init_from``.

    Raises:
      UserError: a folder that cannot be read, or has another kind of model than the task's.
    """
    if config.init_from is None:
        return config
    config = config.copy_and_resolve_references()
    if config.init_from == minilm.NAME:
        config.init_from = _minilm()
        if config.init_from is None:
            return config
    folder = Path(config.init_from).expanduser()
    if is_sentence_task(config):
        sizes = dataclasses.asdict(read_encoder_config(folder)[0])
        for key in set(config.encoder) - OWN_ENCODER_KEYS:
            config.encoder[key] = sizes[key]
    else:
        sizes = dataclasses.asdict(read_config(folder))
        if sizes["rope_scaling"] is not None:
            sizes["rope_scaling"] = tuple(sizes["rope_scaling"].values())
        for key in set(config.model) - OWN_MODEL_KEYS:
            config.model[key] = sizes[key]
    if config.data.tokenizer is None:
        config.data.tokenizer = str(folder)
    return config


def _minilm() -> str | None:
    """Returns MiniLM's folder; None, after saying so, where it cannot be fetched."""
    try:
        return str(minilm.prepare_minilm())
    except UserError as error:
        print(f"no pretrained weights, random ones instead: {error}", flush=True)
        return None


def count_updates(config: Config) -> Config:
    """Returns a config whose ``train_epochs``, if it has any, are counted in updates.

    With ``eval_every_epochs`` so are the updates between evaluations. It opens the data.

    Raises:
      UserError: epochs of a task without an end, or data that cannot be opened.
    """
    if config.train_epochs is None:
        return config
    check_config(config)
    if not is_sentence_task(config):
        raise UserError(
            f"config.train_epochs={config.train_epochs} is for the tasks of sentences; give "
            "config.train_steps"
        )
    config = resolve(config).copy_and_resolve_references()
    task = make_task(config, model_config(config))
    per_epoch = task.open_data().batches_per_epoch(config.batch_size)
    config.train_steps = max(round(config.train_epochs * per_epoch), 1)
    if config.eval_every_epochs is not None:
        config.eval_every_steps = max(round(config.eval_every_epochs * per_epoch), 1)
    return config
