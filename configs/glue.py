r"""RoBERTa on GLUE, as in the paper's Table 4: configs/glue.py:cola,method=galore,rank=4.

  python train.py --config=configs/glue.py:cola,method=galore,rank=4 \
      --config.data.data_dir=DIR --config.init_from=ROBERTA_BASE --workdir=runs/cola

Rows are cola, stsb, mrpc, rte, sst2, mnli, qnli and qqp; methods galore, lora and full; ranks 4
and 8. 30 epochs of 16 examples an update (cola: 32), linear decay without warm-up, dropout 0.1, new
projectors every 500 updates. The scores to expect, from the paper's Table 4 (no row has been run
here); Matthews' correlation for cola, Pearson's for stsb, F1 for mrpc, else accuracy:

| row          | cola  | stsb  | mrpc  | rte   | sst2  | mnli  | qnli  | qqp   |
|--------------|-------|-------|-------|-------|-------|-------|-------|-------|
| full         | 62.24 | 90.92 | 91.30 | 79.42 | 94.57 | 87.18 | 92.33 | 92.28 |
| galore,rank=4| 60.35 | 90.73 | 92.25 | 79.42 | 94.04 | 87.00 | 92.24 | 91.06 |
| lora,rank=4  | 61.38 | 90.57 | 91.07 | 78.70 | 92.89 | 86.82 | 92.18 | 91.29 |
| galore,rank=8| 60.06 | 90.82 | 92.01 | 79.78 | 94.38 | 87.17 | 92.20 | 91.11 |
| lora,rank=8  | 61.83 | 90.80 | 91.90 | 79.06 | 93.46 | 86.94 | 92.25 | 91.22 |

GaLore's scale is 4 at rank 4 and 2 at rank 8. The paper gives the rates of GaLore alone (Table 7);
full fine-tuning takes those of rank 4 here, and LoRA 5e-4 with alpha twice the rank, of which the
paper says nothing.

Source: Zhao et al. 2024 (arXiv:2403.03507), section 5.4 and appendix D.
"""

import difflib

from ml_collections import ConfigDict

from configs import base
from galore_jax.data.glue_tasks import TASKS
from galore_jax.errors import UserError

# GaLore's peak learning rates at ranks 4 and 8.
RATES = {
    "cola": (3e-5, 1e-5),
    "stsb": (1e-5, 3e-5),
    "mrpc": (3e-5, 2e-5),
    "rte": (1e-5, 2e-5),
    "sst2": (1e-5, 2e-5),
    "mnli": (1e-5, 1e-5),
    "qnli": (1e-5, 1e-5),
    "qqp": (1e-5, 2e-5),
}


def with_rank(arg: str) -> tuple[ConfigDict, int]:
    """The base config with what fine-tuning has in common, and the rank of ``rank=4,method=...``.

    Raises:
      UserError: a rank that is none, or what ``configs/base.py`` does not know.
    """
    items = arg.split(",")
    ranks = [item.removeprefix("rank=") for item in items if item.startswith("rank=")]
    config = base.get_config(",".join(item for item in items if not item.startswith("rank=")))
    if len(ranks) > 1 or not all(rank.isdecimal() and int(rank) for rank in ranks):
        raise UserError(f"config argument rank={','.join(ranks)} must be one positive integer")
    rank = int(ranks[0]) if ranks else 4
    config.schedule.warmup_steps = 0
    config.schedule.decay = "linear"
    config.schedule.final_lr_ratio = 0.0
    config.galore.rank = config.lora.rank = rank
    config.galore.scale = 4.0 if rank <= 4 else 2.0
    config.lora.alpha = 2.0 * rank
    config.lora.dropout = 0.0
    config.lora.train_rest = ("head",)
    return config, rank


def get_config(arg: str = "") -> ConfigDict:
    task, _, rest = arg.partition(",")
    if task not in TASKS:
        near = difflib.get_close_matches(task, TASKS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"tasks are {', '.join(TASKS)}."
        raise UserError(
            f"configs/glue.py has no task {task!r}; {hint} As in "
            "--config=configs/glue.py:cola,method=galore,rank=4"
        )
    config, rank = with_rank(rest)
    config.task = task
    config.train_epochs = 30.0
    config.eval_every_epochs = 1.0
    config.batch_size = 32 if task == "cola" else 16
    config.micro_batch_size = config.batch_size
    config.checkpoint_every_steps = 500
    config.dtype = "float32"
    config.param_dtype = "float32"

    config.data.name = "glue"
    config.data.seq_len = 512

    config.schedule.peak_lr = RATES[task][0 if config.method == "full" or rank <= 4 else 1]
    config.galore.update_proj_gap = 500
    if config.method == "lora":
        config.schedule.peak_lr = 5e-4
    return config
