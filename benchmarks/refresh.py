"""Times a change of basis and measures what each basis captures, at the shapes of the paper.

  OPENBLAS_NUM_THREADS=1 python benchmarks/refresh.py --out=docs/refresh.md

Five minutes on two CPU cores. OpenBLAS, behind LAPACK in SciPy and so in jaxlib, has threads of its
own that wait by spinning: where they do not get all the cores, each call takes up to a thousand
times as long, which says nothing about bases. jaxlib runs independent matrices at once anyway.
"""

import argparse
import functools
import importlib.metadata
import itertools
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

from galore_jax import galore
from galore_jax.bases import Basis, find_basis
from galore_jax.data.batches import DataConfig, TextData
from galore_jax.diagnostics import captured_energy, overlap, stable_rank
from galore_jax.models.presets import PRESETS
from galore_jax.projection import Side, empty_projector, projected_side
from galore_jax.selection import is_projected
from galore_jax.training.steps import TrainState, init_state, make_train_step

RANKS = {"llama_60m": 128, "llama_130m": 256, "llama_350m": 256, "llama_1b": 512}
TARGETS = ("attn", "mlp")
SEQUENCES, LENGTH = 16, 256
TRAIN_STEPS = 6
NEVER = 1_000_000
SLOW = 4.0  # seconds from which a method is timed once
OPTAX = "optax.contrib.galore"


class Method(NamedTuple):
    """A basis with its number of rounds."""

    basis: Basis
    rounds: int = 1

    @property
    def name(self) -> str:
        """For the head of a column."""
        return self.basis if self.rounds == 1 else f"{self.basis}, {self.rounds} rounds"


METHODS = (
    Method("svd"),
    Method("eigh"),
    Method("subspace_iteration"),
    Method("subspace_iteration", 2),
    Method("randomized"),
    Method("random"),
)
ITERATED = [method for method in METHODS if method.basis == "subspace_iteration"]


class Recorded(NamedTuple):
    """State that keeps the last gradients."""

    gradients: Any


class Training(NamedTuple):
    """Some steps of the 60M model: what it leaves.

    Attributes:
      state: the last.
      before: gradients of the step before the last.
      last: gradients of the last step.
      seconds: of one step.
      loss: of the first step and of the last.
    """

    state: TrainState
    before: Any
    last: Any
    seconds: float
    loss: tuple[float, float]


class Case(NamedTuple):
    """A gradient, the gradient of the step before it, and its place in the tables."""

    model: str
    last: jax.Array
    before: jax.Array
    rank: int
    source: str

    @property
    def side(self) -> Side:
        """The smaller one, as by default."""
        return projected_side(self.last.shape)

    @property
    def label(self) -> str:
        """For the first column."""
        m, n = self.last.shape
        return f"{self.model.removeprefix('llama_').upper()} {m} x {n}, r = {self.rank}"


def record() -> optax.GradientTransformation:
    return optax.GradientTransformation(
        lambda params: Recorded(jax.tree.map(jnp.zeros_like, params)),
        lambda updates, state, params=None: (updates, Recorded(updates)),
    )


def seconds_of(call: Callable[[], Any]) -> float:
    begun = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - begun


def interleaved(calls: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median seconds of each, all called in turn; those that are slow only once."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for _, (name, call) in itertools.product(range(repeats), calls.items()):
        if not taken[name] or taken[name][0] < SLOW:
            taken[name].append(seconds_of(call))
    return {name: statistics.median(times) for name, times in taken.items()}


def compiled(function: Callable[..., Any], *arguments: Any) -> Callable[[], Any]:
    """A call of it; fast ones are run once to warm up."""
    executable = jax.jit(function).lower(*arguments).compile()
    return lambda: executable(*arguments)


def train() -> Training:
    """Trains the 60M model on the sample."""
    model = PRESETS["llama_60m"]
    data = TextData(
        DataConfig("sample", data_dir=None, tokenizer=None, seq_len=LENGTH, packing=True),
        vocab_size=model.vocab_size,
    )
    tx = galore(
        optax.adamw(2e-3),
        rank=RANKS["llama_60m"],
        update_proj_gap=NEVER,
        target_modules=TARGETS,
        basis="subspace_iteration",
    )
    tx = optax.with_extra_args_support(optax.chain(record(), tx))
    state = jax.jit(functools.partial(init_state, model, tx))(jax.random.key(0))
    batches = data.train_batches(batch_size=SEQUENCES, seed=0)
    step = make_train_step(model, tx, optax.constant_schedule(2e-3), micro_batches=1)
    batch = jax.tree.map(jnp.asarray, next(batches))
    run = jax.jit(step, donate_argnums=0).lower(state, batch).compile()
    times, losses, gradients = [], [], None
    for i in range(TRAIN_STEPS):
        before = gradients
        begun = time.perf_counter()
        state, metrics = jax.block_until_ready(run(state, batch))
        times.append(time.perf_counter() - begun)
        losses.append(float(metrics["loss"]))
        gradients = jax.tree.map(np.asarray, state.opt_state[0].gradients)
        print(f"60M, step {i}: loss {losses[-1]:.3f}, {times[-1]:.2f} s", flush=True)
        batch = jax.tree.map(jnp.asarray, next(batches))
    batches.close()
    # The first step changes the bases too.
    return Training(state, before, gradients, statistics.median(times[1:]), (losses[0], losses[-1]))


def stacks(tree: Any) -> list[jax.Array]:
    """The (L, m, n) leaves that are projected."""
    selected = is_projected(tree, TARGETS)
    return [
        leaf
        for leaf, wanted in zip(jax.tree.leaves(tree), jax.tree.leaves(selected), strict=True)
        if wanted
    ]


def synthetic(like: Case, shape: tuple[int, int], seed: int) -> tuple[jax.Array, jax.Array]:
    """Two gradients of a shape with the spectrum, and as much in common, as those of a case.

    Singular values are interpolated over the relative index, singular vectors are random. The
    second matrix is a combination of the first and of one like it and independent.
    """
    measured = np.linalg.svd(np.asarray(like.last), compute_uv=False)
    k = min(shape)
    places = np.linspace(0, 1, k), np.linspace(0, 1, len(measured))
    spectrum = np.exp(np.interp(*places, np.log(np.maximum(measured, 1e-6 * measured[0]))))
    rng = np.random.default_rng(seed)
    u, v = (np.linalg.qr(rng.standard_normal((s, k), dtype=np.float32))[0] for s in shape)
    last = (u * spectrum.astype(np.float32)) @ v.T
    cosine = np.vdot(like.last, like.before)
    cosine /= np.linalg.norm(like.last) * np.linalg.norm(like.before)
    flips = (rng.choice(np.array([-1, 1], np.float32), s) for s in shape)
    other = next(flips)[:, None] * last * next(flips)
    return jnp.asarray(last), jnp.asarray(cosine * last + np.sqrt(1 - cosine**2) * other)


def cases(training: Training, models: Sequence[str]) -> list[Case]:
    """An attention's and an MLP's gradient for each model."""
    blocks = [tree["blocks"] for tree in (training.last, training.before)]
    layer = PRESETS["llama_60m"].num_layers // 2
    real = []
    for block, kernel in (("attn", "q_proj"), ("mlp", "gate_proj")):
        last, before = (jnp.asarray(tree[block][kernel]["kernel"][layer]) for tree in blocks)
        real.append(Case("llama_60m", last, before, RANKS["llama_60m"], "real"))
    found = list(real) if "llama_60m" in models else []
    for model in models:
        if model == "llama_60m":
            continue
        config = PRESETS[model]
        for like, columns in zip(real, (config.hidden_size, config.intermediate_size), strict=True):
            last, before = synthetic(like, (config.hidden_size, columns), len(found))
            found.append(Case(model, last, before, RANKS[model], "synthetic"))
    return found


def optax_update(tx: optax.GradientTransformation, gradients: Any) -> list[Callable[[], Any]]:
    """Its update with a change of basis (count 0), and the same program without (count 1)."""
    state = tx.init(gradients)
    update = jax.jit(lambda updates, state: tx.update(updates, state))
    executable = update.lower(gradients, state).compile()
    later = state._replace(count=state.count + 1)
    return [functools.partial(executable, gradients, of) for of in (state, later)]


class Row(NamedTuple):
    """What was measured of a case.

    Attributes:
      case: which.
      seconds: by name of the method.
      share: the gradient's energy that SVD's basis captures.
      energy: that of each method relative to SVD's.
      warm: the same where a method starts from the previous step's basis.
      stable_rank: of the gradient.
      overlap: of SVD's basis and the previous step's.
    """

    case: Case
    seconds: dict[str, float]
    share: float
    energy: dict[str, float]
    warm: dict[str, float]
    stable_rank: float
    overlap: float


def measure(case: Case, repeats: int) -> Row:
    """Times and captured energies for one matrix."""
    key = jax.random.key(1)
    zeros = empty_projector(case.last.shape, case.rank, case.side, jnp.float32)
    calls: dict[str, Callable[[], Any]] = {}
    executables = {}
    for method in METHODS:

        def find(gradient: jax.Array, old: Any, method: Method = method) -> Any:
            return find_basis(
                method.basis,
                gradient,
                case.rank,
                case.side,
                old=old,
                key=key,
                power_iterations=method.rounds,
            )

        executables[method] = jax.jit(find).lower(case.last, zeros).compile()
        calls[method.name] = functools.partial(executables[method], case.last, zeros)
    tx = optax.contrib.scale_by_galore(case.rank, NEVER, base_optimizer=optax.identity())
    calls[OPTAX], without = optax_update(tx, case.last)
    taken = interleaved({**calls, "without": without}, repeats)
    taken[OPTAX] -= taken.pop("without")

    captured = jax.jit(captured_energy, static_argnums=2)
    # Exact, as is SVD, and cheaper.
    exact = executables[Method("eigh")](case.last, zeros)
    old = executables[Method("eigh")](case.before, zeros)
    found = {method: executables[method](case.last, zeros) for method in METHODS[1:]}
    share = float(captured(case.last, exact, case.side))
    return Row(
        case,
        taken,
        share,
        {m.name: float(captured(case.last, p, case.side)) / share for m, p in found.items()},
        {
            m.name: float(captured(case.last, executables[m](case.last, old), case.side)) / share
            for m in ITERATED
        },
        float(stable_rank(case.last)),
        float(overlap(exact, old)),
    )
