"""What makes one LLaMA differ from another."""

import dataclasses
from typing import Any, Literal

import jax.numpy as jnp
from jax.typing import DTypeLike

from galore_jax.errors import UserError

AttentionImplementation = Literal["xla", "cudnn"]


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Llama 3.1's scaling of rotary frequencies (arXiv:2407.21783) for a longer context.

    Attributes:
      factor: by which the lowest frequencies are divided, at least 1.
      low_freq_factor: frequencies of fewer turns within the original context are divided.
      high_freq_factor: frequencies of more turns stay; more than ``low_freq_factor``.
      original_max_positions: the context that the model was first trained on.

    Raises:
      UserError: numbers that do not fit together.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not _is_positive(value):
                raise UserError(f"rope scaling's {field.name} is {value!r}; it must be positive")
        if self.factor < 1:
            raise UserError(f"rope scaling's factor is {self.factor!r}; it must be at least 1")
        if self.low_freq_factor >= self.high_freq_factor:
            raise UserError(
                f"rope scaling's low_freq_factor {self.low_freq_factor} must be less than its "
                f"high_freq_factor {self.high_freq_factor}"
            )


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """The sizes and numerics of a ``galore_jax.models.llama.Llama``.

    Sizes are those of the LLaMA paper (Touvron et al. 2023, arXiv:2302.13971) and of the
    Hugging Face configuration of the same name.

    Attributes:
      hidden_size: D, the width of the residual stream.
      intermediate_size: the width inside the gated MLP.
      num_layers: L, the number of blocks.
      num_heads: the number of query heads.
      num_kv_heads: the number of key and value heads, a divisor of ``num_heads``
        (grouped-query attention, arXiv:2305.13245); None for ``num_heads``.
      head_dim: the width of one head, even; None for ``hidden_size / num_heads``.
      vocab_size: V.
      rms_norm_eps: added to the mean square inside RMSNorm.
      rope_theta: the base of the rotary frequencies.
      rope_scaling: of the rotary frequencies; None for none.
      max_positions: the longest context that the model was made for; None where that is unknown.
        Generation stops there.
      bos_id: the token that begins a text; None if there is none.
      eos_ids: the tokens that end a text.
      tie_embeddings: use the embedding's transpose as the head.
      init_std: standard deviation of the initial embedding, kernels and head.
      dtype: dtype of activations and matrix products. Norm, softmax and rotary arithmetic,
        logits and loss are float32 whatever it is.
      param_dtype: dtype of the parameters. With int8 the matrices are ``Int8Kernel`` nodes, which
        stand for arrays of ``dtype``, and the norms' scales are in ``dtype``.
      attention_implementation: for ``jax.nn.dot_product_attention``, ``"xla"`` or
        ``"cudnn"`` (NVIDIA GPU, 16-bit ``dtype``); None lets JAX choose, save in float32: see
        ``galore_jax.models.attention.causal_attention``.
      remat: keep only each block's input and recompute the block in the backward pass; else
        the outputs of its linears are kept, and only what lies between them recomputed.
      loss_chunk_tokens: rows of logits that exist at a time in the loss.

    Raises:
      UserError: for sizes that do not fit together, or an unknown dtype or attention.

    Example:
      >>> config = LlamaConfig(hidden_size=64, intermediate_size=172, num_layers=2, num_heads=4)
      >>> config.head_size, config.kv_heads
      (16, 4)
    """

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int | None = None
    head_dim: int | None = None
    vocab_size: int = 32000
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1e4
    rope_scaling: RopeScaling | None = None
    max_positions: int | None = None
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    tie_embeddings: bool = False
    init_std: float = 0.02
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32
    attention_implementation: AttentionImplementation | None = None
    remat: bool = False
    loss_chunk_tokens: int = 1024

    def __post_init__(self):
        for name in ("dtype", "param_dtype"):
            dtype = getattr(self, name)
            if name == "param_dtype" and _is_int8(dtype):
                object.__setattr__(self, name, jnp.dtype(jnp.int8))
                continue
            object.__setattr__(self, name, floating_dtype(name, dtype))
        sizes = ("hidden_size", "intermediate_size", "num_layers", "num_heads", "vocab_size")
        optional = ("num_kv_heads", "head_dim", "max_positions")
        for name in (*sizes, *optional, "loss_chunk_tokens"):
            size = getattr(self, name)
            if size is None and name in optional:
                continue
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise UserError(f"{name} is {size!r}; it must be a positive integer")
        for name in ("rms_norm_eps", "rope_theta", "init_std"):
            if not _is_positive(getattr(self, name)):
                raise UserError(f"{name} is {getattr(self, name)!r}; it must be positive")
        if not isinstance(self.tie_embeddings, bool):
            raise UserError(f"tie_embeddings is {self.tie_embeddings!r}; it must be True or False")
        for token in (*self.eos_ids, *([] if self.bos_id is None else [self.bos_id])):
            if isinstance(token, bool) or not isinstance(token, int):
                raise UserError(f"the special token {token!r} is no id; ids are integers")
        if self.head_dim is None and self.hidden_size % self.num_heads:
            raise UserError(
                f"hidden_size {self.hidden_size} is not a multiple of num_heads {self.num_heads};"
                " change either, or give head_dim"
            )
        if self.num_heads % self.kv_heads:
            raise UserError(
                f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.kv_heads};"
                " each key-value head must serve equally many query heads"
            )
        if self.head_size % 2:
            raise UserError(
                f"the head size is {self.head_size}; rotary embeddings turn pairs, so make it even"
            )
        if self.attention_implementation not in (None, "xla", "cudnn"):
            raise UserError(
                f"attention_implementation is {self.attention_implementation!r};"
                " it must be None, 'xla' or 'cudnn'"
            )
        if self.attention_implementation == "cudnn" and jnp.dtype(self.dtype).itemsize != 2:
            raise UserError(
                f"cudnn attention has no {self.dtype} kernels; set dtype to bfloat16,"
                " or attention_implementation to 'xla'"
            )

    @property
    def float_dtype(self) -> Any:
        """The dtype of gradients, and of parameters that are not in integers."""
        return self.dtype if self.param_dtype == jnp.int8 else self.param_dtype

    @property
    def kv_heads(self) -> int:
        """The number of key and value heads: ``num_kv_heads``, or else ``num_heads``."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def head_size(self) -> int:
        """The width of one head: ``head_dim``, or else ``hidden_size / num_heads``."""
        return self.hidden_size // self.num_heads if self.head_dim is None else self.head_dim


def _is_int8(dtype: Any) -> bool:
    try:
        return jnp.dtype(dtype) == jnp.int8
    except TypeError:
        return False


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0


def floating_dtype(name: str, dtype: Any) -> jnp.dtype:
    """Resolves a dtype; ``name`` is what a UserError calls it if it is no floating one."""
    try:
        resolved = jnp.dtype(dtype)
    except TypeError:
        resolved = None
    if resolved is None or not jnp.issubdtype(resolved, jnp.floating):
        raise UserError(f"{name} is {dtype!r}; it must be a floating dtype such as 'bfloat16'")
    return resolved
