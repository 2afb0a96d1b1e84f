"""A 9M-parameter LLaMA on the offline sample of real English: minutes on two CPU cores."""

from ml_collections import ConfigDict

from configs import base


def get_config(arg: str = "") -> ConfigDict:
    config = base.get_config(arg)
    config.train_steps = 600
    config.batch_size = 8
    config.micro_batch_size = 8
    config.log_every_steps = 10
    config.eval_every_steps = 200
    config.eval_tokens = 50_000
    config.checkpoint_every_steps = 100
    config.dtype = "float32"
    config.param_dtype = "float32"

    config.model.vocab_size = 8192
    config.model.hidden_size = 256
    config.model.intermediate_size = 688
    config.model.num_layers = 6
    config.model.num_heads = 4

    config.data.name = "sample"
    config.data.seq_len = 128
    config.data.packing = True

    config.schedule.peak_lr = 0.01
    config.galore.rank = 64
    config.galore.update_proj_gap = 50
    return config
