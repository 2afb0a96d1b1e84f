"""The training run: from a config and a folder to a trained model, resumable at any moment."""

import contextlib
import functools
import math
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from galore_jax.data.batches import TextData
from galore_jax.errors import UserError
from galore_jax.memory import compiled_plan, memory_table
from galore_jax.training import settings, steps
from galore_jax.training.checkpoints import Checkpoints, Restored
from galore_jax.training.metrics import MetricsLog
from galore_jax.training.optimizers import make_optimizer
from galore_jax.training.progress import Progress, format_count, format_duration
from galore_jax.training.signals import StopRequest
from galore_jax.training.steps import TrainState
from galore_jax.training.workdir import claim


def train(config: settings.Config, workdir: Path) -> None:
    """Trains as ``config`` says, in ``workdir``; resumes what is there.

    Writes ``config.json``, ``versions.json``, ``metrics.jsonl`` and ``checkpoints/`` to the
    workdir. SIGTERM and SIGINT end the run after the update under way, with a checkpoint.

    Args:
      config: every key of ``configs/base.py``.
      workdir: the run's folder, made if it is missing.

    Raises:
      UserError: anything the user can put right; what the workdir held before is untouched.
    """
    settings.check_config(config)
    data = settings.open_data(config)
    model = settings.model_config(config)
    tx = make_optimizer(config)
    init = functools.partial(steps.init_state, model, tx)
    try:
        abstract_state = jax.eval_shape(init, jax.random.key(config.seed))
    except ValueError as error:
        raise UserError(f"config.galore does not fit the model: {error}") from error

    print(settings.summary(config, abstract_state.params), flush=True)
    with (
        claim(workdir, config),
        Checkpoints(workdir / "checkpoints", keep=config.keep_checkpoints, warn=print) as saved,
    ):
        restored = saved.restore(abstract_state)
        if restored is not None and restored.step >= config.train_steps:
            print(
                f"this run is complete: step {restored.step} of {config.train_steps}, checkpoint "
                f"in {saved.directory}; to start afresh remove {workdir} or give another --workdir"
            )
            return
        run = _Run(config, data, saved)
        run.compile(tx, abstract_state)
        with (
            contextlib.closing(run.batches),
            MetricsLog(
                workdir,
                resume_step=-1 if restored is None else restored.step,
                tensorboard=config.tensorboard,
            ) as metrics,
            Progress(
                config.train_steps, start=0 if restored is None else restored.step
            ) as progress,
            StopRequest() as stop,
        ):
            if restored is None:
                state = jax.jit(init)(jax.random.key(config.seed))
            else:
                progress.message(f"resuming from step {restored.step} of {config.train_steps}")
                state = run.resume(restored)
            run.train(state, metrics, progress, stop)
        print(run.last_words(stop))


class _Run:
    """A run under way: its compiled steps and how far it has come."""

    def __init__(self, config: settings.Config, data: TextData, saved: Checkpoints):
        self.config, self.data, self.saved = config, data, saved
        self.batches = data.train_batches(batch_size=config.batch_size, seed=config.seed)
        self.step = 0
        self.tokens = 0
        self.seconds = 0.0
        self.loss = math.nan
        self.eval_loss = math.nan

    def compile(self, tx: Any, abstract_state: TrainState) -> None:
        """Compiles both steps, and prints what memory they will take."""
        config, begun = self.config, time.monotonic()
        print("compiling", flush=True)
        model = settings.model_config(config)
        parts = config.batch_size // config.micro_batch_size

        def batch(sequences: int) -> steps.Batch:
            shape = jax.ShapeDtypeStruct((sequences, config.data.seq_len), np.int32)
            return {"tokens": shape, "targets": shape}  # pyright: ignore[reportReturnType]

        schedule = settings.learning_rate(config)
        step = steps.make_train_step(model, tx, schedule, micro_batches=parts)
        lowered = jax.jit(step, donate_argnums=0).lower(abstract_state, batch(config.batch_size))
        self.train_step = lowered.compile()
        self.eval_step = (
            jax.jit(steps.make_eval_step(model))
            .lower(abstract_state.params, batch(config.micro_batch_size))
            .compile()
        )
        device = jax.local_devices()[0].device_kind
        params, opt_state = abstract_state.params, abstract_state.opt_state
        gradients = steps.gradient_bytes(params, parts)
        print(memory_table(params, opt_state, gradients, compiled_plan(self.train_step, device)))
        print(f"compiled in {time.monotonic() - begun:.1f} s", flush=True)

    def resume(self, restored: Restored) -> TrainState:
        """Takes up the position of a checkpoint."""
        self.step = restored.step
        self.tokens, self.seconds = restored.data["tokens"], restored.data["seconds"]
        self.batches.set_state(restored.data["batches"])
        return restored.state

    def train(
        self, state: TrainState, metrics: MetricsLog, progress: Progress, stop: StopRequest
    ) -> None:
        """Trains to the last step, or until asked to stop; always ends with a checkpoint."""
        config, begun, seconds_before = self.config, time.monotonic(), self.seconds
        if self.step == 0:
            self._evaluate(state, metrics, progress)
        speed = _Speed()
        waiting = None
        for step in range(self.step + 1, config.train_steps + 1):
            state, numbers = self.train_step(state, next(self.batches))
            # The metrics of the step before: the device already has this one to work on.
            if waiting is not None:
                self._record(*waiting, metrics, progress, speed)
            waiting = (step, numbers)
            last = step == config.train_steps or stop.requested
            evaluate = step == config.train_steps or _due(step, config.eval_every_steps)
            save = last or _due(step, config.checkpoint_every_steps)
            if not (evaluate or save):
                continue
            self._record(*waiting, metrics, progress, speed)
            waiting = None
            paused = time.monotonic()
            if evaluate:
                self._evaluate(state, metrics, progress)
            if save:
                self.seconds = seconds_before + time.monotonic() - begun
                self._save(state)
            speed.exclude(time.monotonic() - paused)
            if last:
                break
        self.saved.wait()

    def _record(
        self, step: int, numbers: Any, metrics: MetricsLog, progress: Progress, speed: "_Speed"
    ) -> None:
        numbers = jax.device_get(numbers)
        tokens = int(numbers["tokens"])
        self.step, self.loss = step, float(numbers["loss"])
        self.tokens += tokens
        speed.add(tokens)
        if not (np.isfinite(numbers["loss"]) and np.isfinite(numbers["grad_norm"])):
            kept = self.saved.steps()
            raise UserError(
                f"loss {self.loss} and gradient norm {float(numbers['grad_norm'])} at step {step}: "
                "stopped; "
                + (f"the checkpoint of step {kept[-1]} is untouched; " if kept else "")
                + "a lower schedule.peak_lr or an optimizer.clip_norm may help"
            )
        if step == 1 or step == self.config.train_steps or _due(step, self.config.log_every_steps):
            tokens_per_second = speed.since_last()
            line = {
                "step": step,
                "loss": numbers["loss"],
                "learning_rate": numbers["learning_rate"],
                "grad_norm": numbers["grad_norm"],
                "tokens": self.tokens,
                "tokens_per_second": tokens_per_second,
            }
            metrics.write(line)
            progress.update(
                step,
                loss=self.loss,
                learning_rate=float(numbers["learning_rate"]),
                tokens_per_second=tokens_per_second,
            )
        else:
            progress.update(step)

    def _evaluate(self, state: TrainState, metrics: MetricsLog, progress: Progress) -> None:
        """Mean loss over the held-out targets: each counts alike, whatever batch it is in."""
        total, counted = [], 0
        for batch in self.data.eval_batches(batch_size=self.config.micro_batch_size):
            nll, _ = self.eval_step(state.params, batch)
            total.append(nll)
            counted += int(np.sum(batch["targets"] >= 0))
            if counted >= self.config.eval_tokens:
                break
        self.eval_loss = math.fsum(jax.device_get(total)) / counted
        perplexity = math.exp(self.eval_loss)
        metrics.write(
            {
                "step": self.step,
                "eval_loss": self.eval_loss,
                "eval_perplexity": perplexity,
                "eval_tokens": counted,
            }
        )
        progress.message(
            f"step {self.step}: eval loss {self.eval_loss:.4f}, perplexity {perplexity:.2f} "
            f"over {format_count(counted)} held-out tokens"
        )

    def _save(self, state: TrainState) -> None:
        self.saved.save(
            self.step,
            state,
            {"batches": self.batches.get_state(), "tokens": self.tokens, "seconds": self.seconds},
        )

    def last_words(self, stop: StopRequest) -> str:
        """What became of the run, in one line."""
        if self.step < self.config.train_steps:
            return (
                f"stopped by {stop.name} after step {self.step} of {self.config.train_steps}, "
                f"saved in {self.saved.directory}; run the same command again to go on"
            )
        return (
            f"done: train loss {self.loss:.4f}, eval loss {self.eval_loss:.4f}, "
            f"perplexity {math.exp(self.eval_loss):.2f}, {format_count(self.tokens)} tokens in "
            f"{format_duration(self.seconds)}, checkpoint in {self.saved.directory}"
        )


class _Speed:
    """Tokens a second between two log lines, pauses left out."""

    def __init__(self):
        self._begun, self._tokens = time.monotonic(), 0

    def add(self, tokens: int) -> None:
        self._tokens += tokens

    def exclude(self, seconds: float) -> None:
        self._begun += seconds

    def since_last(self) -> float:
        now = time.monotonic()
        speed = self._tokens / max(now - self._begun, 1e-9)
        self._begun, self._tokens = now, 0
        return speed


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
