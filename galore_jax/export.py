r"""Writes a checkpoint of a run as a Hugging Face folder, tokenizer included.

  python -m galore_jax.export --workdir=runs/sample-galore-adamw --to=models/sample
      the newest checkpoint; AutoModelForCausalLM.from_pretrained("models/sample") opens it, and
      so do galore_jax.generate, galore_jax.evaluate and --config.init_from

flags:
  --workdir=RUN           the --workdir of train.py
  --to=FOLDER             a folder that does not exist yet; it appears when it is complete
  --step=N                the checkpoint of that step; default: the best one of a run on GLUE's
                          tasks, else the newest
  --dtype=float32|float16|bfloat16
                          of the weights; default: as they were trained, and of int8 weights as they
                          entered products
  --help                  this text
"""

import sys
from pathlib import Path

import jax

from galore_jax.command import Flags, run_command
from galore_jax.errors import UserError
from galore_jax.int8_kernels import is_int8
from galore_jax.models.architectures import architecture_of
from galore_jax.models.llama import count_params
from galore_jax.training.saved_run import open_run


def main(argv: list[str]) -> int:
    """The command; see the module's text for its flags, and ``run_command`` for exit codes."""
    return run_command(lambda: _run(argv[1:]))


def _run(arguments: list[str]) -> None:
    flags = Flags(__doc__ or "")
    flags.add_argument("--workdir", type=Path)
    flags.add_argument("--to", type=Path)
    flags.add_argument("--step", type=int)
    flags.add_argument("--dtype", choices=("float32", "float16", "bfloat16"))
    given = flags.parse(arguments)
    if given is None:
        return
    if given.workdir is None or given.to is None:
        raise UserError("give --workdir=RUN and --to=FOLDER; --help tells more")
    run = open_run(given.workdir, given.step)
    params = run.params
    if given.dtype is not None:
        params = jax.tree.map(lambda leaf: leaf.astype(given.dtype), params, is_leaf=is_int8)
    architecture_of(run.model).save(given.to, run.model, params, run.tokenizer)
    millions = count_params(params) / 1e6
    print(f"written: {given.to}, {millions:,.2f}M parameters after update {run.step}")


if __name__ == "__main__":
    sys.exit(main(sys.argv))
