"""The training run: from a config and a folder to a trained model, resumable at any moment."""

import math
import time
from pathlib import Path
from typing import Any, NoReturn

import jax
import numpy as np

from galore_jax.data.batches import Batches
from galore_jax.errors import UserError
from galore_jax.memory import compiled_plan, memory_table
from galore_jax.memory.fit import check_fit, compile_steps
from galore_jax.training.best import Best
from galore_jax.training.checkpoints import Checkpoints, Restored
from galore_jax.training.config import Config
from galore_jax.training.experiment import Experiment, make_experiment, step_name
from galore_jax.training.from_config import count_updates
from galore_jax.training.metrics import MetricsLog, write_run_record
from galore_jax.training.progress import Progress, format_count, format_duration
from galore_jax.training.shapes import OnShapes
from galore_jax.training.signals import StopRequest
from galore_jax.training.step import NORMS, REFRESHES, TrainState, all_finite, make_eval_step
from galore_jax.training.summary import summary
from galore_jax.training.tasks import Data, Evaluation
from galore_jax.training.workdir import check_writable, claim, config_json, keep_tokenizer


def train(config: Config, workdir: Path) -> None:
    """Trains as ``config`` says, in ``workdir``; resumes what is there.

    Writes ``config.json``, ``versions.json``, ``metrics.jsonl``, ``tokenizer/`` and
    ``checkpoints/`` to the workdir. SIGTERM, SIGINT and SIGHUP end the run after the update under
    way, with a checkpoint.

    Args:
      config: every key of ``configs/base.py``.
      workdir: the run's folder, made if it is missing.

    Raises:
      UserError: anything the user can put right; what the workdir held before is untouched.
    """
    experiment = make_experiment(count_updates(config))
    config = experiment.config  # with the sizes of config.init_from
    with StopRequest() as stop:
        data = experiment.task.open_data()
        print(summary(experiment), flush=True)
        with (
            claim(workdir, config),
            Checkpoints(workdir / "checkpoints", keep=config.keep_checkpoints, warn=print) as saved,
        ):
            restored = saved.restore(experiment.abstract_state())
            if restored is not None and restored.data["source"] != data.source:
                raise UserError(
                    f"--workdir={workdir} was trained on {restored.data['source']} and the data "
                    f"now is {data.source}; give another --workdir, or the same data to resume"
                )
            if restored is not None and restored.step >= config.train_steps:
                print(
                    f"this run is complete: step {restored.step} of {config.train_steps}, "
                    f"checkpoint in {saved.directory}; to start afresh remove {workdir} or give "
                    "another --workdir"
                )
                return
            check_writable(workdir)
            with data.train_batches(batch_size=config.batch_size, seed=config.seed) as batches:
                run = _Run(experiment, data, batches, saved, stop)
                run.compile()
                if restored is None:
                    state, resume_step = experiment.first_state(), None
                else:
                    state, resume_step = run.resume(restored), restored.step
                if not stop.requested:
                    write_run_record(workdir, config_json(config), first=restored is None)
                    keep_tokenizer(workdir, data.tokenizer)
                    with (
                        MetricsLog(
                            workdir, resume_step=resume_step, tensorboard=config.tensorboard
                        ) as metrics,
                        Progress(config.train_steps, start=run.step) as progress,
                    ):
                        run.train(state, metrics, progress)
        print(run.last_words())


class _Run:
    """A run under way: its compiled steps and how far it has come."""

    def __init__(
        self,
        experiment: Experiment,
        data: Data,
        batches: Batches,
        saved: Checkpoints,
        stop: StopRequest,
    ):
        self.experiment, self.config = experiment, experiment.config
        self.data, self.batches, self.saved, self.stop = data, batches, saved, stop
        self.step = 0
        self.tokens = 0
        self.seconds = 0.0
        self.loss = math.nan
        self.evaluation: Evaluation | None = None
        self.best = Best(saved.directory.with_name("best"), experiment.task.keeps_best)
        self.owes_evaluation = True  # of step 0

    def compile(self) -> None:
        """Compiles both steps, and prints what memory they will take."""
        experiment, config, begun = self.experiment, self.config, time.monotonic()
        state = experiment.abstract_state()
        print("compiling", flush=True)

        steps = {
            refresh: jax.jit(step, donate_argnums=0)
            for refresh, step in experiment.train_steps().items()
        }
        batch = experiment.abstract_batch(config.batch_size)
        lowered = {refresh: step.lower(state, batch) for refresh, step in steps.items()}
        compiled = compile_steps(config, lowered)
        self.train_steps = {
            refresh: OnShapes(step, batch, compiled[refresh]) for refresh, step in steps.items()
        }
        judge = jax.jit(make_eval_step(experiment.stages, experiment.task))
        batch = experiment.abstract_batch(config.micro_batch_size)
        self.judge = OnShapes(judge, batch, judge.lower(state.params, batch).compile())
        self.all_finite = jax.jit(all_finite)
        device = jax.local_devices()[0].device_kind
        plans = {
            step_name(refresh): compiled_plan(step, device) for refresh, step in compiled.items()
        }
        print(memory_table(state.params, state.opt_state, experiment.gradient_bytes(), plans))
        self.planned_memory = check_fit(config, plans)
        print(f"compiled in {time.monotonic() - begun:.1f} s", flush=True)

    def resume(self, restored: Restored) -> TrainState:
        """Goes to the position of a checkpoint."""
        print(f"resuming from step {restored.step} of {self.config.train_steps}", flush=True)
        self.step = restored.step
        self.tokens, self.seconds = restored.data["tokens"], restored.data["seconds"]
        self.owes_evaluation = restored.data["owes_evaluation"]
        self.batches.set_state(restored.data["batches"])
        self.best.resume(restored.data.get("best"))
        return restored.state

    def train(self, state: TrainState, metrics: MetricsLog, progress: Progress) -> None:
        """Trains to the last step, or until asked to stop; ends with a checkpoint.

        A stop during an evaluation gives that up, to be made after the run resumes; the last
        step's is always made.
        """
        config, begun, seconds_before = self.config, time.monotonic(), self.seconds
        if self.owes_evaluation:
            self._evaluate(state, metrics, progress)
            if self.stop.requested:
                return
        speed = _Speed()
        waiting = None
        for step in range(self.step + 1, config.train_steps + 1):
            train_step = self.train_steps[self.experiment.refreshes(step - 1, state)]
            state, numbers = train_step(state, next(self.batches))
            # The metrics of the step before: the device already has this one to work on.
            if waiting is not None:
                self._record(*waiting, metrics, progress, speed)
            waiting = (step, numbers)
            evaluate = step == config.train_steps or _due(step, config.eval_every_steps)
            save = step == config.train_steps or _due(step, config.checkpoint_every_steps)
            if not (evaluate or save or self.stop.requested):
                continue
            self._record(*waiting, metrics, progress, speed)
            waiting = None
            paused = time.monotonic()
            if evaluate:
                self._evaluate(state, metrics, progress)
            if save or self.stop.requested:
                self.seconds = seconds_before + time.monotonic() - begun
                self._save(state)
            speed.exclude(time.monotonic() - paused)
            if self.stop.requested:
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
        norms = {key: numbers[key] for key in NORMS if key in numbers}
        if not np.isfinite([numbers["loss"], *norms.values()]).all():
            named = "".join(f" and {key} {value}" for key, value in norms.items())
            self._diverged(f"loss {self.loss}{named}")
        if step == 1 or step == self.config.train_steps or _due(step, self.config.log_every_steps):
            rate, tokens_per_second = numbers["learning_rate"], speed.since_last()
            line = {"step": step, "loss": numbers["loss"], "learning_rate": rate, **norms}
            line |= {key: numbers[key] for key in REFRESHES if key in numbers}
            line |= {"tokens": self.tokens, "tokens_per_second": tokens_per_second}
            metrics.write(line | self._memory())
            shown = {"learning_rate": float(rate), "tokens_per_second": tokens_per_second}
            progress.update(step, loss=self.loss, **shown)
        else:
            progress.update(step)

    def _memory(self) -> dict[str, int]:
        """Returns the planned memory and the most used so far, in bytes, if the device tells it."""
        stats = jax.local_devices()[0].memory_stats() or {}
        if "peak_bytes_in_use" not in stats:
            return {}
        return {"planned_memory": self.planned_memory, "max_memory": stats["peak_bytes_in_use"]}

    def _evaluate(self, state: TrainState, metrics: MetricsLog, progress: Progress) -> None:
        """Writes the mean loss over held-out targets, which count alike whatever their batch."""
        self.owes_evaluation = True
        is_last = self.step >= self.config.train_steps
        found = self.experiment.task.evaluate(
            self.judge,
            state.params,
            self.data,
            batch_size=self.config.micro_batch_size,
            most_targets=self.config.eval_tokens,
            stop=lambda: self.stop.requested and not is_last,
        )
        if found is None:
            return
        self.evaluation = found
        if not math.isfinite(found.loss):
            self._diverged(f"eval loss {found.loss}")
        metrics.write({"step": self.step, **found.metrics})
        progress.message(f"step {self.step}: {found.text} {found.over}")
        self.best.offer(self.step, found, state)
        self.owes_evaluation = False

    def _save(self, state: TrainState) -> None:
        if not self.all_finite(state):
            self._diverged("weights or optimizer state that are not finite")
        position = {"batches": self.batches.get_state(), "source": self.data.source}
        position |= {"tokens": self.tokens, "seconds": self.seconds}
        position["owes_evaluation"] = self.owes_evaluation
        position["best"] = self.best.position
        self.saved.save(self.step, state, position)

    def _diverged(self, what: str) -> NoReturn:
        kept = self.saved.steps()
        untouched = f"the checkpoint of step {kept[-1]} is untouched; " if kept else ""
        raise UserError(
            f"{what} at step {self.step}: stopped; {untouched}"
            "a lower schedule.peak_lr or an optimizer.clip_norm may help"
        )

    def last_words(self) -> str:
        """Says in one line what became of the run."""
        total = self.config.train_steps
        if self.step == 0:
            return f"stopped by {self.stop.name} before the first step: there is nothing to save"
        if self.step < total:
            return (
                f"stopped by {self.stop.name} after step {self.step} of {total}, saved in "
                f"{self.saved.directory}; run the same command again to go on"
            )
        return (
            f"done: train loss {self.loss:.4f}, {self.evaluation.text if self.evaluation else ''}, "
            f"{format_count(self.tokens)} tokens in {format_duration(self.seconds)}, checkpoint in "
            f"{self.saved.directory}{self.best.last_words()}"
        )


class _Speed:
    """Measures tokens a second between two log lines, without pauses."""

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
