"""BERT and RoBERTa against what transformers computes, and their folders."""

import json
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx, traverse_util
from safetensors.numpy import load_file, save_file

from galore_jax.errors import UserError
from galore_jax.galore import galore
from galore_jax.memory.count import tree_bytes
from galore_jax.models import encoder
from galore_jax.models.encoder_config import EncoderConfig
from galore_jax.models.encoder_huggingface import load, save, tensor_names
from galore_jax.weights import projection_mask

GOLDEN = Path(__file__).parents[1] / "golden" / "huggingface"
CLASSIFIERS = ("roberta_classifier", "bert_regression")


def batch_of(golden):
    names = {"tokens": "tokens", "mask": "mask", "token_types": "token_types"}
    return {ours: jnp.asarray(golden[theirs], jnp.int32) for ours, theirs in names.items()}


def model_of(loaded):
    graphdef, _ = encoder.init_params(loaded.config, jax.random.key(0))
    return nnx.merge(graphdef, loaded.params)


@pytest.mark.parametrize("name", [*CLASSIFIERS, "roberta_mlm"])
def test_hidden_states_are_those_of_transformers(name):
    golden = np.load(GOLDEN / name / "expected.npz")
    model = model_of(load(GOLDEN / name))
    batch = batch_of(golden)
    is_token = golden["mask"].astype(bool)
    hidden = model.hidden_states(batch)
    np.testing.assert_allclose(hidden[is_token], golden["last_hidden"][is_token], atol=1e-4)
    if name in CLASSIFIERS:
        np.testing.assert_allclose(model.logits(batch), golden["logits"], atol=1e-4)


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_the_loss_and_every_gradient_are_those_of_transformers(name):
    golden = np.load(GOLDEN / name / "expected.npz")
    loaded = load(GOLDEN / name)
    forward = encoder.stages(loaded.config).forward
    labels = jnp.asarray(golden["labels"])

    def loss(params):
        logits = forward(params, batch_of(golden))
        if loaded.config.num_labels == 1:
            return jnp.mean((logits[:, 0] - labels) ** 2)
        return -jnp.mean(jax.nn.log_softmax(logits)[jnp.arange(len(labels)), labels])

    value, grads = jax.jit(jax.value_and_grad(loss))(loaded.params)
    assert value == pytest.approx(float(golden["loss"]), abs=1e-4)
    compared = set()
    for path, grad in traverse_util.flatten_dict(grads).items():
        layers = grad if path[0] == "blocks" else grad[None]
        for theirs, layer in zip(tensor_names(loaded.config, path), layers, strict=True):
            ours = layer.T if path[-1] == "kernel" else layer
            np.testing.assert_allclose(ours, golden[f"grad/{theirs}"], atol=1e-4, err_msg=theirs)
            compared.add(f"grad/{theirs}")
    assert compared == {key for key in golden.files if key.startswith("grad/")}


def test_padding_changes_nothing():
    model = model_of(load(GOLDEN / "roberta_classifier"))
    golden = np.load(GOLDEN / "roberta_classifier" / "expected.npz")
    batch = batch_of(golden)
    together = model.logits(batch)
    for row, length in enumerate(golden["mask"].sum(axis=1)):
        alone = {key: value[row : row + 1, :length] for key, value in batch.items()}
        np.testing.assert_allclose(model.logits(alone)[0], together[row], atol=1e-5)


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_a_saved_folder_has_the_same_tensors_to_the_bit(tmp_path, name):
    loaded = load(GOLDEN / name)
    assert loaded.new == ()
    save(tmp_path / "saved", loaded.config, loaded.params)
    before = load_file(GOLDEN / name / "model.safetensors")
    after = load_file(tmp_path / "saved" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[key], after[key]) for key in before)
    assert load(tmp_path / "saved").config == loaded.config


def test_a_masked_lm_gives_the_body_and_a_new_head():
    loaded = load(GOLDEN / "roberta_mlm", labels=("a", "b", "c"))
    assert loaded.new == ("head/dense", "head/out")
    assert loaded.params["head"]["out"]["kernel"].shape == (48, 3)


def test_a_classifier_of_other_labels_keeps_all_but_the_last_layer():
    loaded = load(GOLDEN / "roberta_classifier", labels=("a", "b"))
    original = load(GOLDEN / "roberta_classifier")
    assert loaded.new == ("head/out",)
    same = np.array_equal(
        loaded.params["head"]["dense"]["kernel"], original.params["head"]["dense"]["kernel"]
    )
    assert same


def rewritten(tmp_path, name, rename=lambda key: key, config=None):
    """A copy of a golden folder with tensors renamed (None: dropped) and config values changed."""
    folder = tmp_path / "rewritten"
    folder.mkdir()
    tensors = load_file(GOLDEN / name / "model.safetensors")
    renamed = {rename(key): value for key, value in tensors.items() if rename(key) is not None}
    save_file(renamed, folder / "model.safetensors")
    values = json.loads((GOLDEN / name / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, **(config or {})}))
    return folder


def test_a_bare_body_with_old_names_is_read_with_its_pooler(tmp_path):
    def rename(key):
        if key.startswith("classifier"):
            return None
        key = key.removeprefix("bert.").replace("LayerNorm.weight", "LayerNorm.gamma")
        return key.replace("LayerNorm.bias", "LayerNorm.beta")

    folder = rewritten(tmp_path, "bert_regression", rename, {"architectures": ["BertModel"]})
    tensors = load_file(folder / "model.safetensors")
    tensors["embeddings.position_ids"] = np.arange(66)[None]
    save_file(tensors, folder / "model.safetensors")
    loaded, original = load(folder), load(GOLDEN / "bert_regression")
    assert loaded.new == ("head/out",)
    for part in ("embed", "blocks"):
        jax.tree.map(np.testing.assert_array_equal, loaded.params[part], original.params[part])
    np.testing.assert_array_equal(
        loaded.params["head"]["dense"]["kernel"], original.params["head"]["dense"]["kernel"]
    )


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"hidden_act": "relu"}, 'hidden_act is "relu"; only "gelu"'),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type"),
        ({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}, "LlamaForCausalLM of mod"),
        ({"model_type": "distilbert", "architectures": ["DistilBertModel"]}, "DistilBertModel"),
        ({"is_decoder": True}, "is_decoder is true"),
        ({"num_hidden_layers": 3}, "lacks the tensor roberta.encoder.layer.2"),
        ({"num_hidden_layers": 1}, "has too much: the tensor roberta.encoder.layer.1"),
        (
            {"intermediate_size": 95},
            "has the shape (48, 96); by its config.json it must be (48, 95)",
        ),
        ({"problem_type": "multi_label_classification"}, "problem_type"),
        ({"hidden_dropout_prob": 1.5}, "hidden_dropout is 1.5"),
        ({"pad_token_id": 999}, "padding token is 999"),
        ({"num_attention_heads": 5}, "not a multiple of num_heads 5"),
    ],
)
def test_a_folder_that_does_not_fit_is_refused_by_name(tmp_path, config, message):
    folder = rewritten(tmp_path, "roberta_classifier", config=config)
    with pytest.raises(UserError, match=re.escape(message)) as error:
        load(folder)
    assert "\n" not in str(error.value)


def test_a_damaged_folder_is_refused(tmp_path):
    folder = tmp_path / "damaged"
    shutil.copytree(GOLDEN / "roberta_classifier", folder)
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-100])
    with pytest.raises(UserError, match="no whole safetensors file"):
        load(folder)


def test_roberta_base_has_the_sizes_of_the_paper():
    """124.65M parameters, 84.93M projected; 253.7 and 258.1 MB with low-rank state in float32."""
    config = EncoderConfig("roberta", 768, 3072, 12, 12, param_dtype=jnp.bfloat16)
    _, params = jax.eval_shape(lambda: encoder.init_params(config, jax.random.key(0)))
    mask = projection_mask(params, ("attn", "mlp"), stacked_modules="^blocks/")
    sizes = [leaf.size for leaf in jax.tree.leaves(params)]
    chosen = [size for size, is_one in zip(sizes, jax.tree.leaves(mask), strict=True) if is_one]
    assert round(sum(sizes) / 1e6, 2) == 124.65
    assert round(sum(chosen) / 1e6, 2) == 84.93
    kernels = {"blocks": params["blocks"]}
    wide = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32), kernels)
    for rank, megabytes in ((4, 253.7), (8, 258.1)):
        tx = galore(
            optax.adam(1.0), rank=rank, target_modules=("attn", "mlp"), stacked_modules="^blocks/"
        )
        matrices = jax.tree_util.tree_map_with_path(
            lambda path, x: x if path[-1].key == "kernel" else optax.MaskedNode(), wide
        )
        state = jax.eval_shape(tx.init, matrices)
        total = tree_bytes(params) + tree_bytes(state)
        assert round(total / 1e6, 1) == megabytes


def test_dropout_drops_in_training_alone_and_by_its_key():
    loaded = load(GOLDEN / "roberta_classifier")
    forward = jax.jit(encoder.stages(loaded.config).forward)
    batch = batch_of(np.load(GOLDEN / "roberta_classifier" / "expected.npz"))
    plain = forward(loaded.params, batch)
    one, again, other = (
        forward(loaded.params, {**batch, "dropout_key": jax.random.key(seed)}) for seed in (1, 1, 2)
    )
    assert np.array_equal(one, again)
    assert not np.allclose(one, other)
    assert not np.allclose(one, plain)
