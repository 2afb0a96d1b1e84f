r"""Reports where every byte of a training step goes, for hardware that need not be here.

  python -m galore_jax.memory --config=configs/llama.py:7b_24gb --target=rtx4090
      the report of one config, compiled for one card
  python -m galore_jax.memory --config=configs/llama.py:7b --target=rtx4090 --compare \
      --plot=memory.png
      AdamW, Adafactor, 8-bit Adam, LoRA and GaLore side by side, and a chart of them

It compiles the trainer's own step: the same config trains with train.py.

report flags:
  --target=NAME|FILE.toml the card; default: auto, this machine's own. Names: TARGETS
                          GPUs need the extra gpu-target, TPUs tpu-target; a card of your own is
                          a file like galore_jax/memory/targets.toml
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

from galore_jax.errors import UserError
from galore_jax.memory import targets

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
    from galore_jax.memory import compare, fit, report
    from galore_jax.training.command import parse
    from galore_jax.training.experiment import make_experiment

    own, rest = _own_flags(argv)
    usage = (__doc__ or "").replace("TARGETS", ", ".join(targets.target_names()))
    arguments = parse([argv[0], *rest], usage=usage, configs=_configs())
    if arguments is None:
        return 0
    config = arguments.config
    experiment = make_experiment(config)
    for path in filter(None, (own.json, own.plot)):
        if not path.parent.is_dir():
            raise UserError(f"{path}: there is no folder {path.parent}")
    if own.plot is not None and own.plot.suffix not in (".png", ".svg"):
        raise UserError(f"--plot={own.plot} must end in .png or .svg")
    target = targets.find_target(own.target)

    if own.compare:
        comparison = compare.compare(config, target, _say)
        print(compare.table(comparison))
        _write(own, experiment, comparison.reports, less_than_adamw=comparison.less_than_adamw)
        return 0
    _say(f"compiling for {target.label}")
    single = report.make_report(experiment, target)
    print(report.table(single))
    _write(own, experiment, [single])
    if single.fits is not False:
        return 0
    if not own.no_advice:
        flags = fit.find_fitting_flags(config, target, _say)
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


def _write(own: argparse.Namespace, experiment: Any, reports: list[Any], **more: Any) -> None:
    from galore_jax.memory.plot import plot
    from galore_jax.memory.report import as_json
    from galore_jax.models.llama import count_params

    config = experiment.config
    if own.json is not None:
        content = {"format": 1, "reports": [as_json(report, config) for report in reports], **more}
        own.json.write_text(json.dumps(content, indent=2) + "\n")
        print(f"written: {own.json}")
    if own.plot is not None:
        step = f"{config.batch_size} x {config.data.seq_len} tokens, rank {config.galore.rank}"
        model = f"{count_params(experiment.abstract_state().params) / 1e6:,.1f}M parameters"
        plot(reports, own.plot, f"Memory of a training step: {model}, {step}")
        print(f"written: {own.plot}")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
