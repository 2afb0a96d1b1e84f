"""Tokens a second of generation: with the key-value cache, and recomputing everything.

  PYTHONPATH=. python benchmarks/generate.py --preset=llama_60m --tokens=64,256,512
  PYTHONPATH=. python benchmarks/generate.py --model=models/smollm2 --tokens=256

Prints a Markdown table. A prompt of 16 random tokens is continued greedily, by ``generate``, and by
the training forward over the whole text, padded to its final length, anew for every token. Each
does so once before it is timed, so that nothing is compiled then. Recomputing, whose time for a
token does not change, is timed for as many tokens as take a few seconds. Presets have random
weights.
"""

import argparse
import dataclasses
import functools
import itertools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from galore_jax.models import huggingface
from galore_jax.models.config import LlamaConfig
from galore_jax.models.generate import generate
from galore_jax.models.llama import apply, init_params
from galore_jax.models.presets import PRESETS

PROMPT = 16
LEAST_SECONDS = 5.0


def make_recompute(config: LlamaConfig) -> Callable[[Any, Any, Any], Any]:
    """The likeliest token after position ``last`` of a whole text (1, S)."""
    graphdef, _ = jax.eval_shape(functools.partial(init_params, config), jax.random.key(0))

    def next_token(params: Any, text: Any, last: Any) -> Any:
        model = apply(graphdef, params)
        hidden = model.hidden_states(text)[:, last]
        return jnp.argmax(hidden @ model.head.astype(hidden.dtype), axis=-1)

    return jax.jit(next_token)


def recomputed(
    config: LlamaConfig, params: Any, prompt: np.ndarray, tokens: int, first: list[int]
) -> float:
    """Measures tokens a second, and checks that the first ones are those of ``first``."""
    next_token = make_recompute(config)
    text = np.zeros((1, PROMPT + tokens), np.int32)
    text[0, :PROMPT] = prompt
    next_token(params, text, PROMPT - 1).block_until_ready()
    begun = time.perf_counter()
    for made in itertools.count():
        seconds = time.perf_counter() - begun
        if made == tokens or (seconds > LEAST_SECONDS and made > 2):
            assert config.dtype != jnp.float32 or text[0, PROMPT:][:made].tolist() == first[:made]
            return made / seconds
        text[0, PROMPT + made] = int(next_token(params, text.copy(), PROMPT + made - 1)[0])
    raise AssertionError


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--preset", default="llama_60m", choices=PRESETS)
    parser.add_argument("--model", help="a Hugging Face folder, in the preset's place")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--tokens", default="64,256,512")
    arguments = parser.parse_args()
    if arguments.model:
        config, params = huggingface.load(arguments.model, arguments.dtype)
    else:
        config = PRESETS[arguments.preset]
        config = dataclasses.replace(config, dtype=arguments.dtype, param_dtype=arguments.dtype)
        _, params = jax.jit(functools.partial(init_params, config))(jax.random.key(0))
    config = dataclasses.replace(config, eos_ids=())
    prompt = np.random.default_rng(0).integers(0, config.vocab_size, PROMPT)
    name, device = arguments.model or arguments.preset, jax.devices()[0].device_kind
    print(f"{name}, {arguments.dtype}, {device}, jax {jax.__version__}\n")
    print("| new tokens | with the cache, tokens/s | recomputing, tokens/s | ratio |")
    print("|---|---|---|---|")
    for tokens in map(int, arguments.tokens.split(",")):
        generate(config, params, prompt, tokens)
        begun = time.perf_counter()
        new = generate(config, params, prompt, tokens)
        cached = len(new) / (time.perf_counter() - begun)
        anew = recomputed(config, params, prompt, tokens, new)
        print(f"| {tokens} | {cached:.1f} | {anew:.2f} | {cached / anew:.1f} |", flush=True)


if __name__ == "__main__":
    main()
