r"""The paper's LLaMA 60M on C4: 58.07M parameters, rank 128, 10,000 updates of 512 x 256 tokens.

  python train.py --config=configs/llama_60m.py --config.data.data_dir=DIR \
      --config.data.tokenizer=SPIECE_MODEL --workdir=runs/60m

1.3B tokens with padding (the paper's 1.1B without). Expected perplexity: 34.88 with GaLore, 34.06
with full-rank AdamW (paper, Table 2). Not yet run here from start to end. Source: Zhao et al.
2024 (arXiv:2403.03507), section 5.1 and appendix C.1; the reference's scripts/. ``method=full``
takes a learning rate from the range that the paper searched for its baseline, whose choice it
does not name.
"""

from ml_collections import ConfigDict

from configs import base


def get_config(arg: str = "") -> ConfigDict:
    config = base.get_config(arg)
    base.set_model(config, "llama_60m")
    config.train_steps = 10_000
    config.micro_batch_size = 128
    config.schedule.peak_lr = 0.01 if config.method == "galore" else 0.001
    config.galore.rank = 128
    config.galore.update_proj_gap = 200
    return config
