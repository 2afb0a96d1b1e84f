"""Every config key, with its default: the paper's recipe without the sizes of a model.

The other files of this folder start from here and are what ``--config`` takes.
"""

from ml_collections import ConfigDict, config_dict

from galore_jax.errors import UserError
from galore_jax.training.config import METHODS


def get_config(arg: str = "") -> ConfigDict:
    """The defaults, with what follows the colon in ``--config=FILE:method=full,optimizer=adamw``.

    Raises:
      UserError: an argument that is not ``method=NAME`` or ``optimizer=NAME``.
    """
    config = ConfigDict()

    # "galore"; "galore_muon": with orthogonalised momentum; "full": the optimizer on the full
    # gradients; "lora" and "relora": low-rank parts of frozen matrices; "low_rank": matrices that
    # are products of two factors. Choose after the colon
    # of --config, as in --config=configs/llama.py:60m,method=full, so that the learning rate goes
    # with it.
    config.method = "galore"
    # "language_modelling", with the LLaMA of config.model; or a task of GLUE, with the encoder of
    # config.encoder: cola, stsb, mrpc, rte, sst2, mnli, qnli or qqp.
    config.task = "language_modelling"
    # Go on from a model in Hugging Face's format: a folder, whose sizes take the place of those of
    # config.model or config.encoder, and whose tokenizer that of config.data.tokenizer where that
    # is None. "minilm": a small BERT that pip fetches, or random weights where it cannot.
    config.init_from = config_dict.placeholder(str)
    config.seed = 0  # of the initial weights and of the order of the data
    config.train_steps = 10_000  # updates
    # Of GLUE: updates counted in epochs, in the place of train_steps. None: train_steps.
    config.train_epochs = config_dict.placeholder(float)
    config.batch_size = 512  # sequences an update
    config.micro_batch_size = 16  # sequences at a time; their gradients add up to a batch
    config.log_every_steps = 10  # a line of metrics.jsonl
    config.eval_every_steps = 1_000  # 0: only at the end
    # With train_epochs: in the place of eval_every_steps. None: eval_every_steps.
    config.eval_every_epochs = config_dict.placeholder(float)
    config.eval_tokens = 10_000_000  # held-out tokens an evaluation, to the next whole batch
    config.checkpoint_every_steps = 1_000  # 0: only at the end
    config.keep_checkpoints = 2  # the newest ones
    config.tensorboard = False  # write event files to the workdir too
    config.dtype = "bfloat16"  # of activations and matrix products
    # Of weights, gradients, projectors and moments. "int8": of weights alone, all else in dtype;
    # no copy in floats is kept (docs/int8.md).
    config.param_dtype = "bfloat16"
    # Of bfloat16 and int8 weights: "nearest" loses updates below about a 256th of one, "stochastic"
    # not. None: "stochastic" for int8, else "nearest".
    config.param_rounding = config_dict.placeholder(str)
    # "standard": all gradients, then all updates. "layerwise": each layer's weights are updated as
    # soon as its gradient is there, so that one layer's exists at a time (README, "Modes").
    config.updates = "standard"
    # With GaLore: never form a full gradient between two refreshes. None: True where it can be,
    # that is without optimizer.clip_norm and galore.recovery, which are of the full gradient.
    config.projected_gradients = config_dict.placeholder(bool)
    config.ignore_memory_plan = False  # start even if the compiler's plan exceeds the memory
    config.remat = False  # recompute each block in the backward pass, to save memory

    config.model = ConfigDict()
    config.model.vocab_size = 32_000  # at least the tokenizer's
    config.model.hidden_size = 512  # width of the residual stream
    config.model.intermediate_size = 1376  # inside the gated MLP
    config.model.num_layers = 8  # blocks
    config.model.num_heads = 8  # query heads
    config.model.num_kv_heads = config_dict.placeholder(int)  # None: num_heads
    config.model.head_dim = config_dict.placeholder(int)  # None: hidden_size / num_heads
    config.model.rms_norm_eps = 1e-6  # added to the mean square
    config.model.rope_theta = 1e4  # base of the rotary frequencies
    # None, or Llama 3's (factor, low_freq_factor, high_freq_factor, original positions)
    config.model.rope_scaling = config_dict.placeholder(tuple)
    config.model.max_positions = config_dict.placeholder(int)  # it was made for; None: seq_len
    config.model.tie_embeddings = False  # the embedding's transpose as the head
    config.model.init_std = 0.02  # of embedding, kernels and head
    config.model.attention_implementation = config_dict.placeholder(str)  # None, "xla", "cudnn"
    config.model.loss_chunk_tokens = 1024  # rows of logits that exist at a time

    config.encoder = ConfigDict()
    config.encoder.kind = "roberta"  # or "bert"
    config.encoder.vocab_size = 50_265  # at least the tokenizer's
    config.encoder.hidden_size = 768
    config.encoder.intermediate_size = 3072  # inside the feed-forward part
    config.encoder.num_layers = 12  # blocks
    config.encoder.num_heads = 12
    config.encoder.position_rows = 514  # of the table; RoBERTa leaves pad_id + 1 of them unused
    config.encoder.type_vocab_size = 1  # token types
    config.encoder.layer_norm_eps = 1e-5  # added to the variance
    config.encoder.pad_id = 1  # fills short rows
    config.encoder.hidden_dropout = 0.1  # of the outputs of embedding and sublayers, in training
    config.encoder.attention_dropout = 0.1  # of attention's probabilities
    # Of the head's inputs; None: hidden_dropout.
    config.encoder.classifier_dropout = config_dict.placeholder(float)
    config.encoder.init_std = 0.02  # of embeddings and kernels, and of a new head

    config.data = ConfigDict()
    # "c4", or "sample": English that needs no download; for GLUE's tasks "glue", or "reviews":
    # sentences that pip fetches, for the task sst2.
    config.data.name = "c4"
    config.data.data_dir = config_dict.placeholder(str)  # the folder that holds C4 or GLUE
    # A SentencePiece model, a tokenizer.json or a folder with either; None: the sample's own.
    config.data.tokenizer = config_dict.placeholder(str)
    config.data.seq_len = 256  # tokens a sequence
    config.data.packing = False  # False: a document a row, cut or padded, as in the paper

    config.schedule = ConfigDict()
    config.schedule.peak_lr = 0.01  # reached at the end of the warm-up
    config.schedule.warmup_steps = config_dict.placeholder(int)  # None: a tenth of train_steps
    config.schedule.decay = "cosine"  # or "linear"
    config.schedule.final_lr_ratio = 0.1  # to this part of peak_lr at train_steps

    config.optimizer = ConfigDict()
    # "adamw8bit", or any alias of optax or optax.contrib.
    config.optimizer.name = "adamw"
    config.optimizer.b1 = config_dict.placeholder(float)  # None: the alias's own default
    config.optimizer.b2 = config_dict.placeholder(float)  # None: the alias's own default
    config.optimizer.eps = config_dict.placeholder(float)  # None: the alias's own default
    config.optimizer.weight_decay = 0.0  # decoupled, of every weight; times the learning rate
    config.optimizer.clip_norm = config_dict.placeholder(float)  # of the whole gradient; None: no
    # Most growth of each gradient's norm from one update to the next, as 1.01; None: any. With
    # GaLore of the low-rank gradients; for each matrix by itself, also with layerwise updates.
    config.optimizer.clip_growth = config_dict.placeholder(float)
    # Not for "galore": factor on the updates of the matrices that it would project, or of their
    # low-rank factors. GaLore's scale is in effect a second learning rate, and a fair baseline has
    # the same knob.
    config.optimizer.matrix_lr_scale = 1.0

    config.galore = ConfigDict()
    # A number, or ranks by regular expressions on the weights' paths, of which the first that
    # matches counts: (("q_proj|k_proj", 64), ("down_proj", 256), ("", 128)), or a dict.
    config.galore.rank = config_dict.FieldReference(128, field_type=object)
    config.galore.update_proj_gap = 200  # updates between two refreshes of the projectors
    config.galore.scale = 0.25  # factor on the updates of the projected matrices
    # "std": project the smaller side; "reverse_std": the larger; "full": both; "left"; "right"
    config.galore.proj_type = "std"
    # "svd" (the paper's) and "eigh": exact; "subspace_iteration": as good at a fraction of the time
    # (docs/projectors_sample.md, docs/refresh.md); "randomized"; "random": whatever the gradient
    config.galore.projector = "subspace_iteration"
    config.galore.power_iterations = 2  # rounds of subspace_iteration and randomized at a refresh
    config.galore.rotate_moments = True  # first moments follow a refresh; False in the paper
    # Where a new projector comes from, with projected gradients and several micro-batches: the full
    # gradient of the whole "batch" (added up in float32), or of its first "micro_batch".
    config.galore.refresh_from = "batch"
    config.galore.projector_dtype = config_dict.placeholder(str)  # None: param_dtype
    config.galore.projector_bits = config_dict.placeholder(int)  # 8 or 4 for integers; None: dtype
    config.galore.target_modules = ("attn", "mlp")  # regular expressions on the weights' paths

    # From 0 to 1: a matrix whose successive projectors overlap by at least this much waits twice as
    # long for the next one (docs/int8.md); None: all are refreshed every update_proj_gap updates.
    config.galore.lazy_refresh = config_dict.placeholder(float)

    # "column" or "matrix": add the gradient outside the subspace, scaled as the optimizer scales
    # what is inside, by columns or by matrices (Fira). It needs the full gradients.
    config.galore.recovery = config_dict.placeholder(str)

    config.muon = ConfigDict()  # of the method galore_muon
    config.muon.beta = 0.95  # decay of the momentum
    config.muon.rounds = 5  # of the orthogonalisation

    config.lora = ConfigDict()  # of the methods lora, relora and low_rank
    config.lora.rank = 128
    config.lora.alpha = 32.0  # the low-rank part is multiplied by alpha / rank; not in low_rank
    config.lora.dropout = 0.05  # of the inputs of the low-rank part, in training; not in low_rank
    config.lora.target_modules = ("attn", "mlp")  # regular expressions on the weights' paths
    # Regular expressions on the paths of other weights that LoRA trains, whole; the rest is frozen.
    # None: all others are trained.
    config.lora.train_rest = config_dict.placeholder(tuple)

    config.relora = ConfigDict()
    config.relora.merge_every_steps = 5_000  # updates between two merges
    config.relora.restart_warmup_steps = 100  # updates in which the rate rises again after one
    config.relora.prune_ratio = 0.999  # part of the factors' moments that a merge sets to zero

    for item in filter(None, arg.split(",")):
        key, _, value = item.partition("=")
        if key == "method" and value in METHODS:
            config.method = value
        elif key == "optimizer" and value:
            config.optimizer.name = value
        else:
            raise UserError(
                f"config argument {item!r} is unknown; after the colon of --config go "
                f"method={'|'.join(METHODS)} and optimizer=NAME, separated by commas"
            )
    return config
