"""From a config to an Optax optimizer."""

import difflib
import inspect
from collections.abc import Callable
from typing import Any

import jax
import optax
import optax.contrib

from galore_jax.adam8bit import adamw8bit
from galore_jax.errors import UserError
from galore_jax.selection import is_projected
from galore_jax.stacks import per_layer
from galore_jax.training.settings import Config, learning_rate
from galore_jax.transform import galore

_SETTINGS = ("b1", "b2", "eps", "weight_decay")
LAYERS = "^blocks/"  # the leaves whose first axis indexes layers
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


def make_optimizer(
    config: Config, *, stacked: bool = True
) -> optax.GradientTransformationExtraArgs:
    """The optimizer of a run: clipping, then the alias, in GaLore or on the full gradients.

    It takes each layer by itself: ``stacked``, the layers of a model's stacked blocks; otherwise
    a model of which there is one layer, without the leading axis.

    With ``method="full"``, ``optimizer.matrix_lr_scale`` multiplies the updates (decay included, as
    a learning rate of their own would) of the matrices that GaLore would project.

    Raises:
      UserError: an alias that is not there or needs more than a learning rate; a setting that it
        does not take.
    """
    settings, low_rank = config.optimizer, config.galore
    optimizer = _alias(config)
    if config.method == "galore":
        optimizer = galore(
            optimizer,
            rank=low_rank.rank,
            update_proj_gap=low_rank.update_proj_gap,
            scale=low_rank.scale,
            proj_type=low_rank.proj_type,
            target_modules=tuple(low_rank.target_modules),
            stacked_modules=LAYERS if stacked else None,
            basis=low_rank.basis,
            power_iterations=low_rank.power_iterations,
            transport=low_rank.transport,
            projector_dtype=low_rank.projector_dtype,
            projector_bits=low_rank.projector_bits,
        )
    elif stacked:
        optimizer = per_layer(optimizer, LAYERS)
    if config.method == "full" and settings.matrix_lr_scale != 1.0:
        targets = tuple(low_rank.target_modules)
        matrices = optax.masked(
            optax.scale(settings.matrix_lr_scale), lambda params: is_projected(params, targets)
        )
        optimizer = optax.chain(optimizer, matrices)
    if settings.clip_norm is not None:
        optimizer = optax.chain(optax.clip_by_global_norm(settings.clip_norm), optimizer)
    return optax.with_extra_args_support(optimizer)


def _alias(config: Config) -> optax.GradientTransformation:
    settings = config.optimizer
    make = _find(settings.name)
    parameters = inspect.signature(make).parameters
    own_names = _OWN_NAMES.get(settings.name, {})
    arguments: dict[str, Any] = dict(_FIXED.get(settings.name, {}))
    if settings.name == "muon":
        arguments["muon_weight_dimension_numbers"] = _muon_matrices(config)
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
        return make(learning_rate(config), **arguments)
    except (TypeError, ValueError) as error:
        raise UserError(f"config.optimizer.name={settings.name} cannot be used: {error}") from error


def _muon_matrices(config: Config) -> Callable[[optax.Params], Any]:
    """Muon's matrices: those that GaLore would project, each layer's by itself."""
    targets = tuple(config.galore.target_modules)
    numbers = optax.contrib.MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)

    def of_params(params: optax.Params) -> Any:
        mask = is_projected(params, targets)
        return jax.tree.map(lambda selected: numbers if selected else None, mask)

    return of_params


def aliases() -> dict[str, Callable[..., optax.GradientTransformation]]:
    """The aliases that ``optimizer.name`` may be: those that need a learning rate and no more."""
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
