"""Times a refresh at the paper's shapes, and measures what each projector captures.

  PYTHONPATH=. OPENBLAS_NUM_THREADS=1 python benchmarks/refresh.py --out=docs/refresh.md

Five minutes on two CPU cores, and before it, once, the three of a run of ``train.py`` on the sample
in a folder under ``--workdir``, whose gradients serve: those of a model that has hardly begun have
nearly rank 1. OpenBLAS, SciPy's and so jaxlib's LAPACK, has threads of its own that wait by
spinning: while other work wants the cores, each call takes up to a thousand times as long.
"""

import argparse
import functools
import importlib.metadata
import itertools
import json
import os
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
from ml_collections import ConfigDict
from sample_runs import train

from configs import llama as llama_configs
from galore_jax import galore
from galore_jax.diagnostics import captured_energy, overlap, stable_rank
from galore_jax.galore import GaLore
from galore_jax.models.presets import PRESETS
from galore_jax.projection import MatrixSpec, projected_side
from galore_jax.projectors import ProjectorMethod, find_projector
from galore_jax.training.checkpoints import Checkpoints
from galore_jax.training.experiment import make_experiment

RANKS = {"llama_60m": 128, "llama_130m": 256, "llama_350m": 256, "llama_1b": 512}
SEQUENCES, LENGTH = 16, 256
TOKENS = SEQUENCES * LENGTH
KERNELS = ("q_proj", "gate_proj")
NEVER = 1_000_000
SLOW = 2.0  # seconds
OPTAX = "optax.contrib.galore"


class Method(NamedTuple):
    """A way to compute a projector, with its number of rounds."""

    projector: ProjectorMethod
    rounds: int = 1

    @property
    def name(self) -> str:
        """For the tables."""
        return self.projector if self.rounds == 1 else f"{self.projector} x{self.rounds}"


METHODS = (
    Method("svd"),
    Method("eigh"),
    Method("subspace_iteration"),
    Method("subspace_iteration", 2),
    Method("randomized"),
    Method("random"),
)
ITERATED = [method for method in METHODS if method.projector == "subspace_iteration"]


class Case(NamedTuple):
    """A gradient, and the projector that an earlier one left: a row of the tables."""

    label: str
    gradient: jax.Array
    old: jax.Array


class Row(NamedTuple):
    """The measurements of a case.

    Attributes:
      case: the gradient that was measured.
      seconds: by name of the method.
      share: the part of the gradient's energy that SVD's projector captures.
      energy: what each method captures from a cold start, relative to ``share``.
      warm: the same from the old projector.
      overlap: the overlap of SVD's projector and the old one.
    """

    case: Case
    seconds: dict[str, float]
    share: float
    energy: dict[str, float]
    warm: dict[str, float]
    overlap: float


def interleaved(
    calls: dict[str, Callable[[], Any]], repeats: int, of_slow: int
) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """Calls each in turn, slow ones less often: the seconds taken, and what each returned."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    found = {}
    for i, (name, call) in itertools.product(range(repeats), calls.items()):
        if i < of_slow or taken[name][0] < SLOW:
            begun = time.perf_counter()
            found[name] = jax.block_until_ready(call())
            taken[name].append(time.perf_counter() - begun)
    return taken, found


def compute_projector(method: Method, gradient: jax.Array, old: jax.Array) -> Any:
    """The projector of the smaller side, as by default."""
    return find_projector(
        method.projector,
        gradient,
        old.shape[-1],
        projected_side(gradient.shape),
        old=old,
        key=jax.random.key(1),
        power_iterations=method.rounds,
    )


def optax_updates(tx: optax.GradientTransformation, gradients: Any) -> list[Callable[[], Any]]:
    """Optax's update with a refresh (count 0), and the same program without one (count 1)."""
    state: Any = tx.init(gradients)
    executable = jax.jit(lambda *of: tx.update(*of)).lower(gradients, state).compile()
    later = state._replace(count=state.count + 1)
    return [functools.partial(executable, gradients, of) for of in (state, later)]


def sample_gradients(workdir: Path) -> tuple[Any, Any]:
    """Gradients of the blocks for two batches, at the end of a run on the sample."""
    folder = workdir / "sample"
    if train("configs/sample.py", folder, {}) != 0:
        raise SystemExit(f"{folder}: the run failed")
    experiment = make_experiment(ConfigDict(json.loads((folder / "config.json").read_text())))
    model, task = experiment.stages, experiment.task
    with Checkpoints(folder / "checkpoints", keep=1) as checkpoints:
        restored = checkpoints.restore(experiment.abstract_state())
    assert restored is not None

    def loss(params: Any, batch: Any) -> jax.Array:
        return task.loss(model.forward(params, batch), batch) / task.count(batch)

    sequences = TOKENS // experiment.config.data.seq_len
    gradient = jax.jit(jax.grad(loss))
    with task.open_data().train_batches(batch_size=sequences, seed=1) as batches:
        before, last = (
            gradient(restored.state.params, jax.tree.map(jnp.asarray, next(batches)))["blocks"]
            for _ in range(2)
        )
    return kernels(before), kernels(last)


def kernels(blocks: Any) -> dict[str, jax.Array]:
    """The seven stacks of matrices, by name."""
    stacks = {**blocks["attn"], **blocks["mlp"]}
    return {name: stack["kernel"] for name, stack in stacks.items()}


def energies_of_sample(before: Any, last: Any) -> tuple[dict[str, list[str]], str]:
    """Energies that each method captures of the sample's matrices: cells by method."""
    captured = jax.jit(captured_energy)

    def shares(method: Method, starts: dict[str, Any]) -> tuple[np.ndarray, dict]:
        find = jax.jit(functools.partial(compute_projector, method))
        projectors = {name: find(gradient, starts[name]) for name, gradient in last.items()}
        found = [captured(gradient, projectors[name]) for name, gradient in last.items()]
        return np.concatenate(found), projectors

    zeros: dict[str, Any] = {
        name: jnp.zeros(MatrixSpec.of_kernel(g.shape, 64).projector_shape, g.dtype)
        for name, g in last.items()
    }
    exact, projectors = shares(METHODS[0], zeros)
    find = jax.jit(functools.partial(compute_projector, METHODS[0]))
    old: dict[str, Any] = {name: find(gradient, zeros[name]) for name, gradient in before.items()}
    cells = {}
    for method in METHODS:
        cold = shares(method, zeros)[0] / exact
        warm = shares(method, old)[0] / exact if method in ITERATED else cold
        cells[method.name] = [f"{of.mean():.4f}, {of.min():.4f}" for of in (cold, warm)]
    ranks = np.concatenate([stable_rank(gradient) for gradient in last.values()])
    common = np.concatenate([overlap(projectors[name], old[name]) for name in last])
    kept = np.concatenate([captured(gradient, old[name]) for name, gradient in last.items()])
    return cells, (
        f"SVD's projectors capture {exact.mean():.3f} of the energy of the {len(exact)} gradients "
        f"on average and {exact.min():.3f} of\none; the old projectors still capture "
        f"{(kept / exact).mean():.3f} of that. Stable ranks are {ranks.min():.1f} to\n"
        f"{ranks.max():.1f}, and the overlap of old and exact projectors is {common.mean():.2f}."
    )


def model_table(repeats: int, energies: dict[str, list[str]]) -> list[str]:
    """Every matrix of the 60M model refreshed, against a training step of it."""
    config: Any = llama_configs.get_config("60m")
    config.batch_size = config.micro_batch_size = SEQUENCES
    config.dtype = config.param_dtype = "float32"
    config.projected_gradients = False
    config.data.update(name="sample", seq_len=LENGTH, packing=True)
    experiment = make_experiment(config)
    model, task, steps = experiment.stages, experiment.task, experiment.train_steps()
    with task.open_data().train_batches(batch_size=SEQUENCES, seed=0) as batches:
        batch = jax.tree.map(jnp.asarray, next(batches))
    state = jax.jit(experiment.init)(jax.random.key(0))
    state, _ = jax.jit(steps[True])(state, batch)
    step = jax.jit(steps[False]).lower(state, batch).compile()

    gradients = jax.jit(jax.grad(lambda p: task.loss(model.forward(p, batch), batch)))(state.params)
    gradients = kernels(gradients["blocks"])

    def transformation(method: Method) -> GaLore:
        """Plain SGD in GaLore: the refresh is the same, and Adam's time would hide it."""
        return galore(
            optax.sgd(1.0),
            rank=RANKS["llama_60m"],
            update_proj_gap=NEVER,
            projector=method.projector,
            power_iterations=method.rounds,
            target_modules="proj",
        )

    tx = transformation(METHODS[2])
    start = tx.init(gradients)
    calls: dict[str, Callable[[], Any]] = {"step": functools.partial(step, state, batch)}
    for method in METHODS:
        update = functools.partial(transformation(method).update, refresh=True)
        calls[method.name] = functools.partial(
            jax.jit(update).lower(gradients, start).compile(), gradients, start
        )
    _, after = calls[METHODS[2].name]()
    update = jax.jit(functools.partial(tx.update, refresh=False))
    calls["without"] = functools.partial(update.lower(gradients, after).compile(), gradients, after)
    layers = [matrix for stack in gradients.values() for matrix in stack]
    theirs = optax.contrib.scale_by_galore(
        RANKS["llama_60m"], NEVER, base_optimizer=optax.identity()
    )
    calls[OPTAX], calls["without, optax"] = optax_updates(theirs, layers)
    taken, _ = interleaved(calls, repeats, 3)
    seconds = {name: statistics.median(times) for name, times in taken.items()}
    print(", ".join(f"{name} {of:.2f} s" for name, of in seconds.items()), flush=True)
    lines = [
        f"One training step took {seconds['step']:.2f} s.",
        "",
        "| projector | seconds | training steps | energy, cold | energy, warm |",
        "|---|---|---|---|---|",
    ]
    for name in (*(method.name for method in METHODS), OPTAX):
        of = seconds[name] - seconds["without, optax" if name == OPTAX else "without"]
        cells = energies[METHODS[0].name if name == OPTAX else name]
        of = max(of, 0.0)  # random costs less than the noise
        cells = [f"{of:.2f}", f"{of / seconds['step']:.2f}", *cells]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def cases(before: Any, last: Any, models: Sequence[str]) -> list[Case]:
    """An attention's and an MLP's gradient of the sample's model, and the like at other sizes.

    These have random singular vectors, the real singular values interpolated over the relative
    index, and an old projector that overlaps with the exact one as the real one does.
    """
    found = []
    for kernel in KERNELS:
        gradient, earlier = (of[kernel][len(of[kernel]) // 2] for of in (last, before))
        old = compute_projector(METHODS[0], earlier, jnp.zeros((len(gradient), 64)))
        found.append(Case("sample", gradient, old))
    rng = np.random.default_rng(0)
    for model in models:
        config, rank = PRESETS[model], RANKS[model]
        for like, n in zip(found[:2], (config.hidden_size, config.intermediate_size), strict=True):
            m = config.hidden_size
            measured = np.linalg.svd(like.gradient, compute_uv=False)
            places = np.linspace(0, 1, m), np.linspace(0, 1, len(measured))
            values = np.exp(np.interp(*places, np.log(measured))).astype(np.float32)
            u, v = (np.linalg.qr(rng.standard_normal((s, m), np.float32))[0] for s in (m, n))
            real = compute_projector(METHODS[0], like.gradient, like.old)
            common = float(overlap(real, like.old))
            noise = rng.standard_normal((m, rank), np.float32) / np.float32(np.sqrt(m))
            old, _ = np.linalg.qr(np.sqrt(common) * u[:, :rank] + np.sqrt(1 - common) * noise)
            label = model.removeprefix("llama_").upper()
            found.append(Case(label, jnp.asarray((u * values) @ v.T), jnp.asarray(old)))
    return found


def measure(case: Case, repeats: int) -> Row:
    """Times and captured energies for one matrix."""
    zeros = jnp.zeros_like(case.old)
    executables = {
        method: jax.jit(functools.partial(compute_projector, method))
        .lower(case.gradient, zeros)
        .compile()
        for method in METHODS
    }
    calls: dict[str, Callable[[], Any]] = {
        method.name: functools.partial(executable, case.gradient, zeros)
        for method, executable in executables.items()
    }
    tx = optax.contrib.scale_by_galore(zeros.shape[-1], NEVER, base_optimizer=optax.identity())
    calls[OPTAX], calls["without"] = optax_updates(tx, case.gradient)
    taken, found = interleaved(calls, repeats, 1)
    seconds = {name: statistics.median(times) for name, times in taken.items()}
    seconds[OPTAX] -= seconds.pop("without")
    found[OPTAX] = found[OPTAX][1].projector
    of_each = ", ".join(f"{name} {of:.3f} s" for name, of in seconds.items())
    print(f"{case.label} {case.gradient.shape}: {of_each}", flush=True)

    captured = jax.jit(captured_energy)
    share = float(captured(case.gradient, found["svd"]))
    warm = {
        method.name: captured(case.gradient, executables[method](case.gradient, case.old))
        for method in ITERATED
    }
    return Row(
        case,
        seconds,
        share,
        {name: float(captured(case.gradient, found[name])) / share for name in seconds},
        {name: float(energy) / share for name, energy in warm.items()},
        float(overlap(found["svd"], case.old)),
    )


def matrix_tables(rows: Sequence[Row]) -> list[str]:
    names = list(rows[0].seconds)
    iterated = [method.name for method in ITERATED]
    others = [name for name in names if name not in ("svd", *iterated)]
    starts = [f"{name}, {start}" for name in iterated for start in ("cold", "warm")]
    times = head("matrix", "r", *names, "svd, seconds")
    energy = head("matrix", "r", "overlap", "svd", *starts, *others)
    for row in rows:
        m, n = row.case.gradient.shape
        first = f"| {row.case.label}, {m} x {n} | {row.case.old.shape[-1]} | "
        exact = row.seconds["svd"]
        ratios = [f"{row.seconds[name] / exact:.3f}" for name in names]
        times.append(first + " | ".join([*ratios, f"{exact:.3f}"]) + " |")
        shares = [of[name] for name in iterated for of in (row.energy, row.warm)]
        shares = [row.share, *shares, *(row.energy[name] for name in others)]
        cells = [f"{row.overlap:.2f}", *(f"{share:.4f}" for share in shares)]
        energy.append(first + " | ".join(cells) + " |")
    return [
        "## One matrix: seconds as a ratio to exact SVD's",
        "",
        *times,
        "",
        "## One matrix: captured energy as a ratio to exact SVD's",
        "",
        "The column svd has the share of the gradient's energy that exact SVD captures, the column",
        "overlap the overlap of its projector with the old one.",
        "",
        *energy,
    ]


def head(*names: str) -> list[str]:
    return ["| " + " | ".join(names) + " |", "|---" * len(names) + "|"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=list(RANKS), default=list(RANKS))
    parser.add_argument("--repeats", type=int, default=5, help=f"of what takes below {SLOW:g} s")
    parser.add_argument("--workdir", type=Path, default=Path("runs/refresh"))
    parser.add_argument("--out", type=Path, required=True, help="the Markdown tables to write")
    arguments = parser.parse_args()
    arguments.out.parent.mkdir(parents=True, exist_ok=True)

    before, last = sample_gradients(arguments.workdir)
    energies, summary = energies_of_sample(before, last)
    print(summary, *energies.items(), sep="\n", flush=True)
    of_model = model_table(arguments.repeats, energies)
    rows = [measure(case, arguments.repeats) for case in cases(before, last, arguments.models)]
    threads = os.environ.get("OPENBLAS_NUM_THREADS")
    prefix = f"OPENBLAS_NUM_THREADS={threads} " if threads else ""
    version, load = importlib.metadata.version("jax"), os.getloadavg()[0]
    text = f"""# What a refresh costs, and what each projector captures

    PYTHONPATH=. {prefix}{shlex.join(["python", "benchmarks/refresh.py", *sys.argv[1:]])}

jax {version}, {os.cpu_count()} CPU cores, OpenBLAS threads: {threads or "its default"}. The load
average was {load:.1f}, this run's included. On a shared machine only ratios tell anything: they are
taken within one process, which calls the methods in turn, and a training step, which keeps every
core busy, is slowed down most. Times are medians of {arguments.repeats} calls; where a call takes
over {SLOW:g} s, of 3 for the whole model and of 1 for one matrix. `x2` stands for
`power_iterations=2`, the default; the other rows have 1. The row `{OPTAX}` is its
compiled update with a refresh minus the same program's without one; it takes the vectors of the
larger side, from exact SVD.

A *cold* start has no projector before it, a *warm* one has the exact projector of another batch's
gradient. The gradients are real ones, of {TOKENS} tokens, in the blocks of the sample's
9M-parameter LLaMA after its 600 updates (`python train.py`): 6 layers x 7 kernels, rank 64 of 256.

## Every matrix of the 60M model

The model has 8 layers x 7 kernels, and the rank is 128 of 512. The time of a refresh is that of
`galore(...).update` with `refresh=True` minus that with `refresh=False`, beside a training step
(forward, backward, update; float32, {SEQUENCES} x {LENGTH} tokens). Energies are relative to exact
SVD's, the mean and the least of the sample's model.

{summary}

"""
    note = """
Rows named sample are real gradients of its middle block, `q_proj` and `gate_proj`. The others are
synthetic: random singular vectors, singular values interpolated from these two over the relative
index, and an old projector that is the exact one plus noise, of about their overlap. Noise that
spares no direction is easier to undo than a change of batch: for *warm* see the real rows.
"""
    lines = [*of_model, note, *matrix_tables(rows), ""]
    arguments.out.write_text(text + "\n".join(lines))


if __name__ == "__main__":
    main()
