"""A 9M-parameter LLaMA on the offline sample of real English: minutes on two CPU cores.

  python train.py
  python train.py --config=configs/sample.py:method=full

600 updates of 8 x 128 tokens. Held-out loss, from ln(8192) = 9.01 nats a token: 4.764 with GaLore
(mean of three seeds, standard deviation 0.025, docs/projectors_sample.md; jax 0.10.2, botocore
1.44.8, CPU). The learning rates are the best of the grid in docs/sweep_sample.md.
"""

from ml_collections import ConfigDict

from configs import base


def get_config(arg: str = "") -> ConfigDict:
    config = base.get_config(arg)
    config.train_steps = 600
    config.batch_size = 8
    config.micro_batch_size = 8
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

    config.schedule.peak_lr = 0.02
    config.galore.rank = config.lora.rank = 64
    config.relora.merge_every_steps = 200
    config.relora.restart_warmup_steps = 20
    config.galore.update_proj_gap = 10
    config.galore.scale = 0.0625
    config.optimizer.matrix_lr_scale = 0.03125
    return config
