"""BERT and RoBERTa as the Hugging Face hub has them: ``config.json`` and safetensors files."""

import dataclasses
import functools
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

import jax
from flax import traverse_util
from jax.typing import DTypeLike

from galore_jax.models import leaf_tensors
from galore_jax.models.encoder import Params, init_params
from galore_jax.models.encoder_config import EncoderConfig
from galore_jax.models.encoder_json import config_to_json, read_encoder_config
from galore_jax.models.leaf_tensors import (
    LeafTensors,
    TokenizerFiles,
    check_shapes,
    check_tensors,
    check_tokenizer,
    read_leaf,
    save_folder,
    tensor_shape,
)
from galore_jax.models.tensor_files import TensorFiles

# Our paths, and Hugging Face's names of the body without "bert." or "roberta.", with the layer in
# the place of {}; the last part stands for weight or bias.
_BODY = (
    ("embed/word", "embeddings.word_embeddings"),
    ("embed/position", "embeddings.position_embeddings"),
    ("embed/token_type", "embeddings.token_type_embeddings"),
    ("embed/norm", "embeddings.LayerNorm"),
    ("blocks/attn/q_proj", "encoder.layer.{}.attention.self.query"),
    ("blocks/attn/k_proj", "encoder.layer.{}.attention.self.key"),
    ("blocks/attn/v_proj", "encoder.layer.{}.attention.self.value"),
    ("blocks/attn/o_proj", "encoder.layer.{}.attention.output.dense"),
    ("blocks/attention_norm", "encoder.layer.{}.attention.output.LayerNorm"),
    ("blocks/mlp/up_proj", "encoder.layer.{}.intermediate.dense"),
    ("blocks/mlp/down_proj", "encoder.layer.{}.output.dense"),
    ("blocks/output_norm", "encoder.layer.{}.output.LayerNorm"),
)
_HEADS = {
    "bert": (("head/dense", "bert.pooler.dense"), ("head/out", "classifier")),
    "roberta": (("head/dense", "classifier.dense"), ("head/out", "classifier.out_proj")),
}
_BUFFERS = r".*embeddings\.(position_ids|token_type_ids)"  # of old versions, integers
# Heads of other tasks, which a body is published with.
_OTHER_HEADS = re.compile(r"(cls|lm_head|qa_outputs|classifier)\..*|(roberta\.)?pooler\..*")


class Loaded(NamedTuple):
    """A model from a folder.

    Attributes:
      config: the model.
      params: arranged as by ``galore_jax.models.encoder.init_params``.
      new: the parts that the folder does not have, drawn at random; ``"head/dense"``,
        ``"head/out"``.
    """

    config: EncoderConfig
    params: Params
    new: tuple[str, ...]


def load(
    folder: str | os.PathLike[str],
    dtype: DTypeLike | None = None,
    *,
    labels: tuple[str, ...] | None = None,
    key: jax.Array | None = None,
) -> Loaded:
    """Reads an encoder from a folder, straight into stacked arrays on the default device.

    A folder of another task, such as a ``RobertaForMaskedLM`` or a bare ``BertModel``, gives the
    body; its head is left out, and a new one is drawn. So is the head's last layer if the folder's
    classifier has another number of labels than is asked for.

    Args:
      folder: has ``config.json``, and either ``model.safetensors`` or several such files and
        ``model.safetensors.index.json``.
      dtype: of the params, and to compute in. None: each keeps the dtype that it is stored in, and
        the model computes in that of the tokens' embedding.
      labels: of the head; None for the folder's.
      key: a PRNG key for new parts; None for that of seed 0.

    Raises:
      UserError: files that are missing or damaged, another architecture, tensors that are missing,
        left over or of the wrong shape, or a setting that ``EncoderConfig`` cannot represent.
    """
    folder = Path(folder).expanduser()
    config, is_classifier = read_encoder_config(folder)
    own_labels = config.labels
    if labels is not None:
        config = dataclasses.replace(config, labels=labels)
    if dtype is not None:
        config = dataclasses.replace(config, dtype=dtype, param_dtype=dtype)
    files = TensorFiles(folder, ignored=_BUFFERS)
    stored = _stored_names(config.kind, files)
    shapes = _leaves(config)
    new = _new_parts(config, len(own_labels), is_classifier, stored)
    shapes = {path: shape for path, shape in shapes.items() if "/".join(path[:2]) not in new}
    names = {path: tensor_names(config, path) for path in shapes}
    _check_tensors(folder, shapes, names, stored, files, strict=is_classifier)
    params: dict[Any, Any] = {
        path: read_leaf(folder, files, path, shape, [stored[name] for name in names[path]], dtype)
        for path, shape in shapes.items()
    }
    numerics = params["embed", "word", "embedding"].dtype
    config = dataclasses.replace(config, dtype=numerics, param_dtype=numerics)
    if new:
        key = jax.random.key(0) if key is None else key
        drawn: Any = traverse_util.flatten_dict(init_head(config, key))
        params |= {path: leaf for path, leaf in drawn.items() if "/".join(path[:2]) in new}
    return Loaded(config, traverse_util.unflatten_dict(params), new)


def init_head(config: EncoderConfig, key: jax.Array) -> Params:
    """Draws the parameters of the head alone."""
    return jax.jit(lambda key: {"head": init_params(config, key)[1]["head"]})(key)


def save(
    folder: str | os.PathLike[str],
    config: EncoderConfig,
    params: Params,
    tokenizer: TokenizerFiles | None = None,
) -> None:
    """Writes a folder that ``load`` reads.

    transformers opens it with ``AutoModelForSequenceClassification``. It is written beside and
    renamed when it is complete.

    Args:
      folder: a folder that does not exist yet, or is empty.
      config: the model.
      params: arranged as by ``galore_jax.models.encoder.init_params``; each is stored in its dtype.
      tokenizer: None for a folder without one.

    Raises:
      UserError: the folder has something in it or cannot be written, the params are not those of
        the config or have another dtype than float32, float16 and bfloat16, or the tokenizer has
        more ids than the model.
    """
    folder = Path(folder).expanduser()
    shapes = jax.eval_shape(functools.partial(init_params, config), jax.random.key(0))[1]
    check_shapes(shapes, params)
    flat: Any = traverse_util.flatten_dict(params)
    check_tokenizer(tokenizer, config.vocab_size)
    tensors = LeafTensors(flat, {path: tensor_names(config, path) for path in _leaves(config)})
    dtype = flat["embed", "word", "embedding"].dtype
    values = config_to_json(dataclasses.replace(config, param_dtype=dtype))
    save_folder(folder, values, tensors, tokenizer)


def tensor_names(config: EncoderConfig, path: leaf_tensors.Path) -> list[str]:
    """Returns Hugging Face's names of the tensors of a leaf, one for each layer of a block's.

    >>> config = EncoderConfig("roberta", 16, 32, 2, 2)
    >>> tensor_names(config, ("blocks", "attn", "q_proj", "kernel"))[1]
    'roberta.encoder.layer.1.attention.self.query.weight'
    """
    module, kind = "/".join(path[:-1]), "bias" if path[-1] == "bias" else "weight"
    head = dict(_HEADS[config.kind])
    if module in head:
        return [f"{head[module]}.{kind}"]
    name = f"{config.kind}.{dict(_BODY)[module]}.{kind}"
    return [name.format(layer) for layer in range(config.num_layers)] if "{}" in name else [name]


def _leaves(config: EncoderConfig) -> dict[leaf_tensors.Path, tuple[int, ...]]:
    """Returns the shape of every param, by its path."""
    _, shapes = jax.eval_shape(functools.partial(init_params, config), jax.random.key(0))
    flat: Any = traverse_util.flatten_dict(shapes)
    return {path: leaf.shape for path, leaf in flat.items()}


def _stored_names(kind: str, files: TensorFiles) -> dict[str, str]:
    """Returns the names in the folder by today's names: old ones and bare bodies have others."""
    stored = {}
    for name in files.specs:
        today = re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", name)
        today = re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", today)
        if re.match(r"(embeddings|encoder|pooler)\.", today):
            today = f"{kind}.{today}"
        stored[today] = name
    return stored


def _new_parts(
    config: EncoderConfig, own_labels: int, is_classifier: bool, stored: dict[str, str]
) -> tuple[str, ...]:
    """Tells which parts of the head must be drawn."""
    if is_classifier:
        return () if config.num_labels == own_labels else ("head/out",)
    has_pooler = config.kind == "bert" and f"{_HEADS['bert'][0][1]}.weight" in stored
    return ("head/out",) if has_pooler else ("head/dense", "head/out")


def _check_tensors(
    folder: Path,
    shapes: dict[leaf_tensors.Path, tuple[int, ...]],
    names: dict[leaf_tensors.Path, list[str]],
    stored: dict[str, str],
    files: TensorFiles,
    *,
    strict: bool,
) -> None:
    """Compares the names and shapes of a folder's tensors with the model's."""
    wanted = {
        name: tensor_shape(path, shape) for path, shape in shapes.items() for name in names[path]
    }
    over = {
        name
        for name in stored.keys() - wanted.keys()
        if not _OTHER_HEADS.fullmatch(name)
        or (strict and not re.match(r"classifier\.|roberta\.pooler\.", name))
    }
    found = {today: files.specs[name].shape for today, name in stored.items()}
    check_tensors(folder, wanted, found, over)
