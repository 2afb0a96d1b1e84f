r"""Computes a model's loss, perplexity and bits per byte on held-out text, or a task's scores.

  python -m galore_jax.evaluate --workdir=runs/sample-galore-adamw
      a run of train.py, on the held-out part of its own data
  python -m galore_jax.evaluate --workdir=runs/60m --step=5000 --config.eval_tokens=1000000 --json
      an earlier checkpoint, a million tokens, JSON for programs
  python -m galore_jax.evaluate --model=models/smollm2 --config.data.seq_len=512
      a Hugging Face folder, on the offline sample; for C4 give --config.data.name=c4 and
      --config.data.data_dir=DIR
  python -m galore_jax.evaluate --workdir=runs/reviews-galore-adamw
  python -m galore_jax.evaluate --model=models/reviews --config=configs/reviews.py
      a classifier of sentences: the task's scores; of a run that of the best evaluation

Bits per byte compare models of different tokenizers: the loss of all targets over the bytes of text
that these stand for. The end of a document counts as a target without bytes.

flags:
  --workdir=RUN           the --workdir of train.py; the config is the run's
  --model=FOLDER          a folder in Hugging Face's format; the config is that of --config
  --step=N                the checkpoint of a run; default: the newest
  --config=FILE           for a folder: data, eval_tokens; default: configs/sample.py
  --config.KEY=VALUE      any key of the config: data.*, eval_tokens, micro_batch_size, ...
  --dtype=float32|float16|bfloat16
                          of the weights and to compute in; default: as they are stored
  --json, --json=FILE     the numbers as JSON, on standard output alone or to a file
  --help                  this text
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import jax

from galore_jax.command import Flags, run_command
from galore_jax.data.glue_tasks import TASKS
from galore_jax.errors import UserError
from galore_jax.models.architectures import ModelConfig, architecture_of
from galore_jax.models.encoder_huggingface import load
from galore_jax.models.llama import Params
from galore_jax.training.cli import find_configs, parse
from galore_jax.training.config import Config, check_config, is_sentence_task
from galore_jax.training.evaluation import bytes_of_tokens, evaluate
from galore_jax.training.from_config import make_task
from galore_jax.training.language_modelling import LanguageModelling
from galore_jax.training.progress import format_count, format_duration
from galore_jax.training.saved_run import is_run, open_model, read_run_config
from galore_jax.training.step import make_eval_step


def main(argv: list[str]) -> int:
    """The command; see the module's text for its flags, and ``run_command`` for exit codes."""
    return run_command(lambda: _run(argv[1:]))


def _run(arguments: list[str]) -> None:
    flags = Flags(__doc__ or "")
    flags.add_argument("--workdir", type=Path)
    flags.add_argument("--model", type=Path)
    flags.add_argument("--step", type=int)
    flags.add_argument("--dtype", choices=("float32", "float16", "bfloat16"))
    flags.add_argument("--json", nargs="?", const="-")
    settings = [x for x in arguments if x.startswith("--config")]
    given = flags.parse([x for x in arguments if x not in settings])
    if given is None:
        return
    if (given.workdir is None) == (given.model is None):
        raise UserError("give either --workdir=RUN or --model=FOLDER; --help tells more")
    if given.json is not None and not Path(given.json).parent.is_dir():
        raise UserError(f"--json={given.json}: there is no folder {Path(given.json).parent}")
    folder = given.workdir or given.model
    if given.workdir is not None and not is_run(folder):
        raise UserError(f"--workdir={folder} is no run; for a Hugging Face folder give --model")
    config = _config(folder, settings)
    if is_sentence_task(config) and given.model is not None:
        model, params = _open_classifier(config, folder, given.dtype)
    else:
        model, params, _ = open_model(folder, given.step, dtype=given.dtype, tokenizer=False)
    task = make_task(config, model)
    if isinstance(task, LanguageModelling):
        numbers, text = _evaluate_text(config, task, model, params)
    else:
        judge = jax.jit(make_eval_step(architecture_of(model).stages(model), task))
        size = config.micro_batch_size
        found = task.evaluate(judge, params, task.open_data(), batch_size=size, most_targets=0)
        assert found is not None  # nothing stops it
        numbers, text = found.metrics, f"{found.text} {found.over}"
    as_json = json.dumps({**numbers, "model": str(folder), "data": config.data.to_dict()}, indent=2)
    if given.json == "-":
        print(as_json)
        return
    print(text)
    if given.json is not None:
        Path(given.json).write_text(as_json + "\n")
        print(f"written: {given.json}")


def _config(folder: Path, settings: list[str]) -> Any:
    """Makes the config of a run or of ``--config``, with the model's own tokenizer."""
    saved = read_run_config(folder) if is_run(folder) else None
    parsed = parse(["", *settings], usage="", configs=find_configs(), saved=saved)
    assert parsed is not None  # there is no --help among the settings
    config = parsed.config
    check_config(config)
    own = folder / "tokenizer" if saved is not None else folder
    if own.is_dir() and not any(x.startswith("--config.data.tokenizer") for x in settings):
        config.data.tokenizer = str(own)
    return config


def _open_classifier(config: Config, folder: Path, dtype: str | None) -> tuple[ModelConfig, Any]:
    """Opens a Hugging Face folder whose head is for the task of a config."""
    loaded = load(folder, dtype, labels=TASKS[config.task].labels)
    if loaded.new:
        raise UserError(f"{folder} has no head for the task {config.task}: fine-tune it first")
    return loaded.config, loaded.params


def _evaluate_text(
    config: Config, task: LanguageModelling, model: ModelConfig, params: Params
) -> tuple[dict[str, Any], str]:
    """Returns an evaluation as numbers and as a line of text."""
    data = task.open_data()
    step = jax.jit(make_eval_step(architecture_of(model).stages(model), task))
    begun = shown = time.monotonic()

    def progress(targets: int) -> None:
        nonlocal shown
        now = time.monotonic()
        if now - shown >= 5 and targets < config.eval_tokens:
            shown = now
            left = (now - begun) * (config.eval_tokens / targets - 1)
            line = f"{format_count(targets)} of up to {format_count(config.eval_tokens)} tokens"
            print(f"{line}, ETA {format_duration(left)}", file=sys.stderr, flush=True)

    sizes = {"batch_size": config.micro_batch_size, "most_targets": config.eval_tokens}
    found = evaluate(step, params, task, data, **sizes, progress=progress)
    assert found is not None  # nothing stops it
    text_bytes = int(found.token_counts @ bytes_of_tokens(data.tokenizer))
    bits = found.bits_per_byte(text_bytes)
    numbers = {"loss": found.loss, "perplexity": found.perplexity}
    numbers |= {"bits_per_byte": bits, "targets": found.targets, "text_bytes": text_bytes}
    text = (
        f"loss {found.loss:.4f} nats a token, perplexity {found.perplexity:.2f}, "
        f"{bits:.4f} bits per byte, over {format_count(found.targets)} tokens and "
        f"{format_count(text_bytes)} bytes of held-out text"
    )
    return numbers, text


if __name__ == "__main__":
    sys.exit(main(sys.argv))
