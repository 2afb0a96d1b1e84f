"""A run in a few lines, before it begins."""

import jax

from galore_jax.models.llama import count_params
from galore_jax.training.config import galore_rank, uses_galore
from galore_jax.training.experiment import Experiment


def summary(experiment: Experiment) -> str:
    """Describes in a few lines what will run."""
    config, model, schedule = experiment.config, experiment.model, experiment.config.schedule
    settings, low_rank = config.optimizer, config.galore
    method = f"{settings.name} on the full gradients"
    if uses_galore(config):
        rank = galore_rank(config)
        if isinstance(rank, dict):
            rank = ", ".join(
                f"{number} ({pattern or 'all other'})" for pattern, number in rank.items()
            )
        method = f"{config.method} with {settings.name}: rank {rank}, new projector every "
        method += f"{low_rank.update_proj_gap} updates, scale {low_rank.scale:g}"
        if low_rank.lazy_refresh is not None:
            method += f", lazy from an overlap of {low_rank.lazy_refresh:g}"
        if low_rank.recovery is not None:
            method += f", recovery by {low_rank.recovery}"
    elif config.method != "full":
        lora = config.lora
        method = f"{config.method} with {settings.name}: rank {lora.rank}"
        if config.method != "low_rank":
            method += f", alpha {lora.alpha:g}, dropout {lora.dropout:g}"
        if config.method == "relora":
            method += f", merged every {config.relora.merge_every_steps} updates"
    device = jax.local_devices()[0].device_kind
    params = count_params(experiment.abstract_state().params)
    begin = f", from {config.init_from}" if config.init_from is not None else ""
    return (
        f"model   {params / 1e6:,.2f}M parameters: hidden {model.hidden_size}, "
        f"{model.num_layers} layers, vocabulary {model.vocab_size}, {config.param_dtype}{begin}\n"
        f"method  {method}\n"
        f"data    {experiment.task.describe(config.batch_size)}\n"
        f"run     {config.train_steps} updates, peak learning rate {schedule.peak_lr:g}, "
        f"seed {config.seed}, on {device} with jax {jax.__version__}"
    )
