"""The pure functions of training: first state, one update, evaluation of one batch."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from galore_jax.adapters import is_adapter, restart, trainable, with_trainable
from galore_jax.int8_kernels import decoded, float_variables, with_float_variables
from galore_jax.lazy_refresh import times_in
from galore_jax.models.stages import DROPOUT_KEY, KERNELS, Stages
from galore_jax.projected_grad import gradient_variables, project_gradients, with_variables
from galore_jax.projection import ProjType
from galore_jax.quantization import Quantized
from galore_jax.rounding import Rounding, apply_updates
from galore_jax.training.tasks import Batch, Task

Metrics = dict[str, jax.Array]
NORMS = ("grad_norm", "projected_grad_norm")
REFRESHES = ("refreshes", "refreshes_spared")  # of single matrices


class TrainState(NamedTuple):
    """All that an update changes.

    Attributes:
      step: updates made, () int32.
      params: the model's weights, nested dicts of arrays.
      opt_state: the optimizer's state.
    """

    step: jax.Array
    params: Any
    opt_state: optax.OptState


Step = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]


@dataclasses.dataclass(frozen=True)
class Mode:
    """How an update is made. All modes make the same update.

    Attributes:
      updates: ``"standard"``, all gradients before all updates; ``"layerwise"``, each layer's
        update as soon as its gradient exists, see ``galore_jax.training.layerwise``.
      projected: whether ordinary steps take the projected gradients of the blocks' kernels.
      proj_type: GaLore's.
      micro_batches: the number of equal parts of a batch, whose gradients add up in float32.
      refresh_from: where new projectors come from with projected gradients: ``"batch"``, the full
        gradient of the whole batch, or ``"micro_batch"``, that of its first micro-batch, so that
        the full gradient is never added up in float32.
      update_proj_gap: GaLore's.
      rounding: of bfloat16 and int8 weights, see ``galore_jax.rounding.apply_updates``.
      side_by_side: layerwise, whether all micro-batches go through a layer before the next one's
        turn, which keeps the blocks' inputs of the whole batch. Otherwise, with projected gradients
        alone, one goes through all layers after the other: that keeps the float32 sums of all
        projected gradients.
      dropout_seed: of dropout, LoRA's and the model's; None where there is none.
      prune_ratio: for ReLoRA, the part of the moments that a merge sets to zero; else None.
    """

    updates: Literal["standard", "layerwise"] = "standard"
    projected: bool = False
    proj_type: ProjType = "std"
    update_proj_gap: int = 200
    micro_batches: int = 1
    refresh_from: Literal["batch", "micro_batch"] = "batch"
    rounding: Rounding = "nearest"
    side_by_side: bool = True
    dropout_seed: int | None = None
    prune_ratio: float | None = None

    def __post_init__(self):
        if not self.side_by_side and not self.projected:
            raise ValueError("micro-batches one after the other need projected gradients")

    def variables(self, params: Any, opt_state: optax.OptState) -> Any:
        """Makes what projected gradients are taken by, see ``gradient_variables``."""
        return gradient_variables(params, opt_state, proj_type=self.proj_type, kernels=KERNELS)

    def project(self, grads: Any, opt_state: optax.OptState) -> Any:
        """Projects full gradients, see ``project_gradients``."""
        return project_gradients(grads, opt_state, proj_type=self.proj_type, kernels=KERNELS)


def make_train_step(
    model: Stages,
    task: Task,
    tx: optax.GradientTransformationExtraArgs,
    schedule: optax.Schedule,
    mode: Mode,
    *,
    refresh: bool,
) -> Step:
    """Makes one update: mean loss over the targets of the whole batch, gradient, optimizer.

    Each target counts alike, whichever micro-batch it is in.

    Args:
      model, task: what is trained, and to do what.
      tx: the optimizer.
      schedule: its learning rate, for the metrics.
      mode: how.
      refresh: for GaLore, whether this step makes new projectors, from full gradients; for ReLoRA,
        whether it begins with a merge.

    Returns:
      A pure function of (state, batch) giving the new state and, all () float32 but ``tokens``:
      ``loss`` in nats a target, ``learning_rate``, ``tokens``, the int32 number of targets,
      with lazy refreshes ``count_refreshes``, and
      ``grad_norm``, global and before clipping, where full gradients are there, and with
      ``mode.projected`` the norm of what the optimizer sees of them, ``projected_grad_norm``.
      Meant for ``jax.jit`` with the state donated.
    """

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        tokens, per_target, parts = split_batch(task, batch, mode.micro_batches)
        if refresh and mode.prune_ratio is not None:
            state = restart_state(state, mode.prune_ratio)
        if mode.dropout_seed is not None:
            parts["part"] = jnp.arange(mode.micro_batches)
        trained = trainable(state.params)
        weights = decoded(trained)  # as the optimizer sees them, where it does

        def part_of_mean(nodes: Any, part: Batch) -> jax.Array:
            key = None
            if mode.dropout_seed is not None:
                key = jax.random.fold_in(jax.random.key(mode.dropout_seed), state.step)
                key = jax.random.fold_in(key, part["part"])
            params = with_trainable(state.params, nodes, key)
            inputs = part if key is None else {**part, DROPOUT_KEY: jax.random.fold_in(key, 0)}
            return task.loss(model.forward(params, inputs), part) * per_target

        def full_part_of_mean(variables: Any, part: Batch) -> jax.Array:
            return part_of_mean(with_float_variables(trained, variables), part)

        opt_state, norms, update_refreshes = state.opt_state, {}, refresh
        from_batch = mode.refresh_from == "batch" or mode.micro_batches == 1
        if not mode.projected or (refresh and from_batch):
            variables = float_variables(trained)
            loss, grads = sum_over_parts(jax.value_and_grad(full_part_of_mean), variables, parts)
            grads = cast_like(variables, grads)
            norms["grad_norm"] = gradient_norm(grads)
        else:
            first = ()
            if refresh:
                head = jax.tree.map(lambda x: x[0], parts)
                parts = jax.tree.map(lambda x: x[1:], parts)
                variables = float_variables(trained)
                loss, grads = jax.value_and_grad(full_part_of_mean)(variables, head)
                norms["grad_norm"] = gradient_norm(grads)
                opt_state = tx.refresh(grads, opt_state, weights)  # pyright: ignore
                first = loss, mode.project(grads, opt_state)
            variables = mode.variables(state.params, opt_state)

            def projected_part_of_mean(variables: Any, part: Batch) -> jax.Array:
                return part_of_mean(with_variables(state.params, opt_state, variables), part)

            loss, grads = sum_over_parts(
                jax.value_and_grad(projected_part_of_mean), variables, parts, first
            )
            grads = cast_like(variables, grads)
            norms["projected_grad_norm"] = gradient_norm(grads)
            update_refreshes = False

        updates, opt_state = tx.update(
            grads, opt_state, weights, value=loss, refresh=update_refreshes
        )
        if mode.projected and "projected_grad_norm" not in norms:
            norms["projected_grad_norm"] = gradient_norm(mode.project(grads, opt_state))
        metrics = {
            "loss": loss,
            "learning_rate": jnp.asarray(schedule(state.step), jnp.float32),
            "tokens": tokens,
            **norms,
            **count_refreshes(opt_state, state.step, mode.update_proj_gap),
        }
        trained = apply_updates(trained, updates, state.step, mode.rounding)
        params = with_trainable(state.params, trained)
        return TrainState(state.step + 1, params, opt_state), metrics

    return train_step


def restart_state(state: TrainState, prune_ratio: float) -> TrainState:
    """Merges LoRA's parts, draws new ones, and sets most of their moments to zero (ReLoRA).

    Args:
      state: the state before.
      prune_ratio: the part of the moments that is set to zero, from 0 to 1, chosen by chance: the
        same entries of first and second moments.
    """
    key = jax.random.fold_in(jax.random.key(0), state.step)
    params = restart(state.params, key)
    count = sum(map(is_adapter, jax.tree.leaves(params, is_leaf=is_adapter)))
    leaves, treedef = jax.tree.flatten(state.opt_state, is_leaf=is_adapter)
    places = (i for i, leaf in enumerate(leaves) if is_adapter(leaf))
    for number, place in enumerate(places):  # each moment has a node for each of the params
        keys = jax.random.split(jax.random.fold_in(key, number % count))
        parts = (leaves[place].a, leaves[place].b)
        a, b = (_pruned(x, k, prune_ratio) for x, k in zip(parts, keys, strict=True))
        leaves[place] = dataclasses.replace(leaves[place], a=a, b=b)
    return state._replace(params=params, opt_state=treedef.unflatten(leaves))


def _pruned(moment: Any, key: jax.Array, ratio: float) -> Any:
    values = moment.codes if isinstance(moment, Quantized) else moment
    kept = jax.random.uniform(key, values.shape) >= ratio
    values = jnp.where(kept, values, jnp.zeros_like(values))
    return moment._replace(codes=values) if isinstance(moment, Quantized) else values


def count_refreshes(opt_state: optax.OptState, step: jax.Array, gap: int) -> Metrics:
    """Counts the refreshes of single matrices so far, and those that lazy refreshes spared.

    Args:
      opt_state: the state after an update.
      step: updates before it, () int32.
      gap: GaLore's ``update_proj_gap``.

    Returns:
      ``refreshes`` and ``refreshes_spared``, () int32; nothing without lazy refreshes.
    """
    times = times_in(opt_state)
    if not times:
        return {}
    made = jnp.stack([jnp.sum(x.made) for x in times]).sum()
    all_of_them = (step // gap + 1) * sum(x.made.size for x in times)
    return {"refreshes": made, "refreshes_spared": all_of_them - made}


def split_batch(task: Task, batch: Batch, parts: int) -> tuple[jax.Array, jax.Array, Batch]:
    """Returns the number of tokens, the weight of each loss, and the batch as (parts, ...)."""
    per_target = 1.0 / jnp.maximum(task.count(batch), 1).astype(jnp.float32)
    return (
        task.tokens(batch),
        per_target,
        jax.tree.map(lambda x: x.reshape(parts, -1, *x.shape[1:]), batch),
    )


def cast_like(params: Any, grads: Any) -> Any:
    """Casts gradients to the dtypes of what they are gradients of."""
    return jax.tree.map(lambda p, g: g.astype(p.dtype), params, grads)


def sum_of_squares(grads: Any) -> jax.Array:
    """Sums the squares of a whole tree, () float32."""
    return optax.tree.norm(jax.tree.map(lambda g: g.astype(jnp.float32), grads), squared=True)


def gradient_norm(grads: Any) -> jax.Array:
    """Computes the norm of a whole tree, () float32."""
    return jnp.sqrt(sum_of_squares(grads))


def sum_over_parts(loss_and_grad, variables: Any, parts: Batch, first=()) -> tuple[Any, Any]:
    """Sums (loss, gradients) over parts in float32, starting from ``first`` if there is one."""
    if not first and len(jax.tree.leaves(parts)[0]) == 1:
        return loss_and_grad(variables, jax.tree.map(lambda x: x[0], parts))

    def add(carry, part):
        return jax.tree.map(lambda total, x: total + x, carry, loss_and_grad(variables, part)), None

    start = first or (jnp.float32(0.0), jax.tree.map(jnp.zeros_like, variables))
    start = jax.tree.map(lambda x: x.astype(jnp.float32), start)
    (loss, grads), _ = jax.lax.scan(add, start, parts)
    return loss, grads


def make_eval_step(model: Stages, task: Task) -> Callable[[Any, Batch], Any]:
    """Makes a pure function of (params, batch) that gives what the task's evaluation needs."""
    return lambda params, batch: task.judge(model.forward(params, batch), batch)


def all_finite(state: TrainState) -> jax.Array:
    """Tells whether no weight and no moment is NaN or infinite, () bool."""
    leaves = [x for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.floating)]
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in leaves]).all()
