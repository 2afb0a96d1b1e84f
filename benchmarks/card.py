r"""Measures one card: steps of each method, their memory, the 8-bit update, input and host time.

  PYTHONPATH=. python benchmarks/card.py --quick --out=card.md
  PYTHONPATH=. python benchmarks/card.py --models 60m 350m 1b 7b --out=card.md --plot=card.png

It takes whatever device JAX finds. Every figure is a process of its own, so that none sees
another's memory; with --rounds the processes come round again, in the opposite order, and a figure
is the median of its rounds. A figure is a line of FILE.jsonl beside FILE.md as soon as it is there,
and is not taken again: an interrupted command goes on where it was. --quick takes one round of
fewer figures, and begins no figure after seven minutes.

step          seconds of a step between two refreshes, the median of several, and tokens a second
refresh       seconds of a step with a refresh; amortised over the config's update_proj_gap
MFU           model FLOPs a second (galore_jax.models.flops) of the card's peak in targets.toml
peak, plan    GiB: the most in use on the device, and what the compiler planned for the larger step
host          seconds until the call of a step returns: what the host does, while the device works
"""

import argparse
import dataclasses
import importlib.metadata
import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from step import adamw, optax_galore, with_count_zero

from configs import llama as llama_configs
from galore_jax import adamw8bit
from galore_jax.data.batches import DataConfig, TextData
from galore_jax.memory import compiled_plan, tree_bytes
from galore_jax.memory.peaks import Peak, find_peak
from galore_jax.models.config import LlamaConfig
from galore_jax.models.flops import training_flops_per_token
from galore_jax.training.config import Config
from galore_jax.training.experiment import make_experiment

OPTAX = "optax.contrib.galore"
STANDARD = {"updates": "standard", "projected_gradients": False}
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "AdamW": ("method=full", {}),
    "8-bit AdamW": ("method=full,optimizer=adamw8bit", {}),
    OPTAX: ("method=galore", STANDARD),
    "GaLore, full gradients": ("method=galore", STANDARD),
    "GaLore, projected": ("method=galore", {"projected_gradients": True}),
    "GaLore, layerwise": ("method=galore", {"updates": "layerwise"}),
    "8-bit GaLore, layerwise": ("method=galore,optimizer=adamw8bit", {"updates": "layerwise"}),
    "GaLore-Muon, projected": ("method=galore_muon", {"projected_gradients": True}),
}
# Sequences of 256 tokens that a step takes, so that the larger models fit a card of 24 GB.
SEQUENCES = {"60m": 64, "130m": 64, "350m": 32, "1b": 16, "7b": 1}
QUICK = ("AdamW", "8-bit AdamW", OPTAX, "GaLore, projected", "8-bit GaLore, layerwise")
SECONDS = 420.0  # after which --quick begins no figure
Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Figure:
    """What one process measures.

    Attributes:
      kind: "step", "update" (of 8-bit Adam) or "input" (the data pipeline alone).
      model: a row of ``configs/llama.py``.
      method: a key of ``METHODS``.
      seq_len: tokens a sequence.
      attention: None, "xla" or "cudnn".
      tokens: a step's.
    """

    kind: str
    model: str
    method: str
    seq_len: int
    attention: str | None
    tokens: int


def make_config(figure: Figure) -> Config:
    argument, changes = METHODS[figure.method]
    config: Config = llama_configs.get_config(f"{figure.model},{argument}")
    config.update_from_flattened_dict(changes)
    config.batch_size = config.micro_batch_size = max(figure.tokens // figure.seq_len, 1)
    config.data.seq_len = figure.seq_len
    config.optimizer.clip_norm = None
    config.model.attention_implementation = figure.attention
    if jax.default_backend() == "cpu":
        config.dtype = config.param_dtype = "float32"
    return config


def measure_step(figure: Figure) -> Row:
    """Runs some steps, and one with a refresh."""
    config = make_config(figure)
    experiment = make_experiment(config)
    if figure.method == "AdamW":
        experiment = dataclasses.replace(experiment, optimizer=adamw(config))
    if figure.method == OPTAX:
        experiment = dataclasses.replace(experiment, optimizer=optax_galore(config))
    shape = config.batch_size, figure.seq_len + 1
    drawn = jax.random.randint(jax.random.key(1), shape, 0, config.model.vocab_size)
    batch = {"tokens": drawn[:, :-1], "targets": drawn[:, 1:]}
    steps, plans = {}, []
    state = experiment.abstract_state()
    for refresh, step in experiment.train_steps().items():
        if refresh and figure.method == OPTAX:
            continue  # its SVD is in the same program
        steps[refresh] = jax.jit(step, donate_argnums=0).lower(state, batch).compile()
        plan = compiled_plan(steps[refresh], jax.devices()[0].device_kind)
        plans += [] if plan is None else [plan.peak]
    state = jax.block_until_ready(experiment.first_state())

    def run(refresh: bool) -> tuple[float, float]:
        nonlocal state
        if refresh and figure.method == OPTAX:
            state = jax.block_until_ready(with_count_zero(state))
        begun = time.perf_counter()
        state, _ = steps[refresh if refresh in steps else False](state, batch)
        returned = time.perf_counter() - begun
        jax.block_until_ready(state)
        return time.perf_counter() - begun, returned

    has_refresh = True in steps or figure.method == OPTAX
    if has_refresh:
        run(True)
    first, _ = run(False)
    count = max(3, min(30, int(5 / max(first, 1e-3))))
    taken = [run(False) for _ in range(count)]
    step_s, host_s = (statistics.median(column) for column in zip(*taken, strict=True))
    refresh_s = statistics.median(run(True)[0] for _ in range(2)) if has_refresh else None
    stats = jax.devices()[0].memory_stats() or {}
    assert isinstance(experiment.model, LlamaConfig)
    flops = training_flops_per_token(experiment.model, figure.seq_len) * batch["tokens"].size
    gap = config.galore.update_proj_gap
    amortised = step_s if refresh_s is None else ((gap - 1) * step_s + refresh_s) / gap
    return {
        "step_s": step_s,
        "refresh_s": refresh_s,
        "amortised_s": amortised,
        "host_s": host_s,
        "tokens_per_second": batch["tokens"].size / amortised,
        "flops_per_second": flops / amortised,
        "peak_bytes": stats.get("peak_bytes_in_use"),
        "plan_bytes": max(plans, default=None),
    }


def measure_update(figure: Figure) -> Row:
    """Times the update of 8-bit Adam and of Optax's on the model's own leaves, in turn."""
    shapes = make_experiment(make_config(figure)).abstract_state().params
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32), shapes)
    row: Row = {"values": sum(x.size for x in jax.tree.leaves(shapes))}
    params = jax.tree.map(lambda x: jnp.ones(x.shape), shapes)
    for name, tx in (("adamw", optax.adamw(1e-3)), ("adamw8bit", adamw8bit(1e-3))):
        state = tx.init(params)
        row[f"{name}_state_bytes"] = tree_bytes(state)
        update = jax.jit(tx.update, donate_argnums=(0, 1))
        taken = []
        for _ in range(8):
            gradients = jax.block_until_ready(jax.tree.map(lambda x: 2 * x, params))
            begun = time.perf_counter()
            _, state = jax.block_until_ready(update(gradients, state, params))
            taken.append(time.perf_counter() - begun)
        row[f"{name}_s"] = statistics.median(taken[1:])
    # Read and written: the gradient, the update, and the state twice.
    for name in ("adamw", "adamw8bit"):
        moved = 8 * row["values"] + 2 * row[f"{name}_state_bytes"]
        row[f"{name}_bytes_per_second"] = moved / row[f"{name}_s"]
    return row


def measure_input(figure: Figure) -> Row:
    """Times batches of the offline sample alone, as a run reads them."""
    config = DataConfig("sample", None, None, seq_len=figure.seq_len, packing=True)
    data = TextData(config, vocab_size=32_000)
    sequences = max(figure.tokens // figure.seq_len, 1)
    with data.train_batches(batch_size=sequences, seed=0) as batches:
        for _ in range(10):
            next(batches)
        begun, count = time.perf_counter(), 0
        while time.perf_counter() - begun < 5:
            count += next(batches)["tokens"].size
        return {"tokens_per_second": count / (time.perf_counter() - begun)}


def find_device(figure: Figure) -> Row:
    """What the device is; in a process of its own, as it takes the device's memory."""
    del figure
    return {"platform": jax.default_backend(), "device_kind": jax.devices()[0].device_kind}


MEASURES = {
    "device": find_device,
    "step": measure_step,
    "update": measure_update,
    "input": measure_input,
}


def figures(arguments: argparse.Namespace, platform: str) -> list[Figure]:
    """What to measure, the telling ones first."""
    models = arguments.models or (["60m", "350m"] if arguments.quick else ["60m", "350m", "1b"])
    names = QUICK if arguments.quick else tuple(METHODS)
    tokens = {model: arguments.tokens or 256 * SEQUENCES[model] for model in models}
    found = [Figure("input", models[0], "AdamW", 256, None, tokens[models[0]])]
    found += [Figure("update", models[0], "AdamW", 256, None, tokens[models[0]])]
    for model in models:
        methods = names if model != "7b" else [x for x in names if "layerwise" in x]
        found += [Figure("step", model, name, 256, None, tokens[model]) for name in methods]
    if platform == "gpu" and not arguments.quick:
        for seq_len in (256, 2048):
            for attention in ("xla", "cudnn"):
                size = max(tokens[models[0]], 8 * seq_len)
                found.append(
                    Figure("step", models[0], "GaLore, projected", seq_len, attention, size)
                )
    return found


def measure(figure: Figure) -> subprocess.CompletedProcess[str]:
    """Measures in a process of its own, whose last line is the row."""
    command = [sys.executable, __file__, f"--figure={json.dumps(dataclasses.asdict(figure))}"]
    # Threads of BLAS in each of XLA's would slow decompositions on a CPU down, see docs/galore.md.
    environment = {"OPENBLAS_NUM_THREADS": "1", **os.environ}
    return subprocess.run(command, check=False, capture_output=True, text=True, env=environment)


def take(figure: Figure, file: Path, round_number: int) -> None:
    """Measures a figure and notes it, or says that it failed."""
    done = measure(figure)
    label = (
        f"{figure.kind} {figure.model} {figure.method} {figure.seq_len} {figure.attention or ''}"
    )
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or ["no message"]
        print(f"{label}: failed: {lines[-1][:200]}", flush=True)
        return
    row = json.loads(done.stdout.splitlines()[-1])
    row |= {"figure": dataclasses.asdict(figure), "round": round_number}
    with file.open("a") as log:
        log.write(json.dumps(row) + "\n")
    shown = {k: f"{v:.4g}" for k, v in row.items() if isinstance(v, float)}
    print(f"{label}: " + ", ".join(f"{k} {v}" for k, v in shown.items()), flush=True)


def read_rows(file: Path) -> list[Row]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


def median(rows: list[Row], key: str) -> float | None:
    values = [row[key] for row in rows if row.get(key) is not None]
    return statistics.median(values) if values else None


def step_table(rows: list[Row], peak: Peak | None) -> list[str]:
    columns = "model | method | tokens x length | attention | step, ms | refresh, ms | tokens/s"
    columns += " | to AdamW | MFU | peak, GiB | plan, GiB | host, ms"
    lines = [f"| {columns} |", "|---" * len(columns.split("|")) + "|"]
    groups: dict[str, list[Row]] = {}
    for row in rows:
        if row["figure"]["kind"] == "step":
            groups.setdefault(json.dumps(row["figure"]), []).append(row)
    speed = {key: median(group, "tokens_per_second") for key, group in groups.items()}
    for key, group in groups.items():
        figure = Figure(**json.loads(key))
        base = dataclasses.replace(figure, method="AdamW", attention=None)
        reference = speed.get(json.dumps(dataclasses.asdict(base)))
        flops = median(group, "flops_per_second")
        number = lambda name, per, of=group: (  # noqa: E731
            "" if median(of, name) is None else f"{median(of, name) * per:,.2f}"  # pyright: ignore
        )
        ratio = "" if not reference else f"{reference / speed[key]:.3f}"  # pyright: ignore
        mfu = "" if peak is None or flops is None else f"{flops / peak.flops:.1%}"
        cells = [figure.model, figure.method, f"{figure.tokens} x {figure.seq_len}"]
        cells += [figure.attention or "default", number("step_s", 1e3), number("refresh_s", 1e3)]
        cells += [f"{speed[key]:,.0f}", ratio, mfu, number("peak_bytes", 2**-30)]
        cells += [number("plan_bytes", 2**-30), number("host_s", 1e3)]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def other_lines(rows: list[Row], peak: Peak | None) -> list[str]:
    lines = []
    for kind in ("update", "input"):
        of_kind = [row for row in rows if row["figure"]["kind"] == kind]
        if not of_kind:
            continue
        if kind == "input":
            lines.append(f"- Input alone: {median(of_kind, 'tokens_per_second'):,.0f} tokens/s.")
            continue
        for name in ("adamw", "adamw8bit"):
            rate, seconds = (median(of_kind, f"{name}_{x}") for x in ("bytes_per_second", "s"))
            assert rate is not None
            share = "" if peak is None else f", {rate / peak.bandwidth:.0%} of the card's"
            lines.append(
                f"- Update by {name} of {of_kind[0]['values'] / 1e6:.1f}M values: "
                f"{1e3 * (seconds or 0):.2f} ms, {rate / 1e9:,.3g} GB/s{share}."
            )
    return lines


def plot(rows: list[Row], file: Path) -> None:
    """Bars of tokens a second by method, for each model."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    steps = [
        row for row in rows if row["figure"]["kind"] == "step" and not row["figure"]["attention"]
    ]
    models = list(dict.fromkeys(row["figure"]["model"] for row in steps))
    figure, panels = pyplot.subplots(
        1, len(models), figsize=(5 * len(models), 3.5), layout="constrained", squeeze=False
    )
    for axes, model in zip(panels[0], models, strict=True):
        mine = [row for row in steps if row["figure"]["model"] == model]
        names = list(dict.fromkeys(row["figure"]["method"] for row in mine))[::-1]
        speeds = [
            median([row for row in mine if row["figure"]["method"] == name], "tokens_per_second")
            for name in names
        ]
        axes.barh(
            names, speeds, color=["#8a8f98" if "GaLore" not in x else "#2f87ab" for x in names]
        )
        axes.set(title=f"LLaMA {model}", xlabel="tokens a second")
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=150)
    print(f"written: {file}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="at most about eight minutes")
    parser.add_argument("--models", choices=SEQUENCES, nargs="+")
    parser.add_argument("--tokens", type=int, help="a step's, for every model")
    parser.add_argument("--rounds", type=int, default=None, help="default: 3, or 1 with --quick")
    parser.add_argument("--out", type=Path, help="the Markdown table to write")
    parser.add_argument("--plot", type=Path, help="a .png or .svg file")
    parser.add_argument("--figure", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.figure is not None:
        figure = Figure(**json.loads(arguments.figure))
        print(json.dumps(MEASURES[figure.kind](figure)))
        return
    if arguments.out is None:
        parser.error("give --out=FILE.md")
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    file, begun = arguments.out.with_suffix(".jsonl"), time.monotonic()
    found = measure(Figure("device", "60m", "AdamW", 256, None, 0))
    if found.returncode != 0:
        raise SystemExit(found.stderr)
    device = json.loads(found.stdout.splitlines()[-1])
    wanted = figures(arguments, device["platform"])
    for number in range(arguments.rounds or (1 if arguments.quick else 3)):
        for figure in wanted[:: -1 if number % 2 else 1]:
            key = {"figure": dataclasses.asdict(figure), "round": number}
            if any(all(row[k] == v for k, v in key.items()) for row in read_rows(file)):
                continue
            if arguments.quick and time.monotonic() - begun > SECONDS:
                print("seven minutes are over: the rest is left out; run again to go on")
                break
            take(figure, file, number)
    rows, peak = read_rows(file), find_peak(device["device_kind"])
    lines = [
        f"# {device['device_kind']}",
        "",
        "    " + shlex.join(["python", "benchmarks/card.py", *sys.argv[1:]]),
        "",
        f"jax {importlib.metadata.version('jax')}, {os.cpu_count()} CPU cores.",
        "",
        *step_table(rows, peak),
        "",
        *other_lines(rows, peak),
        "",
    ]
    arguments.out.write_text("\n".join(lines))
    print(f"written: {arguments.out}")
    if arguments.plot is not None:
        plot(rows, arguments.plot)


if __name__ == "__main__":
    main()
