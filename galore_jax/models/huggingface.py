"""LLaMA as the Hugging Face hub has it: a folder of ``config.json`` and safetensors files."""

import dataclasses
import functools
import os
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import traverse_util
from jax.typing import DTypeLike

from galore_jax.errors import UserError
from galore_jax.int8_kernels import Int8Kernel, Per, encode
from galore_jax.models.config import LlamaConfig
from galore_jax.models.huggingface_config import config_to_json, read_config
from galore_jax.models.leaf_tensors import (
    LeafTensors,
    TokenizerFiles,
    aligned,
    check_tensors,
    check_tokenizer,
    leaf_dtype,
    read_leaf,
    save_folder,
    tensor_shape,
)
from galore_jax.models.llama import Params, check_params, init_params
from galore_jax.models.tensor_files import TensorFiles

# Our paths, and Hugging Face's names with the layer in the place of {}. A kernel is (in, out) here
# and (out, in) there; a leaf of the blocks is there a tensor for each layer.
_NAMES = (
    (r"embed/embedding", "model.embed_tokens.weight"),
    (r"blocks/input_norm/scale", "model.layers.{}.input_layernorm.weight"),
    (r"blocks/attn/(\w+)/kernel", r"model.layers.{}.self_attn.\1.weight"),
    (r"blocks/post_attention_norm/scale", "model.layers.{}.post_attention_layernorm.weight"),
    (r"blocks/mlp/(\w+)/kernel", r"model.layers.{}.mlp.\1.weight"),
    (r"final_norm/scale", "model.norm.weight"),
    (r"lm_head/kernel", "lm_head.weight"),
)
_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
_BUFFERS = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")  # of old versions

_Path = tuple[str, ...]


def load(
    folder: str | os.PathLike[str], dtype: DTypeLike | None = None, *, int8: bool = False
) -> tuple[LlamaConfig, Params]:
    """Reads a LLaMA from a folder, straight into stacked arrays on the default device.

    Memory peaks at the model and a few megabytes; with an accelerator, that of the host at the
    largest stack.

    Args:
      folder: has ``config.json``, and either ``model.safetensors`` or several such files and
        ``model.safetensors.index.json``.
      dtype: of the params, and to compute in. None: each keeps the dtype that it is stored in, and
        the model computes in the embedding's.
      int8: whether to encode the matrices, one tensor after the other, as ``Int8Kernel`` nodes that
        stand for arrays of that dtype.

    Returns:
      The model, and its params, arranged as by ``galore_jax.models.llama.init_params``.

    Raises:
      UserError: files that are missing or damaged, another architecture, tensors that are missing,
        left over or of the wrong shape, or a setting that ``LlamaConfig`` cannot represent.
    """
    folder = Path(folder).expanduser()
    config = read_config(folder)
    if dtype is not None:
        config = dataclasses.replace(config, dtype=dtype, param_dtype=dtype)
    files = TensorFiles(folder)
    leaves = _leaves(config)
    _check_tensors(folder, config, files, leaves)
    params = {}
    for path, shape in leaves.items():
        names = _tensor_names(path, config.num_layers)
        if int8 and path[-1] in ("kernel", "embedding"):
            numerics = leaf_dtype(folder, files, names, dtype)
            params[path] = _encoded(files, names, path, shape, numerics)
        else:
            params[path] = read_leaf(folder, files, path, shape, names, dtype)
    numerics = params["embed", "embedding"].dtype
    param_dtype = np.int8 if int8 else numerics
    config = dataclasses.replace(config, dtype=numerics, param_dtype=param_dtype)
    return config, traverse_util.unflatten_dict(params)


def save(
    folder: str | os.PathLike[str],
    config: LlamaConfig,
    params: Params,
    tokenizer: TokenizerFiles | None = None,
) -> None:
    """Writes a folder that ``load`` reads, and ``transformers.AutoModelForCausalLM`` opens.

    It is written beside and renamed when it is complete. A tensor at a time is copied; files have
    at most 5 GB.

    Args:
      folder: a folder that does not exist yet, or is empty.
      config: the model.
      params: arranged as by ``galore_jax.models.llama.init_params``; each is stored in its dtype,
        and an ``Int8Kernel`` in that of the array that it stands for.
      tokenizer: None for a folder without one.

    Raises:
      UserError: the folder has something in it or cannot be written, the params are not those of
        the config or have another dtype than float32, float16 and bfloat16, or the tokenizer has
        more ids than the model.
    """
    folder = Path(folder).expanduser()
    check_params(config, params)
    flat: Any = traverse_util.flatten_dict(params)
    tensors = LeafTensors(flat, {path: _tensor_names(path, config.num_layers) for path in flat})
    check_tokenizer(tokenizer, config.vocab_size)
    dtype = flat["embed", "embedding"].dtype
    values = config_to_json(dataclasses.replace(config, param_dtype=dtype))
    save_folder(folder, values, tensors, tokenizer)


def _leaves(config: LlamaConfig) -> dict[_Path, tuple[int, ...]]:
    """Returns the shape of every param, in the order in which they are used."""
    _, shapes = jax.eval_shape(functools.partial(init_params, config), jax.random.key(0))
    flat: Any = traverse_util.flatten_dict(shapes)
    order = [pattern for pattern, _ in _NAMES]
    return {
        path: flat[path].shape
        for path in sorted(flat, key=lambda path: order.index(_pattern(path)))
    }


def _encoded(
    files: TensorFiles, names: list[str], path: _Path, shape: tuple[int, ...], dtype: np.dtype
) -> Int8Kernel:
    """Reads the tensors of a leaf one by one, and encodes each before the next."""
    per: Per = "row" if path[-1] == "embedding" else "column"
    find = jax.jit(functools.partial(encode, per=per, dtype=dtype))
    codes, scales = aligned(shape, np.dtype(np.int8)), []
    for layer, name in enumerate(names):
        tensor = aligned(shape[-2:], np.dtype(np.float32))
        files.read_into(name, tensor, transpose=path[-1] == "kernel")
        kernel = find(tensor)
        (codes if path[0] != "blocks" else codes[layer])[:] = np.asarray(kernel.codes)
        scales.append(np.asarray(kernel.scales))
    stacked = np.stack(scales) if path[0] == "blocks" else scales[0]
    return Int8Kernel(jax.device_put(codes), jax.device_put(stacked), per=per, dtype=dtype)


def _pattern(path: _Path) -> str:
    return next(pattern for pattern, _ in _NAMES if re.fullmatch(pattern, "/".join(path)))


def _tensor_names(path: _Path, num_layers: int) -> list[str]:
    """Returns Hugging Face's names of the tensors of a leaf, one for each layer of a block's."""
    pattern = _pattern(path)
    name = re.sub(pattern, dict(_NAMES)[pattern], "/".join(path))
    return [name.format(layer) for layer in range(num_layers)] if "{}" in name else [name]


def _check_tensors(
    folder: Path, config: LlamaConfig, files: TensorFiles, leaves: dict[_Path, tuple[int, ...]]
) -> None:
    """Compares the names and shapes of a folder's tensors with the model's."""
    wanted = {}
    for path, shape in leaves.items():
        names = _tensor_names(path, config.num_layers)
        wanted |= dict.fromkeys(names, tensor_shape(path, shape))
    found = {name for name in files.specs if not _BUFFERS.fullmatch(name)}
    if config.tie_embeddings and _HEAD in found:
        if not files.equal(_HEAD, _EMBEDDING):
            raise UserError(
                f"{folder} has a {_HEAD} that differs from its {_EMBEDDING}, but its config.json "
                "says that they are tied; set tie_word_embeddings to false there"
            )
        found.remove(_HEAD)
    shapes = {name: spec.shape for name, spec in files.specs.items() if name in found}
    check_tensors(folder, wanted, shapes, found - wanted.keys())
