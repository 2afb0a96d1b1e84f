"""What a config describes, made once: model, task, optimizer, schedule and mode."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from galore_jax.adapters import add_lora, factorize, freeze_rest, trainable
from galore_jax.errors import UserError
from galore_jax.int8_kernels import decoded, float_variables
from galore_jax.lazy_refresh import times_in
from galore_jax.memory.count import tree_bytes
from galore_jax.models.architectures import ModelConfig, architecture_of
from galore_jax.models.encoder_config import EncoderConfig
from galore_jax.models.stages import BLOCKS, LAYERS, Stages
from galore_jax.per_layer import is_leafwise
from galore_jax.training.config import (
    Config,
    check_config,
    galore_rank,
    target_modules,
    uses_galore,
)
from galore_jax.training.from_config import make_task, model_config, resolve
from galore_jax.training.layerwise import make_layerwise_step
from galore_jax.training.optimizer import make_optimizer, make_schedule, uses_matrices
from galore_jax.training.step import Mode, Step, TrainState, make_train_step
from galore_jax.training.tasks import Batch, Task
from galore_jax.weights import projection_mask


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A run before its data and its first step; nothing in it holds memory.

    Attributes:
      config: the config, as it was given.
      model: sizes and numerics.
      task: loss, metrics and batches.
      schedule: the learning rate after a number of updates.
      optimizer: for all layers, stacked.
      layer_optimizer: with layerwise updates the same for a model with one layer, without the
        leading axis; else None.
      mode: how updates are made.
    """

    config: Config
    model: ModelConfig
    task: Task
    schedule: optax.Schedule
    optimizer: optax.GradientTransformationExtraArgs
    layer_optimizer: optax.GradientTransformationExtraArgs | None
    mode: Mode

    @functools.cached_property
    def stages(self) -> Stages:
        """Returns the model as pure functions."""
        return architecture_of(self.model).stages(self.model)

    def init(self, key: jax.Array) -> TrainState:
        """Makes the state before the first update; a pure function for ``jax.jit``."""
        _, params = architecture_of(self.model).init_params(self.model, key)
        return self._start(params, key)

    def _start(self, params: Any, key: jax.Array) -> TrainState:
        params = with_adapters(self.config, params, jax.random.fold_in(key, 1))
        opt_state = self.optimizer.init(decoded(trainable(params)))
        return TrainState(jnp.zeros([], jnp.int32), params, opt_state)

    def first_state(self) -> TrainState:
        """Makes that state on the device, with new weights or those of ``config.init_from``.

        Raises:
          UserError: a folder that is damaged or does not fit.
        """
        key = jax.random.key(self.config.seed)
        if self.config.init_from is None:
            return jax.jit(self.init)(key)
        params = architecture_of(self.model).load(self.config.init_from, self.model, key)
        return jax.jit(self._start, donate_argnums=0)(params, key)

    def abstract_state(self) -> TrainState:
        """Returns the shapes of the state.

        Raises:
          UserError: an optimizer that does not fit the model.
        """
        return self._abstract_state

    @functools.cached_property
    def _abstract_state(self) -> TrainState:
        try:
            state = jax.eval_shape(self.init, jax.random.key(self.config.seed))
            if uses_matrices(self.config):
                targets = target_modules(self.config)
                weights = jax.eval_shape(decoded, state.params)
                projection_mask(weights, targets, stacked_modules=LAYERS)
            return state
        except (TypeError, ValueError) as error:
            raise UserError(f"the optimizer does not fit the model: {error}") from error

    def abstract_batch(self, sequences: int) -> Batch:
        """Returns the shapes of a batch."""
        return self.task.abstract_batch(sequences)

    def refreshes(self, count: int, state: TrainState | None = None) -> bool:
        """Tells whether the update after ``count`` updates makes new projectors or merges.

        Args:
          count: updates so far.
          state: the state after them. With lazy refreshes it tells whether a matrix is due; without
            it each update that may refresh counts as one.
        """
        if self.config.method == "relora":
            return count > 0 and count % self.config.relora.merge_every_steps == 0
        if not uses_galore(self.config) or count % self.config.galore.update_proj_gap:
            return False
        times = () if state is None else times_in(state.opt_state)
        return not times or any((jax.device_get(x.due_at) <= count).any() for x in times)

    def train_steps(self) -> dict[bool, Step]:
        """Makes the pure steps of a run, by what ``refreshes`` gives.

        Compiled apart, ordinary steps contain no decomposition.
        """
        kinds = [False]
        if uses_galore(self.config):
            kinds = [True] if self.config.galore.update_proj_gap == 1 else [False, True]
        if self.config.method == "relora":
            kinds = [False, True]
        return {refresh: self._train_step(refresh) for refresh in kinds}

    def _train_step(self, refresh: bool) -> Step:
        make, tx = make_train_step, self.optimizer
        if self.layer_optimizer is not None:
            make, tx = make_layerwise_step, self.layer_optimizer
        return make(self.stages, self.task, tx, self.schedule, self.mode, refresh=refresh)

    def gradient_shapes(self) -> Any:
        """Returns the shapes of all gradients of a step without new projectors."""
        state = self.abstract_state()
        if not self.mode.projected:
            return jax.eval_shape(lambda x: float_variables(trainable(x)), state.params)
        return jax.eval_shape(self.mode.variables, state.params, state.opt_state)

    def gradient_bytes(self) -> int:
        """Counts the bytes of gradients that exist at once in such a step, with float32 sums."""
        shapes = self.gradient_shapes()
        parts = self.mode.micro_batches
        if self.mode.updates == "standard":
            return tree_bytes(shapes) + _sum_bytes(shapes, parts)
        layer = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), shapes[BLOCKS])
        largest = max(tree_bytes(x) for key, x in shapes.items() if key != BLOCKS)
        if self.mode.side_by_side:
            return max(tree_bytes(layer) + _sum_bytes(layer, parts), largest)
        return max(tree_bytes(layer), largest) + _sum_bytes(shapes, 2)


def make_experiment(config: Config) -> Experiment:
    """Makes what a config describes.

    Raises:
      UserError: a value that is not allowed, or settings that do not go together.
    """
    check_config(config)
    rank = galore_rank(config)
    if isinstance(rank, dict):  # a ConfigDict copies no dict whose keys have dots
        config.galore.rank = tuple(rank.items())
    config = resolve(config)
    model = model_config(config)
    task = make_task(config, model)
    projected = config.projected_gradients
    if projected is None:  # where it can be
        needs_full = config.optimizer.clip_norm is not None or config.galore.recovery is not None
        projected = uses_galore(config) and not needs_full
    is_int8 = model.param_dtype == jnp.int8
    mode = Mode(
        updates=config.updates,
        projected=projected,
        proj_type=config.galore.proj_type,
        update_proj_gap=config.galore.update_proj_gap,
        micro_batches=config.batch_size // config.micro_batch_size,
        refresh_from=config.galore.refresh_from,
        rounding=config.param_rounding or ("stochastic" if is_int8 else "nearest"),
        dropout_seed=config.seed if _drops(config, model) else None,
        prune_ratio=config.relora.prune_ratio if config.method == "relora" else None,
    )
    schedule = make_schedule(config)
    experiment = Experiment(
        config, model, task, schedule, make_optimizer(config, schedule), None, mode
    )
    experiment.abstract_state()
    if mode.updates == "standard":
        return experiment
    if not experiment.stages.block:
        raise UserError(
            "config.updates='layerwise' is for LLaMA: an encoder's blocks also read the padding of "
            "the batch; give --config.updates=standard"
        )
    side_by_side = not projected or _inputs_are_smaller_than_sums(experiment)
    return dataclasses.replace(
        experiment,
        layer_optimizer=_layer_optimizer(experiment),
        mode=dataclasses.replace(mode, side_by_side=side_by_side),
    )


def with_adapters(config: Config, params: Any, key: jax.Array) -> Any:
    """Puts the method's kernels among the params, if it has any: LoRA's, or low-rank factors.

    Raises:
      ValueError: patterns that match no matrix.
    """
    options = {"rank": config.lora.rank, "target_modules": target_modules(config)}
    options["stacked_modules"] = LAYERS
    if config.method in ("lora", "relora"):
        more = {"alpha": config.lora.alpha, "dropout": config.lora.dropout}
        params = add_lora(params, key, **options, **more)
        if config.lora.train_rest is None:
            return params
        return freeze_rest(params, tuple(config.lora.train_rest))
    return factorize(params, key, **options) if config.method == "low_rank" else params


def _drops(config: Config, model: ModelConfig) -> bool:
    if isinstance(model, EncoderConfig) and model.drops:
        return True
    return config.method in ("lora", "relora") and config.lora.dropout > 0


def step_name(refresh: bool) -> str:
    """Names a step in the memory report."""
    return "step with a refresh" if refresh else "training step"


def _sum_bytes(shapes: Any, micro_batches: int) -> int:
    """Counts the bytes of the float32 sums over several micro-batches."""
    return 4 * sum(leaf.size for leaf in jax.tree.leaves(shapes)) if micro_batches > 1 else 0


def _inputs_are_smaller_than_sums(experiment: Experiment) -> bool:
    """Compares the blocks' inputs of a batch with the float32 sums of all gradients."""
    config, model = experiment.config, experiment.model
    tokens = config.batch_size * config.data.seq_len
    inputs = tokens * model.hidden_size * model.num_layers * jnp.dtype(model.dtype).itemsize
    return inputs <= _sum_bytes(experiment.gradient_shapes(), 2)


def _layer_optimizer(experiment: Experiment) -> optax.GradientTransformationExtraArgs:
    """Makes the optimizer for a single layer, if it needs to know no more.

    Raises:
      UserError: clipping by the global norm, an optimizer that needs all leaves at once.
    """
    config = experiment.config
    with_layers = "config.updates='layerwise' cannot be used with "
    if config.optimizer.clip_norm is not None:
        raise UserError(
            f"{with_layers}config.optimizer.clip_norm={config.optimizer.clip_norm}: the global "
            "norm is known only when all gradients are; give --config.optimizer.clip_norm=None"
        )
    tx = make_optimizer(config, experiment.schedule, stacked=False)
    params = jax.eval_shape(decoded, experiment.abstract_state().params)
    layer = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), params[BLOCKS])
    params = {**params, BLOCKS: layer}
    mask = projection_mask(params, tuple(config.galore.target_modules), must_match=False)
    # A leaf of each kind is enough, and takes a third of the time; but ranks by patterns need all.
    leaves, treedef = jax.tree.flatten(params)
    ranks = [isinstance(galore_rank(config), dict) and i for i in range(len(leaves))]
    kinds = list(zip(leaves, jax.tree.leaves(mask), ranks, strict=True))
    few = [
        kind[0] if kinds.index(kind) == i else optax.MaskedNode() for i, kind in enumerate(kinds)
    ]
    if not is_leafwise(tx, treedef.unflatten(few), refresh=False, value=0.0):
        raise UserError(
            f"{with_layers}config.optimizer.name={config.optimizer.name!r}, which needs the "
            "gradients of all weights at once, or draws random numbers"
        )
    return tx
