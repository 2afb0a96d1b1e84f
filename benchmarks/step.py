"""Time and FLOPs of whole training steps: full-rank AdamW, optax.contrib.galore, GaLore's modes.

  PYTHONPATH=. OPENBLAS_NUM_THREADS=1 python benchmarks/step.py --model=60m --tokens=2048

Prints a Markdown table. All steps are the trainer's own, float32, on one batch of random tokens, in
sequences of 256 and in one micro-batch. They are called in turn in one process, every other round
in the opposite order; a ratio is the median of the rounds' ratios. Where other work wants the
cores, the ratio of the CPU time, of all threads together, is steadier than that of the time.

adamw                 optax.adamw on the full gradients
optax.contrib.galore  on the blocks' matrices under jax.vmap over the layers, which is faster than a
                      list of layers; AdamW on the other weights. Its SVD is in the same program.
galore                this package's, on full gradients
galore projected      ... on gradients that are born projected
galore layerwise      ... and one layer's update at a time, which computes each block twice
gradients             loss and gradients alone, without an optimizer
gradients projected   ... of which those of the blocks' matrices are born projected

The rank is the config's. A step with a refresh is timed apart, in the first rounds only;
"amortised" is the mean over 200 steps of which one does.

GFLOPs are the compiler's count for a step without a refresh. It counts the body of a loop
once, however often that runs. So the step is compiled twice, with the loops over the layers as they
are and with two layers in an iteration; the difference is one layer, forward and backward, and is
added once for every layer but the first. The loss is compiled with all tokens in one chunk.
"""

import argparse
import dataclasses
import functools
import os
import statistics
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import optax
import optax.contrib

from configs import llama as llama_configs
from galore_jax import projected_value_and_grad
from galore_jax.models.stages import KERNELS
from galore_jax.training.config import Config
from galore_jax.training.experiment import Experiment, make_experiment
from galore_jax.training.optimizer import make_schedule
from galore_jax.training.tasks import Batch

LENGTH = 256  # tokens a sequence
EVERY = 200  # steps between two refreshes
REFRESHES = 2  # rounds that time one too
OPTAX = "optax.contrib.galore"
STEPS = ("adamw", OPTAX, "galore", "galore projected", "galore layerwise", "gradients")
# The rows, and what each is compared with.
REFERENCE = dict.fromkeys(STEPS, "adamw") | {"gradients projected": "gradients"}
COLUMNS = "step | compared with | time | least to most | CPU time | refresh | amortised | s"

Call = Callable[[Any, Batch], tuple[Any, Any]]  # of state and batch: new state, the rest
Taken = dict[tuple[str, bool], list[tuple[float, float]]]  # seconds and CPU seconds of each round


def make_config(model: str, tokens: int, name: str) -> Config:
    method = "galore" if name.startswith("galore") or name.endswith("projected") else "full"
    config: Config = llama_configs.get_config(f"{model},method={method}")
    config.batch_size = config.micro_batch_size = tokens // LENGTH
    config.data.seq_len = LENGTH
    config.dtype = config.param_dtype = "float32"
    config.galore.update_proj_gap = EVERY
    config.projected_gradients = method == "galore" and name != "galore"
    config.updates = "layerwise" if name == "galore layerwise" else "standard"
    return config


def adamw(config: Config) -> optax.GradientTransformationExtraArgs:
    tx = optax.adamw(make_schedule(config), weight_decay=config.optimizer.weight_decay)
    return optax.with_extra_args_support(tx)


def optax_galore(config: Config) -> optax.GradientTransformationExtraArgs:
    """Optax's GaLore for stacked blocks, of which it projects the kernels."""
    block_tx = optax.contrib.galore(
        make_schedule(config),
        rank=config.galore.rank,
        update_proj_gap=config.galore.update_proj_gap,
        scale=config.galore.scale,
        weight_decay=config.optimizer.weight_decay,
    )
    others_tx: Any = adamw(config)

    def split(params: Any) -> tuple[Any, Any]:
        return params["blocks"], {k: v for k, v in params.items() if k != "blocks"}

    def axes(blocks: Any) -> Any:
        """0 for the arrays of a block's state, None for its counts: those stay scalars."""
        state = jax.eval_shape(block_tx.init, jax.tree.map(lambda x: x[0], blocks))
        return jax.tree.map(lambda x: 0 if x.ndim else None, state)

    def init(params: Any) -> Any:
        blocks, others = split(params)
        return jax.vmap(block_tx.init, out_axes=axes(blocks))(blocks), others_tx.init(others)

    def update(updates: Any, state: Any, params: Any = None, **_: Any) -> tuple[Any, Any]:
        (blocks, others), (weights, other_weights) = split(updates), split(params)
        update_layers = jax.vmap(block_tx.update, (0, axes(blocks), 0), (0, axes(blocks)))
        blocks, block_state = update_layers(blocks, state[0], weights)
        others, other_state = others_tx.update(others, state[1], other_weights)
        return {**others, "blocks": blocks}, (block_state, other_state)

    return optax.GradientTransformationExtraArgs(init, update)


def with_count_zero(state: Any) -> Any:
    """The state of ``optax_galore`` at which it refreshes."""
    (galore, *rest), others = state.opt_state
    galore = galore._replace(count=jnp.zeros_like(galore.count))
    return state._replace(opt_state=((galore, *rest), others))


def make_gradients(experiment: Experiment) -> Callable[[Any, Batch], Any]:
    model, task = experiment.stages, experiment.task

    def loss(params: Any, batch: Batch) -> jax.Array:
        return task.loss(model.forward(params, batch), batch) / task.count(batch)

    def gradients(state: Any, batch: Batch) -> Any:
        if experiment.mode.projected:
            value_and_grad = projected_value_and_grad(loss, kernels=KERNELS)
            return value_and_grad(state.params, state.opt_state, batch)
        return jax.value_and_grad(loss)(state.params, batch)

    return gradients


def make_steps(name: str, config: Config) -> tuple[Experiment, dict[bool, Callable[..., Any]]]:
    """The experiment, and the steps with (True) and without (False) a refresh."""
    experiment = make_experiment(config)
    if make_tx := {"adamw": adamw, OPTAX: optax_galore}.get(name):
        experiment = dataclasses.replace(experiment, optimizer=make_tx(config))
    if name.startswith("gradients"):
        return experiment, {False: make_gradients(experiment)}
    return experiment, dict(experiment.train_steps())


def compile_steps(name: str, config: Config, batch: Batch) -> tuple[Any, dict[bool, Call]]:
    """A first state, and the compiled steps, with the state donated."""
    experiment, steps = make_steps(name, config)
    state = jax.jit(experiment.init)(jax.random.key(0))
    if name.startswith("gradients"):
        if experiment.mode.projected:  # no step will compute projectors
            tx: Any = experiment.optimizer
            refresh = jax.jit(tx.refresh)
            state = state._replace(opt_state=refresh(state.params, state.opt_state, state.params))
        program = jax.jit(steps[False]).lower(state, batch).compile()
        return state, {False: lambda state, batch: (state, program(state, batch))}
    calls: dict[bool, Call] = {
        refresh: jax.jit(step, donate_argnums=0).lower(state, batch).compile()
        for refresh, step in steps.items()
    }
    if name == OPTAX:
        calls[True] = lambda state, batch: calls[False](with_count_zero(state), batch)
    return state, calls


def count_gflops(name: str, config: Config, batch: Batch) -> float:
    """GFLOPs of a step without a refresh; see the top of this file."""
    config = config.copy_and_resolve_references()
    config.model.loss_chunk_tokens = batch["tokens"].size
    experiment, steps = make_steps(name, config)
    state, scan, counts = experiment.abstract_state(), jax.lax.scan, []
    for layers in (1, 2):
        step = jax.jit(lambda *arguments: steps[False](*arguments))
        with mock.patch.object(jax.lax, "scan", functools.partial(scan, unroll=layers)):
            cost: Any = step.lower(state, batch).compile().cost_analysis()
        counts.append(cost["flops"])
    return (counts[0] + (config.model.num_layers - 1) * (counts[1] - counts[0])) / 1e9


def measure(
    calls: dict[str, dict[bool, Call]], states: dict[str, Any], batch: Batch, rounds: int
) -> Taken:
    """Times each call in each round; a first round, to warm up, is not counted."""
    taken: Taken = {(name, refresh): [] for name, of in calls.items() for refresh in of}
    for i in range(-1, rounds):
        for name in list(calls)[:: -1 if i % 2 else 1]:
            for refresh in sorted(calls[name], reverse=True):
                if refresh and i >= REFRESHES:
                    continue
                wall, cpu = time.perf_counter(), time.process_time()
                states[name], _ = jax.block_until_ready(calls[name][refresh](states[name], batch))
                spent = time.perf_counter() - wall, time.process_time() - cpu
                if i >= 0:
                    taken[name, refresh].append(spent)
    return taken


def table(taken: Taken, gflops: dict[str, float]) -> list[str]:
    def ratios(name: str, refresh: bool, clock: int) -> list[float]:
        pairs = zip(taken[name, refresh], taken[REFERENCE[name], False], strict=False)
        return [ours[clock] / theirs[clock] for ours, theirs in pairs]

    columns = COLUMNS + (" | GFLOPs" if gflops else "")
    lines = [f"| {columns} |", "|---" * len(columns.split("|")) + "|"]
    for name in dict.fromkeys(name for name, _ in taken):
        of_time = ratios(name, False, 0)
        ratio = statistics.median(of_time)
        cells = [name, REFERENCE[name], f"{ratio:.3f}", f"{min(of_time):.3f} to {max(of_time):.3f}"]
        of_cpu = statistics.median(ratios(name, False, 1))
        refresh = statistics.median(ratios(name, True, 0)) if (name, True) in taken else None
        amortised = refresh and ((EVERY - 1) * ratio + refresh) / EVERY
        cells += [f"{x:.3f}" if x else "" for x in (of_cpu, refresh, amortised)]
        cells.append(f"{statistics.median(wall for wall, _ in taken[name, False]):.2f}")
        cells += [f"{gflops[name]:.1f}"] if gflops else []
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def main() -> None:
    raw = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--model", choices=("60m", "130m"), default="60m")
    parser.add_argument("--tokens", type=int, default=2048, help="a step, a multiple of 256")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", default=",".join(REFERENCE), help="rows, separated by commas")
    parser.add_argument("--skip_flops", action="store_true")
    arguments = parser.parse_args()
    wanted = {name.strip() for name in arguments.only.split(",")}
    if unknown := wanted - set(REFERENCE):
        parser.error(f"--only: {sorted(unknown)} are not among {list(REFERENCE)}")
    if arguments.tokens < LENGTH or arguments.tokens % LENGTH or arguments.rounds < 1:
        parser.error(f"--tokens must be a multiple of {LENGTH}, --rounds at least 1")

    wanted |= {REFERENCE[name] for name in wanted} | {"adamw"}
    gflops, calls, states, batch = {}, {}, {}, {}
    for name in sorted(wanted, key=list(REFERENCE).index):
        config = make_config(arguments.model, arguments.tokens, name)
        shape = config.batch_size, LENGTH + 1
        drawn = jax.random.randint(jax.random.key(1), shape, 0, config.model.vocab_size)
        batch = {"tokens": drawn[:, :-1], "targets": drawn[:, 1:]}
        if not arguments.skip_flops:
            gflops[name] = count_gflops(name, config, batch)
        states[name], calls[name] = compile_steps(name, config, batch)
    taken = measure(calls, states, batch, arguments.rounds)
    device = f"{jax.devices()[0].device_kind} ({os.cpu_count()} cores)"
    run = f"LLaMA {arguments.model}, {arguments.tokens} tokens a step, {arguments.rounds} rounds"
    print(f"jax {jax.__version__}, {device}, {run}\n", *table(taken, gflops), sep="\n")


if __name__ == "__main__":
    main()
