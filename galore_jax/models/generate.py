"""Text from a language model: a prompt continued a token at a time."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from galore_jax.errors import UserError
from galore_jax.kernels import linear
from galore_jax.models.attention import Cache, empty_cache
from galore_jax.models.config import LlamaConfig
from galore_jax.models.llama import Llama, Params, apply, init_params

_CACHE_STEP = 128  # caches are multiples of this, so that few sizes are compiled
_SHORTEST_PROMPT = 16


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
      temperature: logits are divided by it; 0 takes the likeliest token.
      top_k: only the k likeliest tokens; None for all.
      top_p: of those only the likeliest that together have this probability (nucleus sampling,
        Holtzman et al. 2020, arXiv:1904.09751); None or 1 for all.
      seed: of the draws; the same seed gives the same text.

    Raises:
      UserError: a number out of its range.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0

    def __post_init__(self):
        if not (self.temperature >= 0 and math.isfinite(self.temperature)):
            raise UserError(f"temperature is {self.temperature}; it must be at least 0")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top_k is {self.top_k}; it must be at least 1")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(f"top_p is {self.top_p}; it must be greater than 0 and at most 1")


def generate(
    config: LlamaConfig,
    params: Params,
    prompt_ids: Sequence[int] | np.ndarray,
    max_tokens: int,
    *,
    sampling: Sampling = Sampling(),
    on_token: Callable[[int], object] = lambda token: None,
) -> list[int]:
    """Continues a prompt until a token of ``config.eos_ids``, or ``max_tokens``.

    Keys and values are kept in a cache of fixed size, so that a token costs one row of products.
    Two programs are compiled, for the prompt and for every token after it; they serve every later
    call with as long a prompt and text, rounded up.

    Args:
      config: the model.
      params: its params.
      prompt_ids: at least one id.
      max_tokens: the most tokens to add. Fewer come where ``config.max_positions`` ends.
      sampling: how a token is chosen; the likeliest one by default.
      on_token: called with each new id as soon as it is there.

    Returns:
      The new ids, with the one that ended the text.

    Raises:
      UserError: an empty prompt, ids that the model lacks, more of them than the model has
        positions, or ``max_tokens`` less than 1.

    >>> config = LlamaConfig(16, 24, num_layers=2, num_heads=2, vocab_size=32)
    >>> _, params = init_params(config, jax.random.key(0))
    >>> len(generate(config, params, [5, 7], max_tokens=3))
    3
    """
    prompt = np.asarray(prompt_ids, np.int64)
    check_prompt(config, prompt, max_tokens)
    end = len(prompt) + max_tokens
    room = -(-end // _CACHE_STEP) * _CACHE_STEP
    if config.max_positions is not None:
        # The last token need not be read, so that it may be one after the last position.
        end, room = min(end, config.max_positions + 1), min(room, config.max_positions)
    padded = np.zeros((1, min(_prompt_bucket(len(prompt)), room)), np.int32)
    padded[0, : len(prompt)] = prompt
    params = jax.device_put(params)  # once, where they are NumPy's
    cache, key = empty_cache(config, 1, room), jax.random.key(sampling.seed)
    choose = dataclasses.replace(sampling, seed=0)  # no program for each seed
    token, cache = _next_token(config, choose, params, padded, cache, 0, len(prompt), key)
    new = []
    for position in range(len(prompt), end):
        new.append(int(token[0, 0]))
        on_token(new[-1])
        if new[-1] in config.eos_ids or position == end - 1:
            break
        token, cache = _next_token(config, choose, params, token, cache, position, 1, key)
    return new


def _prompt_bucket(length: int) -> int:
    return max(1 << (length - 1).bit_length(), _SHORTEST_PROMPT)


def check_prompt(
    config: LlamaConfig, prompt_ids: Sequence[int] | np.ndarray, max_tokens: int
) -> None:
    """Checks that ``generate`` can do what is asked.

    Raises:
      UserError: as ``generate``.

    >>> check_prompt(LlamaConfig(16, 24, num_layers=2, num_heads=2, vocab_size=32), [31], 10)
    """
    if max_tokens < 1:
        raise UserError(f"max_tokens is {max_tokens}; it must be at least 1")
    prompt = np.asarray(prompt_ids, np.int64)
    if prompt.ndim != 1 or not prompt.size:
        raise UserError("the prompt has no tokens; give at least one")
    wrong = prompt[(prompt < 0) | (prompt >= config.vocab_size)]
    if wrong.size:
        raise UserError(f"the prompt's id {wrong[0]} is none of the model's {config.vocab_size}")
    if config.max_positions is not None and prompt.size > config.max_positions:
        raise UserError(
            f"the prompt has {prompt.size} tokens and the model {config.max_positions} positions; "
            "give a shorter one"
        )


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=4)
def _next_token(
    config: LlamaConfig,
    sampling: Sampling,
    params: Params,
    tokens: Any,
    cache: Cache,
    start: Any,
    count: Any,
    key: jax.Array,
) -> tuple[jax.Array, Cache]:
    """Reads tokens (1, S), of which ``count`` count, from ``start`` on; chooses what follows."""
    hidden, cache = _model(config, params).extend(tokens, cache, start)
    last = jax.lax.dynamic_index_in_dim(hidden, count - 1, axis=1, keepdims=False)
    logits = linear(last, _model(config, params).head, out_dtype=jnp.float32)
    key = jax.random.fold_in(key, start + count)
    return _choose(sampling, logits, key).astype(jnp.int32)[:, None], cache


def _model(config: LlamaConfig, params: Params) -> Llama:
    graphdef, _ = jax.eval_shape(functools.partial(init_params, config), jax.random.key(0))
    return apply(graphdef, params)


def _choose(sampling: Sampling, logits: jax.Array, key: jax.Array) -> jax.Array:
    """Chooses tokens (B,) from logits (B, V)."""
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1)
    logits = logits / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < logits.shape[-1]:
        least = jax.lax.top_k(logits, sampling.top_k)[0][:, -1:]
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if sampling.top_p is not None and sampling.top_p < 1:
        # The tokens whose likelier ones have together less than top_p: at least the likeliest.
        sorted_logits = -jnp.sort(-logits, axis=-1)
        p = jax.nn.softmax(sorted_logits, axis=-1)
        before = jnp.cumsum(p, axis=-1) - p
        least = jnp.min(
            jnp.where(before < sampling.top_p, sorted_logits, jnp.inf), axis=-1, keepdims=True
        )
        logits = jnp.where(logits < least, -jnp.inf, logits)
    return jax.random.categorical(key, logits)
