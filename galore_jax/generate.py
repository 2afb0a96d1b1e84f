r"""Continues a text with a language model, and prints it as it comes.

  python -m galore_jax.generate --model=runs/sample-galore-adamw --prompt="This operation"
      the newest checkpoint of a run of train.py; the likeliest token each time
  python -m galore_jax.generate --model=models/smollm2 --prompt="The sea is" \
      --temperature=0.8 --top_p=0.95 --seed=1
      a LLaMA in Hugging Face's format, with tokens drawn at random
  python -m galore_jax.generate --model=FOLDER --ids=1,5,9
      ids instead of text, for a model without a tokenizer

flags:
  --model=FOLDER|RUN      a folder of config.json and safetensors files, with tokenizer.json or
                          tokenizer.model for text; or a run's workdir
  --prompt=TEXT           what to continue
  --ids=ID,ID,...         the same as ids; prints ids
  --max_tokens=N          at most so many more; default 64. It ends before at an end token, and
                          where the model has no more positions
  --temperature=X         0, the default: the likeliest token each time; 1: by the model's
                          probabilities; more evens them out, less sharpens them
  --top_k=N               draw from the N likeliest tokens alone
  --top_p=X               draw from the likeliest tokens that have together this probability
  --seed=N                of the draws; default 0. The same seed gives the same text
  --step=N                the checkpoint of a run; default: the newest
  --dtype=float32|float16|bfloat16
                          of the weights and to compute in; default: as they are stored. A CPU is
                          fastest in float32
  --help                  this text
"""

import sys
import time

import jax
import jax.numpy as jnp

from galore_jax.command import Flags, run_command
from galore_jax.data.sentence_tokenizer import SentenceTokenizer
from galore_jax.data.tokenizer import TextStream
from galore_jax.errors import UserError
from galore_jax.models.config import LlamaConfig
from galore_jax.models.generate import Sampling, check_prompt, generate
from galore_jax.training.saved_run import open_model


def main(argv: list[str]) -> int:
    """The command; see the module's text for its flags, and ``run_command`` for exit codes."""
    return run_command(lambda: _run(argv[1:]))


def _run(arguments: list[str]) -> None:
    flags = Flags(__doc__ or "")
    flags.add_argument("--model")
    flags.add_argument("--prompt")
    flags.add_argument("--ids")
    flags.add_argument("--max_tokens", type=int, default=64)
    flags.add_argument("--temperature", type=float, default=0.0)
    flags.add_argument("--top_k", type=int)
    flags.add_argument("--top_p", type=float)
    flags.add_argument("--seed", type=int, default=0)
    flags.add_argument("--step", type=int)
    flags.add_argument("--dtype", choices=("float32", "float16", "bfloat16"))
    given = flags.parse(arguments)
    if given is None:
        return
    if given.model is None:
        raise UserError("give --model=FOLDER, a Hugging Face model or a run; --help tells more")
    if (given.prompt is None) == (given.ids is None):
        raise UserError("give either --prompt=TEXT or --ids=ID,ID,...")
    sampling = Sampling(given.temperature, given.top_k, given.top_p, given.seed)
    ids = None if given.ids is None else _parse_ids(given.ids)
    opened = open_model(given.model, given.step, dtype=given.dtype, tokenizer=ids is None)
    if not isinstance(opened.config, LlamaConfig) or isinstance(
        opened.tokenizer, SentenceTokenizer
    ):
        raise UserError(f"{given.model} labels sentences; it cannot continue a text")
    if opened.tokenizer is None:
        prompt, begin = ids or [], given.ids
        add, end = ",{}".format, str
    else:
        prompt, begin = opened.tokenizer.encode_prompt(given.prompt), given.prompt
        stream = TextStream(opened.tokenizer, prompt)
        add, end = stream.add, stream.end
    check_prompt(opened.config, prompt, given.max_tokens)
    times = []

    def show(token: int) -> None:
        times.append(time.monotonic())
        print(add(token), end="", flush=True)

    print(begin, end="", flush=True)
    new = generate(
        opened.config, opened.params, prompt, given.max_tokens, sampling=sampling, on_token=show
    )
    print(end())
    _print_summary(opened.config, len(prompt) + len(new), new, times)


def _parse_ids(text: str) -> list[int]:
    try:
        return [int(i) for i in text.split(",")]
    except ValueError as error:
        raise UserError(f"--ids={text} must be integers with commas between them") from error


def _print_summary(config: LlamaConfig, length: int, new: list[int], times: list[float]) -> None:
    """Tells on stderr how many tokens came, how fast once all was compiled, and why no more."""
    line = f"{len(new)} tokens"
    if len(times) > 2:
        line += f", {(len(times) - 2) / (times[-1] - times[1]):.1f} a second"
    if new[-1] in config.eos_ids:
        line += "; the text has ended"
    elif config.max_positions is not None and length > config.max_positions:
        line += f"; the model has no more than {config.max_positions} positions"
    if jax.default_backend() == "cpu" and config.dtype != jnp.float32:
        line += "; on a CPU --dtype=float32 is several times as fast"
    print(line, file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
