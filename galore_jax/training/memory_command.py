r"""Where every byte of a training step goes, for hardware that need not be here.

  python -m galore_jax.memory --config=configs/llama_7b.py:optimizer=adamw8bit \
      --target=rtx4090 --config.updates=layerwise --config.optimizer.clip_norm=None
      the report of one config, compiled for one card
  python -m galore_jax.memory --config=configs/llama_7b.py --target=rtx4090 --compare \
      --plot=memory.png
      AdamW, Adafactor, 8-bit Adam, LoRA and GaLore side by side, and a chart of them

What is compiled is the trainer's own step: the same config trains with train.py.

report flags:
  --target=NAME|FILE.toml the card; default: auto, this machine's own. Names: TARGETS
                          GPUs need the extra gpu-target, TPUs tpu-target; a card of your own is
                          a file like galore_jax/targets.toml
  --compare               the methods side by side, with this model, batch and rank
  --json=FILE             the numbers, for programs (docs/memory.md)
  --plot=FILE.png|.svg    a chart (extra: plot)
  --no_advice             where it does not fit, do not look for settings with which it would
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from galore_jax import targets
from galore_jax.errors import UserError

_ROOT = Path(__file__).resolve().parents[2]


def main(argv: list[str]) -> int:
    """The command; 0 if the config fits or is compared, 2 after an error or if it does not."""
    targets.prepare_process()
    try:
        return _run(argv)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _run(argv: list[str]) -> int:
    from galore_jax.training import memory_compare, memory_report, settings
    from galore_jax.training.cli import parse
    from galore_jax.training.plans import advice

    own, rest = _own_flags(argv)
    configs = _configs()
    usage = (__doc__ or "").replace("TARGETS", ", ".join(targets.target_names()))
    arguments = parse([argv[0], *rest], usage=usage, configs=configs)
    if arguments is None:
        return 0
    config = arguments.config
    settings.check_config(config)
    for path in filter(None, (own.json, own.plot)):
        if not path.parent.is_dir():
            raise UserError(f"{path}: there is no folder {path.parent}")
    if own.plot is not None and own.plot.suffix not in (".png", ".svg"):
        raise UserError(f"--plot={own.plot} must end in .png or .svg")
    target = targets.find_target(own.target)

    if own.compare:
        reports = memory_compare.compare(config, target, _say)
        print(memory_compare.table(config, reports))
        _write(own, config, reports, memory_compare.reductions(config, reports))
        return 0
    _say(f"compiling for {target.label}")
    report = memory_report.make_report(config, target)
    print(memory_report.table(report))
    _write(own, config, [report], None)
    if report.fits is not False:
        return 0
    if not own.no_advice:
        flags = advice(config, target, _say)
        print("fits with " + " ".join(flags) if flags else "no settings were found that fit")
    return 2


def _own_flags(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--target", default="auto")
    parser.add_argument("--compare", action="store_true")
    parser.add_argument("--no_advice", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    try:
        return parser.parse_known_args(argv[1:])
    except argparse.ArgumentError as error:
        raise UserError(str(error)) from error


def _configs() -> Path:
    for folder in (Path.cwd() / "configs", _ROOT / "configs"):
        if (folder / "base.py").is_file():
            sys.path.insert(0, str(folder.parent))
            return folder
    raise UserError("there is no folder configs here: run this in a clone of the repository")


def _write(own: argparse.Namespace, config: Any, reports: list[Any], reductions: Any) -> None:
    from galore_jax.training.memory_plot import plot
    from galore_jax.training.memory_report import as_json

    if own.json is not None:
        content: dict[str, Any] = {
            "format": 1,
            "reports": [as_json(report, config) for report in reports],
        }
        if reductions is not None:
            content["less_than_adamw"] = reductions
        own.json.write_text(json.dumps(content, indent=2) + "\n")
        print(f"written: {own.json}")
    if own.plot is not None:
        size = f"{config.batch_size} x {config.data.seq_len} tokens an update"
        rank = config.galore.rank
        plot(reports, own.plot, f"Memory of a training step, {size}, GaLore's rank {rank}")
        print(f"written: {own.plot}")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
