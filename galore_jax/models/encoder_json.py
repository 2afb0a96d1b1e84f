"""``config.json`` of a Hugging Face BERT or RoBERTa, as an ``EncoderConfig`` and back."""

from pathlib import Path
from typing import Any

from galore_jax.errors import UserError
from galore_jax.models.encoder_config import EncoderConfig
from galore_jax.models.huggingface_config import read_json, read_sizes

_SIZES = {
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "vocab_size": "vocab_size",
    "position_rows": "max_position_embeddings",
    "type_vocab_size": "type_vocab_size",
    "layer_norm_eps": "layer_norm_eps",
    "pad_id": "pad_token_id",
    "hidden_dropout": "hidden_dropout_prob",
    "attention_dropout": "attention_probs_dropout_prob",
    "classifier_dropout": "classifier_dropout",
    "init_std": "initializer_range",
}
_REQUIRED = ("hidden_size", "intermediate_size", "num_layers", "num_heads", "vocab_size")
_PREFIX = {"bert": "Bert", "roberta": "Roberta"}
_CLASSIFIER = "ForSequenceClassification"
# What transformers assumes where a key is missing.
_DEFAULTS = {
    "bert": {"position_rows": 512, "type_vocab_size": 2, "layer_norm_eps": 1e-12, "pad_id": 0},
    "roberta": {"position_rows": 512, "type_vocab_size": 2, "layer_norm_eps": 1e-12, "pad_id": 1},
}
# Values of other keys with which the model computes what ours does.
_ONLY = {
    "hidden_act": ("gelu", None),
    "position_embedding_type": ("absolute", None),
    "is_decoder": (False, None),
    "add_cross_attention": (False, None),
    "quantization_config": (None,),
    "problem_type": (None, "single_label_classification", "regression"),
}


def read_encoder_config(folder: Path) -> tuple[EncoderConfig, bool]:
    """Reads a folder's ``config.json``.

    Returns:
      The model, and whether the folder has a head for sentences.

    Raises:
      UserError: a file missing or damaged, another architecture than BERT and RoBERTa, or a setting
        with which it computes what ours does not; the message names it.
    """
    path = folder / "config.json"
    values = read_json(path)
    kind = values.get("model_type")
    architectures = values.get("architectures") or []
    if kind is None:
        raise UserError(f"{path} names no model_type: it is not of a Hugging Face model")
    named = ", ".join(map(str, architectures)) or str(kind)
    prefix = _PREFIX.get(str(kind), "")
    if not prefix or not all(str(name).startswith(prefix) for name in architectures):
        raise UserError(
            f"{folder} is a {named} of model_type {kind!r}; this task is for a BERT or RoBERTa, "
            "of model_type 'bert' or 'roberta'"
        )
    given = read_sizes(path, values, _SIZES, _REQUIRED, _ONLY)
    labels = _labels(values)
    regression = values.get("problem_type") == "regression"
    classes = values.get("problem_type") == "single_label_classification"
    if (regression and len(labels) > 1) or (classes and len(labels) == 1):
        raise UserError(
            f"{path}: problem_type is {values['problem_type']!r} with {len(labels)} label(s), "
            "which is not supported"
        )
    try:
        config = EncoderConfig(kind, **{**_DEFAULTS[kind], **given}, labels=labels)
    except (UserError, TypeError) as error:
        raise UserError(f"{path}: {error}") from error
    return config, architectures == [prefix + _CLASSIFIER]


def config_to_json(config: EncoderConfig) -> dict[str, Any]:
    """Returns the values of a ``config.json`` that transformers 4 and 5 read alike."""
    values: dict[str, Any] = {"architectures": [_PREFIX[config.kind] + _CLASSIFIER]}
    values["model_type"] = config.kind
    values |= {key: getattr(config, ours) for ours, key in _SIZES.items()}
    values |= {"hidden_act": "gelu", "position_embedding_type": "absolute"}
    values["id2label"] = {str(i): label for i, label in enumerate(config.labels)}
    values["label2id"] = {label: i for i, label in enumerate(config.labels)}
    regression = config.num_labels == 1
    values["problem_type"] = "regression" if regression else "single_label_classification"
    values["torch_dtype"] = str(config.param_dtype)
    return values


def _labels(values: dict[str, Any]) -> tuple[str, ...]:
    """Reads the names of the labels; a head has two where nothing says how many."""
    named = values.get("id2label")
    if isinstance(named, dict) and named:
        try:
            return tuple(str(named[i]) for i in sorted(named, key=int))
        except ValueError as error:
            raise UserError(f"id2label is {named!r}; its keys must be integers") from error
    count = values.get("num_labels", 2)
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise UserError(f"num_labels is {count!r}; it must be a positive integer")
    return tuple(f"LABEL_{i}" for i in range(count))
