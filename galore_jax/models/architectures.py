"""The models that can be trained, each as the same few functions."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from galore_jax.models import encoder, encoder_huggingface, huggingface, llama
from galore_jax.models.config import LlamaConfig
from galore_jax.models.encoder_config import EncoderConfig
from galore_jax.models.stages import Stages

ModelConfig = LlamaConfig | EncoderConfig


class Architecture(NamedTuple):
    """What a trainer needs of a kind of model.

    Attributes:
      init_params: draws the params of a config by a key; returns a graph definition and them.
      stages: cuts a config's model into functions.
      load: reads the params for a config from a Hugging Face folder, with a key for what that does
        not have.
      save: writes such a folder from a config, params, and a tokenizer or None.
    """

    init_params: Callable[[Any, jax.Array], tuple[Any, Any]]
    stages: Callable[[Any], Stages]
    load: Callable[[str, Any, jax.Array], Any]
    save: Callable[..., None]


def _load_llama(folder: str, config: LlamaConfig, key: jax.Array) -> Any:
    del key
    is_int8 = config.param_dtype == jnp.int8
    return huggingface.load(folder, config.float_dtype, int8=is_int8)[1]


def _load_encoder(folder: str, config: EncoderConfig, key: jax.Array) -> Any:
    loaded = encoder_huggingface.load(folder, config.param_dtype, labels=config.labels, key=key)
    if loaded.new:
        print(f"new, for {folder} has none for this task: {', '.join(loaded.new)}", flush=True)
    return loaded.params


LLAMA = Architecture(llama.init_params, llama.stages, _load_llama, huggingface.save)
ENCODER = Architecture(encoder.init_params, encoder.stages, _load_encoder, encoder_huggingface.save)


def architecture_of(model: ModelConfig) -> Architecture:
    """Returns the functions for a model."""
    return ENCODER if isinstance(model, EncoderConfig) else LLAMA
