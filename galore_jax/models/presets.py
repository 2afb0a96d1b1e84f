"""The model sizes of the GaLore reference implementation, LLaMA-13B's and LLaMA-2-70B's."""

from galore_jax.models.config import LlamaConfig


def _preset(
    hidden: int,
    intermediate: int,
    layers: int,
    heads: int,
    vocab: int = 32000,
    kv_heads: int | None = None,
):
    return LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_layers=layers,
        num_heads=heads,
        vocab_size=vocab,
        num_kv_heads=kv_heads,
    )


PRESETS: dict[str, LlamaConfig] = {
    "llama_9m": _preset(128, 352, 4, 4),
    "llama_20m": _preset(256, 688, 4, 4),
    "llama_35m": _preset(384, 1024, 6, 8),
    "llama_40m": _preset(416, 1024, 8, 8),
    "llama_60m": _preset(512, 1376, 8, 8),
    "llama_71m": _preset(512, 1368, 12, 8),
    "llama_100m": _preset(640, 1708, 12, 10, vocab=32100),
    "llama_130m": _preset(768, 2048, 12, 12),
    "llama_250m": _preset(768, 2560, 24, 16),
    "llama_350m": _preset(1024, 2736, 24, 16),
    "llama_1b": _preset(2048, 5461, 24, 32),
    "llama_3b": _preset(2560, 6848, 32, 32),
    "llama_7b": _preset(4096, 11008, 32, 32),
    "llama_13b": _preset(5120, 13824, 40, 40),
    "llama_70b": _preset(8192, 28672, 80, 64, kv_heads=8),
}
"""The sizes of ``configs/llama_*.json`` in the reference, by name, LLaMA-13B's and LLaMA-2-70B's.

Vocabulary 32000 (32100 for ``llama_100m``), float32, untied head. Change anything else with
``dataclasses.replace``. The names round: ``llama_60m`` has 58.07M parameters.
"""
