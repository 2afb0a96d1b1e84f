"""From a config to an Optax optimizer."""

import difflib
import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
import optax.contrib

from galore_jax.adam8bit import adamw8bit
from galore_jax.aliases import galore_muon
from galore_jax.errors import UserError
from galore_jax.galore import galore
from galore_jax.models.stages import LAYERS
from galore_jax.norm_growth import clip_by_norm_growth
from galore_jax.per_layer import per_layer
from galore_jax.training.config import (
    Config,
    galore_rank,
    target_modules,
    uses_galore,
    warmup_steps,
)
from galore_jax.weights import projection_mask

_SETTINGS = ("b1", "b2", "eps", "weight_decay")
# What these aliases call some of them.
_OWN_NAMES = {
    "adafactor": {"b1": "momentum"},
    "sgd": {"b1": "momentum"},
    "rmsprop": {"b1": "momentum", "b2": "decay"},
    "muon": {"b1": "beta"},
}
# lbfgs and sophia want the loss as a function, dpsgd a gradient for each sequence; rprop, sm3 and
# optimistic_adam take no schedule; galore is what method="galore" is for.
_EXCLUDED = ("lbfgs", "sophia", "dpsgd", "rprop", "sm3", "optimistic_adam", "galore")
# As the reference uses its Adafactor: the learning rate is absolute.
_FIXED = {"adafactor": {"multiply_by_parameter_scale": False}}


def make_schedule(config: Config) -> optax.Schedule:
    """Makes a linear warm-up from 0 to the peak, then a decay to ``final_lr_ratio`` of it.

    The paper's pre-training decays by a cosine (appendix C.1), its fine-tuning by a line. With
    ReLoRA the rate also rises from 0 after each merge. Called with the number of updates already
    made, so that the first update has learning rate 0 if there is any warm-up.
    """
    schedule, warmup = config.schedule, warmup_steps(config)
    end = schedule.peak_lr * schedule.final_lr_ratio
    if schedule.decay == "linear":
        falling = optax.linear_schedule(schedule.peak_lr, end, config.train_steps - warmup)
        rising = optax.linear_schedule(0.0, schedule.peak_lr, max(warmup, 1))
        decay = optax.join_schedules([rising, falling], [warmup]) if warmup else falling
    else:
        decay = optax.warmup_cosine_decay_schedule(
            init_value=0.0 if warmup else schedule.peak_lr,
            peak_value=schedule.peak_lr,
            warmup_steps=warmup,
            decay_steps=config.train_steps,
            end_value=end,
        )
    if config.method != "relora":
        return decay
    merge_every, restart = config.relora.merge_every_steps, config.relora.restart_warmup_steps

    def restarting(count: Any) -> Any:
        rising = jnp.minimum((count % merge_every) / max(restart, 1), 1.0)
        return decay(count) * jnp.where(count < merge_every, 1.0, rising if restart else 1.0)

    return restarting


def make_optimizer(
    config: Config, schedule: optax.Schedule, *, stacked: bool = True
) -> optax.GradientTransformationExtraArgs:
    """Makes a run's optimizer: clipping, then the alias, in GaLore or on the full gradients.

    It takes each layer by itself: ``stacked``, the layers of a model's stacked blocks; otherwise
    a model of which there is one layer, without the leading axis.

    But with GaLore, ``optimizer.matrix_lr_scale`` multiplies the updates (decay included, as
    a learning rate of their own would) of the matrices that GaLore would project, or their factors.

    Raises:
      UserError: an alias that is not there or needs more than a learning rate; a setting that it
        does not take.
    """
    settings, options = config.optimizer, config.galore.to_dict()
    options["target_modules"] = targets = target_modules(config)
    options["rank"] = galore_rank(config)
    del options["refresh_from"]  # the steps' own
    layers = LAYERS if stacked else None
    # A part of the weights, as layerwise updates have it, may hold no matrix.
    find_matrices = functools.partial(projection_mask, target_modules=targets, must_match=False)
    if config.method == "galore_muon":
        optimizer = _muon(config, schedule, stacked_modules=layers, **options)
    elif config.method == "galore":
        optimizer = _alias(config, schedule, find_matrices)  # which sees single layers
        optimizer = galore(optimizer, stacked_modules=layers, **options)
    else:
        optimizer = _alias(config, schedule, find_matrices)
        optimizer = per_layer(optimizer, LAYERS) if stacked else optimizer
    if not uses_galore(config) and settings.matrix_lr_scale != 1.0:
        matrices = optax.masked(
            optax.scale(settings.matrix_lr_scale),
            functools.partial(find_matrices, stacked_modules=layers),
        )
        optimizer = optax.chain(optimizer, matrices)
    if settings.clip_norm is not None:
        optimizer = optax.chain(optax.clip_by_global_norm(settings.clip_norm), optimizer)
    return optax.with_extra_args_support(optimizer)


def uses_matrices(config: Config) -> bool:
    """Tells whether the optimizer treats the matrices of ``target_modules`` apart."""
    settings = config.optimizer
    return uses_galore(config) or settings.matrix_lr_scale != 1.0 or settings.name == "muon"


def _alias(
    config: Config, schedule: optax.Schedule, find_matrices: Callable[[optax.Params], Any]
) -> optax.GradientTransformation:
    settings = config.optimizer
    make = _find(settings.name)
    parameters = inspect.signature(make).parameters
    own_names = _OWN_NAMES.get(settings.name, {})
    arguments: dict[str, Any] = dict(_FIXED.get(settings.name, {}))
    if settings.name == "muon":  # the matrices that GaLore would project, each layer's by itself
        numbers = optax.contrib.MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)
        arguments["muon_weight_dimension_numbers"] = lambda params: jax.tree.map(
            lambda is_matrix: numbers if is_matrix else None, find_matrices(params)
        )
    if "key" in parameters:  # noisy_sgd
        arguments["key"] = jax.random.key(config.seed)
    for key in _SETTINGS:
        value, name = settings[key], own_names.get(key, key)
        if name in parameters and value is not None:
            arguments[name] = value
        elif value:
            takes = [k for k in _SETTINGS if own_names.get(k, k) in parameters]
            raise UserError(
                f"config.optimizer.{key}={value} is not for {settings.name}, which takes "
                + (", ".join(takes) or f"none of {', '.join(_SETTINGS)}")
            )
    try:
        return _limited(config, make(schedule, **arguments))
    except (TypeError, ValueError) as error:
        raise UserError(f"config.optimizer.name={settings.name} cannot be used: {error}") from error


def _muon(
    config: Config, schedule: optax.Schedule, **options: Any
) -> optax.GradientTransformationExtraArgs:
    settings = config.optimizer
    given = {key: settings[key] for key in _SETTINGS if settings[key] is not None}
    return galore_muon(
        schedule,
        beta=config.muon.beta,
        rounds=config.muon.rounds,
        bits=8 if settings.name == "adamw8bit" else None,
        most_growth=settings.clip_growth,
        **given,
        **options,
    )


def _limited(
    config: Config, optimizer: optax.GradientTransformation
) -> optax.GradientTransformation:
    growth = config.optimizer.clip_growth
    if growth is None:
        return optimizer
    return optax.chain(clip_by_norm_growth(growth), optimizer)


def aliases() -> dict[str, Callable[..., optax.GradientTransformation]]:
    """Finds what ``optimizer.name`` may be: aliases that need a learning rate and no more."""
    of_optax = {
        name: make
        for module in (optax.contrib, optax)
        for name, make in inspect.getmembers(module, inspect.isfunction)
        if next(iter(inspect.signature(make).parameters), None) == "learning_rate"
        and not name.startswith(("_", "scale_by_"))
        and name not in _EXCLUDED
    }
    return {**of_optax, "adamw8bit": adamw8bit}


def _find(name: str) -> Callable[..., optax.GradientTransformation]:
    known = aliases()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]}?" if near else ", ".join(sorted(known))
        raise UserError(
            f"config.optimizer.name={name!r} is no alias of optax or optax.contrib that can be "
            f"used here; {hint}"
        )
    return known[name]
