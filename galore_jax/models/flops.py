"""Floating-point operations of training, counted from a model's sizes."""

from galore_jax.models.config import LlamaConfig


def training_flops_per_token(model: LlamaConfig, seq_len: int) -> int:
    r"""Counts the operations of a forward and a backward pass for one token.

    A product of T x m and m x n takes $2 T m n$, and twice that in the backward pass. Counted are
    the linears of the blocks, the head, and attention's two products with all positions of a
    sequence, masked ones too. What is computed again to save memory, and what projected gradients
    leave out, does not count: "model FLOPs utilisation" compares methods by what they get done.

    Args:
      model: the sizes.
      seq_len: tokens a sequence.

    References:
      Chowdhery et al., PaLM, 2022, https://arxiv.org/abs/2204.02311, appendix B

    >>> from galore_jax.models.presets import PRESETS
    >>> round(training_flops_per_token(PRESETS["llama_7b"], 256) / 1e9, 1)
    40.0
    """
    width, heads = model.hidden_size, model.num_heads * model.head_size
    key_values = model.kv_heads * model.head_size
    attention = 2 * width * heads + 2 * width * key_values
    linears = model.num_layers * (attention + 3 * width * model.intermediate_size)
    head = width * model.vocab_size
    positions = 2 * model.num_layers * heads * seq_len
    return 6 * (linears + head + positions)
