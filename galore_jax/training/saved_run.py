"""Trained models, opened from a run's folder or from one in Hugging Face's format."""

import dataclasses
import functools
import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import traverse_util
from jax.typing import DTypeLike
from ml_collections import ConfigDict

from galore_jax.adapters import merge
from galore_jax.data.sample import prepare_sample
from galore_jax.data.sentence_tokenizer import SentenceTokenizer
from galore_jax.data.tokenizer import Tokenizer, open_tokenizer
from galore_jax.errors import UserError
from galore_jax.int8_kernels import is_int8
from galore_jax.models import huggingface
from galore_jax.models.architectures import ModelConfig, architecture_of
from galore_jax.models.config import LlamaConfig
from galore_jax.models.leaf_tensors import check_shapes
from galore_jax.models.llama import Params
from galore_jax.training.checkpoints import Checkpoints
from galore_jax.training.config import Config, is_sentence_task, uses_galore
from galore_jax.training.experiment import with_adapters
from galore_jax.training.from_config import model_config
from galore_jax.weights import leaf_path


@dataclasses.dataclass(frozen=True)
class SavedRun:
    """What one checkpoint of a run has trained.

    Attributes:
      config: the run's config, as its ``config.json`` has it.
      step: updates made.
      model: the model, with the longest row of the run and its tokenizer's special tokens.
      params: on the default device, in the dtypes that they were trained in; integers as
        ``Int8Kernel`` nodes.
      tokenizer: None if it was not asked for.
    """

    config: Config
    step: int
    model: ModelConfig
    params: Params
    tokenizer: Tokenizer | SentenceTokenizer | None


def is_run(folder: str | os.PathLike[str]) -> bool:
    """Tells whether a folder is a trainer's workdir."""
    return (Path(folder).expanduser() / "checkpoints").is_dir()


def open_run(
    workdir: str | os.PathLike[str], step: int | None = None, *, tokenizer: bool = True
) -> SavedRun:
    """Opens a checkpoint of a run, which may be under way.

    Args:
      workdir: the run's folder. Nothing in it is changed.
      step: which checkpoint; None for that of the best evaluation where the run keeps one, else the
        newest intact one.
      tokenizer: whether to open the run's tokenizer too.

    Raises:
      UserError: it is no run, has no such checkpoint or a damaged one, or its tokenizer is gone.
    """
    workdir = Path(workdir).expanduser()
    config = read_run_config(workdir)
    best = workdir / "best"
    folder = best if step is None and best.is_dir() else workdir / "checkpoints"
    with Checkpoints(folder, read_only=True) as saved:
        restored = saved.restore_part("params", step)
    if restored is None:
        raise UserError(f"{workdir} has no checkpoint yet")
    model = model_config(config)
    if isinstance(model, LlamaConfig):
        model = dataclasses.replace(
            model,
            attention_implementation=None,
            max_positions=model.max_positions or config.data.seq_len,
        )
    params = merge(_as_trained(config, model, restored.state))
    init = functools.partial(architecture_of(model).init_params, model)
    shapes = jax.eval_shape(init, jax.random.key(0))[1]
    check_shapes(shapes, params, f"the params of step {restored.step} in {workdir}")
    opened = _open_tokenizer(workdir, config) if tokenizer else None
    if isinstance(opened, Tokenizer) and isinstance(model, LlamaConfig):
        model = dataclasses.replace(model, bos_id=opened.bos_id, eos_ids=(opened.eos_id,))
    return SavedRun(config, restored.step, model, params, opened)


def _as_trained(config: Config, model: ModelConfig, params: Params) -> Any:
    """Makes of nested dicts the tree that the run trains, with its adapters or integers."""
    has_adapters = config.method != "full" and not uses_galore(config)
    if not has_adapters and model.param_dtype != jnp.int8:
        return params

    def init(key: jax.Array) -> Any:
        return with_adapters(config, architecture_of(model).init_params(model, key)[1], key)

    like = jax.eval_shape(init, jax.random.key(0))
    arrays = traverse_util.flatten_dict(params, sep="/")
    return jax.tree_util.tree_map_with_path(lambda path, _: arrays[leaf_path(path)], like)


class OpenedModel(NamedTuple):
    """A model that can compute; the tokenizer is None if it was not asked for."""

    config: ModelConfig
    params: Params
    tokenizer: Tokenizer | SentenceTokenizer | None


def open_model(
    folder: str | os.PathLike[str],
    step: int | None = None,
    *,
    dtype: DTypeLike | None = None,
    tokenizer: bool = True,
) -> OpenedModel:
    """Opens a model, from a run or in Hugging Face's format, whichever the folder is.

    Args:
      folder: a run's workdir, or a folder with ``config.json`` and safetensors files.
      step: which checkpoint of a run; None for the newest intact one.
      dtype: of the params and to compute in, integers excepted; None for those of the folder.
      tokenizer: whether to open the tokenizer too.

    Raises:
      UserError: as ``open_run`` and ``galore_jax.models.huggingface.load``; a step of what is no
        run; no tokenizer, or one of more ids than the model's vocabulary.
    """
    folder = Path(folder).expanduser()
    if is_run(folder):
        run = open_run(folder, step, tokenizer=tokenizer)
        model, params, opened = run.model, run.params, run.tokenizer
        if dtype is not None:
            stored = jnp.int8 if model.param_dtype == jnp.int8 else dtype
            model = dataclasses.replace(model, dtype=dtype, param_dtype=stored)
            params = jax.tree.map(lambda leaf: leaf.astype(dtype), params, is_leaf=is_int8)
    elif step is not None:
        raise UserError(f"{folder} is no run, so that it has no step {step}")
    else:
        model, params = huggingface.load(folder, dtype)
        opened = open_tokenizer(folder) if tokenizer else None
    if opened is not None and opened.vocab_size > model.vocab_size:
        raise UserError(
            f"the tokenizer of {folder} has {opened.vocab_size} ids and the model a vocabulary of "
            f"{model.vocab_size}; they do not belong together"
        )
    return OpenedModel(model, params, opened)


def read_run_config(workdir: Path) -> Config:
    """Reads the config of a run, as its ``config.json`` has it.

    Raises:
      UserError: the folder is no run, or the file is damaged.
    """
    path = workdir / "config.json"
    if not is_run(workdir) or not path.is_file():
        raise UserError(f"{workdir} is no run: a run's folder has config.json and checkpoints/")
    try:
        config = ConfigDict(json.loads(path.read_text()))
        _ = config.model, config.data, config.dtype  # a run's, not a model's
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise UserError(f"{path} is no config of a run: {' '.join(str(error).split())}") from error
    return config


def _open_tokenizer(workdir: Path, config: Config) -> Tokenizer | SentenceTokenizer:
    """Opens the copy that a run keeps, or for an older run the file that it was made with."""
    if is_sentence_task(config):
        return SentenceTokenizer(workdir / "tokenizer")
    if (workdir / "tokenizer").is_dir():
        return open_tokenizer(workdir / "tokenizer")
    if config.data.tokenizer is None:
        return open_tokenizer(prepare_sample()[1])
    return open_tokenizer(config.data.tokenizer)
