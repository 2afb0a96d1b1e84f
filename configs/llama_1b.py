r"""The paper's LLaMA 1B on C4: 1339.08M parameters, rank 512, 100,000 updates of 512 x 256 tokens.

  python train.py --config=configs/llama_1b.py --config.data.data_dir=DIR \
      --config.data.tokenizer=SPIECE_MODEL --workdir=runs/1b

13.1B tokens with padding. Expected perplexity: 15.64 with GaLore, 15.56 with full-rank AdamW
(paper, Table 2). Not yet run here from start to end. Source: Zhao et al. 2024 (arXiv:2403.03507),
section 5.1 and appendix C.1; the reference's scripts/. ``method=full`` takes a learning rate from
the range that the paper searched for its baseline, whose choice it does not name.
"""

from ml_collections import ConfigDict

from configs import base


def get_config(arg: str = "") -> ConfigDict:
    config = base.get_config(arg)
    base.set_model(config, "llama_1b")
    config.train_steps = 100_000
    config.micro_batch_size = 32
    config.schedule.peak_lr = 0.01 if config.method == "galore" else 0.0005
    config.galore.rank = 512
    config.galore.update_proj_gap = 200
    config.remat = True
    return config
