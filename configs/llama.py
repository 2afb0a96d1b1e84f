r"""The paper's LLaMAs on C4 (60m to 7b), and for one card 7b_24gb, 7b_16gb, 7b_12gb, 13b_24gb.

  python train.py --config=configs/llama.py:60m --config.data.data_dir=DIR \
      --config.data.tokenizer=SPIECE_MODEL --workdir=runs/60m

Updates are of 512 x 256 tokens; tokens are counted with padding (the paper's, without). The last
two columns are the perplexities to expect, from the paper's Tables 2 and 3. No row has been run
here from start to end.

| row  | parameters | rank | updates | tokens       | GaLore | AdamW |
|------|------------|------|---------|--------------|--------|-------|
| 60m  | 58.07M     | 128  | 10,000  | 1.3B (1.1B)  | 34.88  | 34.06 |
| 130m | 134.11M    | 256  | 20,000  | 2.6B (2.2B)  | 25.36  | 25.08 |
| 350m | 367.97M    | 256  | 60,000  | 7.9B (6.4B)  | 18.95  | 18.80 |
| 1b   | 1339.08M   | 512  | 100,000 | 13.1B        | 15.64  | 15.56 |
| 7b   | 6738.42M   | 1024 | 150,000 | 19.7B        | 14.65  | 14.61 |

The perplexities of 7b are with 8-bit states: configs/llama.py:7b,optimizer=adamw8bit. Arguments
combine, as in configs/llama.py:60m,method=full,optimizer=adafactor; method=full takes a learning
rate from the range that the paper searched for its baseline, whose choice it does not name.

7b_24gb pre-trains the same 7B model on one card of 24 GB: 8-bit states, layerwise updates,
recomputed blocks, no clipping.

  XLA_PYTHON_CLIENT_MEM_FRACTION=0.95 python train.py --config=configs/llama.py:7b_24gb \
      --config.data.data_dir=DIR --config.data.tokenizer=SPIECE_MODEL --workdir=runs/7b_24gb
  python -m galore_jax.memory --config=configs/llama.py:7b_24gb --target=rtx4090

Compiled for an RTX 4090 (23.51 GiB), not run on it, its steps take 19.65 GiB, and 19.79 at a
refresh (jax and jaxlib 0.10.2). An update is of 16 x 256 tokens, as in the reference's script for
one card, whose hooks step at every micro-batch: for 512 sequences the blocks' inputs would take
32 GiB, and float32 sums of the projected gradients 7.3 GiB. 4,800,000 updates are the 19.7B tokens
of 7b; the perplexity to expect is not known.

7b_12gb, 7b_16gb and 13b_24gb keep the weights in int8 and the projectors in int4 as well, with the
learning rate that Q-GaLore (arXiv:2407.08296) has for 7B (docs/int8.md). Updates are of 16 x 256
tokens in micro-batches of one. 7b_12gb has rank 512, with which such an update fits 12 GiB, 7b_16gb
has 1024; 13b_24gb is LLaMA-13B at rank 1280. On a T4 give --config.dtype=float16.

  python -m galore_jax.memory --config=configs/llama.py:7b_12gb --target=rtx3060
  python -m galore_jax.memory --config=configs/llama.py:13b_24gb --target=rtx4090

70b has the shape of LLaMA-2-70B, for the memory report of a mesh (--mesh, docs/scale_out.md), and
7b's settings for want of others.

Source: Zhao et al. 2024 (arXiv:2403.03507), sections 5.1 and 5.2 and appendix C.1; the reference's
scripts/.
"""

import dataclasses

from ml_collections import ConfigDict

from configs import base
from galore_jax.errors import UserError
from galore_jax.models.presets import PRESETS

# Updates, sequences at a time, rank, update_proj_gap; peak learning rates of GaLore and of "full".
ROWS = {
    "60m": (10_000, 128, 128, 200, 0.01, 0.001),
    "130m": (20_000, 128, 256, 200, 0.01, 0.001),
    "350m": (60_000, 64, 256, 200, 0.01, 0.001),
    "1b": (100_000, 32, 512, 200, 0.01, 0.0005),
    "7b": (150_000, 16, 1024, 500, 0.005, 0.0005),
    "7b_24gb": (4_800_000, 16, 1024, 500, 0.005, 0.0005),
    "7b_12gb": (4_800_000, 1, 512, 500, 0.004, 0.0005),
    "7b_16gb": (4_800_000, 1, 1024, 500, 0.004, 0.0005),
    "13b_24gb": (4_800_000, 1, 1280, 500, 0.004, 0.0005),
    "70b": (150_000, 16, 2048, 500, 0.005, 0.0005),
}
INT8_ROWS = ("7b_12gb", "7b_16gb", "13b_24gb")


def get_config(arg: str = "") -> ConfigDict:
    row, _, rest = arg.partition(",")
    if row not in ROWS:
        raise UserError(
            f"configs/llama.py has no row {row!r}; give one of {', '.join(ROWS)} after the colon, "
            "as in --config=configs/llama.py:60m,method=full"
        )
    size, _, card = row.partition("_")
    config = base.get_config(f"optimizer=adamw8bit,{rest}" if card else rest)
    sizes = dataclasses.asdict(PRESETS[f"llama_{size}"])
    config.model.update({key: sizes[key] for key in config.model})
    steps, micro_batch, rank, gap, galore_lr, full_lr = ROWS[row]
    config.train_steps = steps
    config.micro_batch_size = micro_batch
    config.galore.rank = config.lora.rank = rank
    config.galore.update_proj_gap = gap
    config.schedule.peak_lr = full_lr if config.method == "full" else galore_lr
    config.remat = size in ("1b", "7b", "13b", "70b")
    if row == "7b":
        config.optimizer.clip_norm = 1.0
    if card:
        config.batch_size = 16
        config.updates = "layerwise"
        config.eval_every_steps = config.checkpoint_every_steps = 32_000
    if row in INT8_ROWS:
        config.param_dtype = "int8"
        config.galore.projector_bits = 4
    return config
