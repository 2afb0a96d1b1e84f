r"""The paper's LLaMA 7B on C4: 6738.42M parameters, rank 1024, 150,000 updates of 512 x 256 tokens.

  python train.py --config=configs/llama_7b.py --config.data.data_dir=DIR \
      --config.data.tokenizer=SPIECE_MODEL --workdir=runs/7b

19.7B tokens with padding. Expected perplexity: 14.65 with GaLore and 14.61 with AdamW, both with
8-bit states (paper, Table 3). Not yet run here from start to end. Source: Zhao et al. 2024
(arXiv:2403.03507), section 5.2 and appendix C.1; the reference's scripts/. ``method=full`` takes
a learning rate from the range that the paper searched for its baseline, whose choice it does not
name.
"""

from ml_collections import ConfigDict

from configs import base


def get_config(arg: str = "") -> ConfigDict:
    config = base.get_config(arg)
    base.set_model(config, "llama_7b")
    config.train_steps = 150_000
    config.micro_batch_size = 16
    config.schedule.peak_lr = 0.005 if config.method == "galore" else 0.0005
    config.galore.rank = 1024
    config.galore.update_proj_gap = 500
    config.optimizer.clip_norm = 1.0
    config.remat = True
    return config
