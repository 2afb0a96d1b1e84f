r"""Reports where every byte of the trainer's step goes, on hardware that need not be here.

  python -m galore_jax.memory --config=configs/llama.py:7b_24gb --target=rtx4090
      the report of one config, compiled for one card
  python -m galore_jax.memory --config=configs/llama.py:7b --target=rtx4090 --compare \
      --plot=memory.png
      AdamW, Adafactor, 8-bit Adam, LoRA and GaLore side by side, and a chart of them
  python -m galore_jax.memory --config=configs/llama.py:70b,optimizer=adamw8bit --mesh=fsdp:8,tp:2
      the counted bytes of one device of a mesh, for a distributed trainer of your own

report flags:
  --target=NAME|FILE.toml the card; default: auto, this machine's own. Names: TARGETS
                          GPUs need the extra gpu-target, TPUs tpu-target; a card of your own is
                          a file like galore_jax/memory/targets.toml
  --compare               the methods side by side, with this model, batch and rank
  --mesh=AXIS:SIZE,...    count weights, gradients and state of one device, and compile nothing
  --json=FILE             the numbers, for programs (docs/memory.md)
  --plot=FILE.png|.svg    a chart (extra: plot)
  --no_advice             where it does not fit, do not look for settings with which it would
"""

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import optax

from galore_jax.errors import UserError
from galore_jax.memory import targets


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
    from galore_jax.memory import compare, fit, plot, report
    from galore_jax.models.llama import count_params
    from galore_jax.training.cli import find_configs, parse
    from galore_jax.training.experiment import make_experiment

    own, rest = _own_flags(argv)
    usage = (__doc__ or "").replace("TARGETS", ", ".join(targets.target_names()))
    arguments = parse([argv[0], *rest], usage=usage, configs=find_configs())
    if arguments is None:
        return 0
    config = arguments.config
    experiment = make_experiment(config)
    if own.json is not None and not own.json.parent.is_dir():
        raise UserError(f"--json={own.json}: there is no folder {own.json.parent}")
    if own.plot is not None:
        plot.check_path(own.plot)
    if own.mesh is not None:
        return _count_on_mesh(own, experiment)
    target = targets.find_target(own.target)
    if own.compare:
        reports, savings = compare.compare(config, target, _say)
        print(compare.table(reports, savings))
        more = {"less_than_adamw": savings}
    else:
        _say(f"compiling for {target.label}")
        reports, more = [report.make_report(experiment, target)], {}
        print(report.table(reports[0]))
    if own.json is not None:
        as_json = [report.as_json(x, config) for x in reports]
        own.json.write_text(json.dumps({"format": 1, "reports": as_json, **more}, indent=2) + "\n")
        print(f"written: {own.json}")
    if own.plot is not None:
        billions = count_params(experiment.abstract_state().params) / 1e9
        size = f"{billions:.2f}B" if billions >= 1 else f"{1000 * billions:.2f}M"
        step = f"{config.batch_size} x {config.data.seq_len} tokens, rank {config.galore.rank}"
        title = f"Memory of a training step: {size} parameters, {step}"
        plot.plot(reports, own.plot, title, compare.published(config) if own.compare else None)
        print(f"written: {own.plot}")
    if own.compare or reports[0].fits is not False:
        return 0
    if not own.no_advice:
        flags = fit.find_fitting_flags(config, target, _say)
        print("fits with " + " ".join(flags) if flags else "no settings were found that fit")
    return 2


def _count_on_mesh(own: argparse.Namespace, experiment: Any) -> int:
    from galore_jax.memory import mesh
    from galore_jax.models.stages import LAYERS

    if own.compare or own.plot is not None:
        raise UserError("--mesh counts, and compiles nothing: leave out --compare and --plot")
    if experiment.config.param_dtype == "int8":
        raise UserError("--mesh counts float weights; int8 ones are for one device")
    axes, params = mesh.parse_mesh(own.mesh), experiment.abstract_state().params
    optimizers = (experiment.optimizer, optax.adamw(0.0))
    report, adamw = (mesh.count_on_mesh(params, tx, axes, LAYERS) for tx in optimizers)
    print(mesh.mesh_table(report, adamw))
    if own.json is not None:
        own.json.write_text(
            json.dumps({"format": 1, **dataclasses.asdict(report)}, indent=2) + "\n"
        )
        print(f"written: {own.json}")
    return 0


def _own_flags(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--target", default="auto")
    parser.add_argument("--mesh")
    parser.add_argument("--compare", action="store_true")
    parser.add_argument("--no_advice", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    try:
        return parser.parse_known_args(argv[1:])
    except argparse.ArgumentError as error:
        raise UserError(str(error)) from error


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
