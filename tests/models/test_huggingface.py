"""Hugging Face folders: read, written, and refused in one line."""

import dataclasses
import functools
import json
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from galore_jax.errors import UserError
from galore_jax.models import huggingface, leaf_tensors
from galore_jax.models.attention import rotary_frequencies
from galore_jax.models.config import LlamaConfig, RopeScaling
from galore_jax.models.generate import generate
from galore_jax.models.llama import apply, init_params

GOLDEN = Path(__file__).parents[1] / "golden" / "huggingface"
FOLDERS = ("llama_gqa", "llama_tied_sharded")
SCALING = RopeScaling(8.0, 1.0, 4.0, 64)
TINY = LlamaConfig(
    hidden_size=32,
    intermediate_size=48,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    vocab_size=61,
    max_positions=64,
    eos_ids=(2, 5),
)


def abstract(config):
    return jax.eval_shape(functools.partial(init_params, config), jax.random.key(0))


def draw(config):
    rng = np.random.default_rng(0)
    _, shapes = abstract(config)
    return jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape), x.dtype), shapes)


def logits(config, params, tokens):
    graphdef, _ = abstract(config)
    run = jax.jit(lambda params, tokens: apply(graphdef, params).logits(tokens))
    return run(params, tokens.astype(np.int32))


def tensors(folder):
    """The tensors of a folder, read by the library of the format."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


def assert_bit_equal(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


# Against transformers.


@pytest.mark.parametrize("name", FOLDERS)
def test_logits_and_greedy_text_agree_with_transformers(name):
    config, params = huggingface.load(GOLDEN / name)
    with np.load(GOLDEN / name / "expected.npz") as expected:
        got = logits(config, params, expected["tokens"])
        np.testing.assert_allclose(got, expected["logits"], atol=1e-4)
        prompt, greedy = expected["prompt"][0], expected["greedy"][0]
    new = generate(config, params, prompt, len(greedy) - len(prompt))
    assert [*prompt, *new] == greedy.tolist()


@pytest.mark.parametrize("name", FOLDERS)
def test_saved_again_it_has_the_same_tensors(name, tmp_path):
    config, params = huggingface.load(GOLDEN / name)
    huggingface.save(tmp_path / "saved", config, params)
    got, want = tensors(tmp_path / "saved"), tensors(GOLDEN / name)
    assert got.keys() == want.keys()
    for key in want:
        assert (got[key].shape, got[key].dtype) == (want[key].shape, want[key].dtype)
        assert got[key].tobytes() == want[key].tobytes()
    again, params_again = huggingface.load(tmp_path / "saved")
    assert again == config
    assert_bit_equal(params_again, params)


@pytest.mark.parametrize("name", FOLDERS)
def test_saved_config_says_what_transformers_does(name, tmp_path):
    config, params = huggingface.load(GOLDEN / name)
    huggingface.save(tmp_path / "saved", config, params)
    got = json.loads((tmp_path / "saved" / "config.json").read_text())
    want = json.loads((GOLDEN / name / "config.json").read_text())
    want |= {"rope_theta": want["rope_parameters"]["rope_theta"], "torch_dtype": want["dtype"]}
    assert {key: want[key] for key in got} == got


# Round trips.


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize(
    "change",
    [
        {},
        {"tie_embeddings": True, "rope_theta": 5e5},
        {"head_dim": 6, "num_kv_heads": 1, "rope_scaling": SCALING},
        {"bos_id": 1, "eos_ids": (2,), "rms_norm_eps": 1e-5},
    ],
)
def test_what_is_saved_is_loaded(dtype, change, tmp_path):
    config = dataclasses.replace(TINY, dtype=dtype, param_dtype=dtype, **change)
    params = draw(config)
    huggingface.save(tmp_path / "saved", config, params)
    found, loaded = huggingface.load(tmp_path / "saved")
    assert_bit_equal(loaded, params)
    assert found == dataclasses.replace(
        config, num_kv_heads=config.kv_heads, head_dim=config.head_size
    )


def test_several_files_are_one_model(tmp_path, monkeypatch):
    params = draw(TINY)
    monkeypatch.setattr(leaf_tensors, "_SHARD_BYTES", 10_000)
    huggingface.save(tmp_path / "saved", TINY, params)
    files = sorted(path.name for path in (tmp_path / "saved").glob("*.safetensors"))
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    assert len(files) > 5
    index = json.loads((tmp_path / "saved" / "model.safetensors.index.json").read_text())
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    assert index["metadata"]["total_size"] == total
    for name, file in index["weight_map"].items():
        with safe_open(tmp_path / "saved" / file, framework="numpy") as opened:
            assert name in opened.keys()  # noqa: SIM118  # it is no dict
    for file in files:
        assert sum(t.nbytes for t in load_file(tmp_path / "saved" / file).values()) <= 10_000
    assert_bit_equal(huggingface.load(tmp_path / "saved")[1], params)


def test_each_param_keeps_its_dtype_unless_one_is_given(tmp_path):
    params = draw(dataclasses.replace(TINY, param_dtype="bfloat16"))
    params["final_norm"]["scale"] = params["final_norm"]["scale"].astype(jnp.float32)
    huggingface.save(tmp_path / "saved", TINY, params)
    config, loaded = huggingface.load(tmp_path / "saved")
    assert_bit_equal(loaded, params)
    assert (config.dtype, config.param_dtype) == (jnp.bfloat16, jnp.bfloat16)
    config, wide = huggingface.load(tmp_path / "saved", "float32")
    assert (config.dtype, config.param_dtype) == (jnp.float32, jnp.float32)
    assert_bit_equal(wide, jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params))


def test_arrays_are_read_in_place_on_a_cpu_and_may_be_donated(tmp_path):
    params = draw(TINY)
    huggingface.save(tmp_path / "saved", TINY, params)
    _, loaded = huggingface.load(tmp_path / "saved")
    double = jax.jit(lambda tree: jax.tree.map(lambda leaf: 2 * leaf, tree), donate_argnums=0)
    assert_bit_equal(double(loaded), jax.tree.map(lambda leaf: 2 * leaf, params))
    assert_bit_equal(huggingface.load(tmp_path / "saved")[1], params)


# The ways in which a config says the same.


def edited(tmp_path, **changes):
    """A copy of a golden folder whose config.json has other values; None removes a key."""
    folder = tmp_path / "edited"
    shutil.copytree(GOLDEN / "llama_gqa", folder)
    values = json.loads((folder / "config.json").read_text()) | changes
    kept = {key: value for key, value in values.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(kept))
    return folder


LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


@pytest.mark.parametrize(
    ("changes", "theta", "scaling"),
    [
        ({"rope_parameters": None}, 1e4, None),
        ({"rope_parameters": None, "rope_theta": 3e4, "rope_scaling": None}, 3e4, None),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 3e4}}, 3e4, None),
        (
            {
                "rope_parameters": None,
                "rope_theta": 5e5,
                "rope_scaling": {"rope_type": "llama3", **LLAMA3},
            },
            5e5,
            SCALING,
        ),
        (
            {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3}},
            5e5,
            SCALING,
        ),
        ({"rope_parameters": None, "rope_scaling": {"type": "llama3", **LLAMA3}}, 1e4, SCALING),
    ],
)
def test_rotary_frequencies_as_transformers_4_and_5_write_them(changes, theta, scaling, tmp_path):
    config, _ = huggingface.load(edited(tmp_path, **changes))
    assert (config.rope_theta, config.rope_scaling) == (theta, scaling)


def test_llama_3_scaling_divides_slow_frequencies_alone():
    plain = np.asarray(rotary_frequencies(32, 5e5), np.float64)
    turns = SCALING.original_max_positions * plain / (2 * np.pi)
    scaled = np.asarray(rotary_frequencies(32, 5e5, SCALING), np.float64)
    for turn, one, other in zip(turns, plain, scaled, strict=True):
        part = 1 if turn > 4 else 0 if turn < 1 else (turn - 1) / 3
        np.testing.assert_allclose(other, part * one + (1 - part) * one / 8, rtol=1e-5)
    assert (turns > 4).any() & (turns < 1).any() & ((turns > 1) & (turns < 4)).any()


@pytest.mark.parametrize(
    ("changes", "eos_ids"),
    [({"eos_token_id": [7, 9]}, (7, 9)), ({"eos_token_id": None}, ()), ({}, (2,))],
)
def test_what_ends_a_text(changes, eos_ids, tmp_path):
    folder = edited(tmp_path, **changes)
    (folder / "generation_config.json").unlink()
    assert huggingface.load(folder)[0].eos_ids == eos_ids


def test_generation_config_has_the_last_word(tmp_path):
    folder = edited(tmp_path)
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 7]}')
    assert huggingface.load(folder)[0].eos_ids == (2, 7)


def test_a_tied_head_that_is_stored_too_must_be_the_embedding(tmp_path):
    folder = edited(tmp_path, tie_word_embeddings=True)
    with pytest.raises(UserError, match=r"a lm_head\.weight that differs") as error:
        huggingface.load(folder)
    assert "\n" not in str(error.value)
    found = tensors(folder)
    found["lm_head.weight"] = found["model.embed_tokens.weight"]
    save_file(found, folder / "model.safetensors")
    assert "lm_head" not in huggingface.load(folder)[1]


def test_buffers_of_old_versions_are_no_surplus(tmp_path):
    folder = edited(tmp_path)
    found = tensors(folder)
    found["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(6, np.float32)
    save_file(found, folder / "model.safetensors")
    assert_bit_equal(huggingface.load(folder)[1], huggingface.load(GOLDEN / "llama_gqa")[1])


# Refused.


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["MistralForCausalLM"], "model_type": "mistral"}, "MistralForCausalLM"),
        ({"architectures": None, "model_type": "gemma"}, "is a gemma of model_type 'gemma'"),
        ({"architectures": ["LlamaModel"]}, "is a LlamaModel of model_type 'llama'"),
        ({"architectures": None, "model_type": None}, "config.json names no model_type"),
        ({"rope_interleaved": True}, "rope_interleaved is true"),
        ({"attention_bias": True}, "attention_bias is true; only false is supported"),
        ({"mlp_bias": True}, "mlp_bias is true"),
        ({"hidden_act": "gelu"}, 'hidden_act is "gelu"; only "silu"'),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"hidden_size": None, "vocab_size": None}, "lacks hidden_size, vocab_size"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_type 'yarn' is not supported"),
        ({"rope_parameters": {"rope_type": "llama3"}}, "'llama3' lacks factor, low_freq_factor"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"num_key_value_heads": 3}, "not a multiple of num_kv_heads 3"),
        ({"hidden_size": "48"}, "hidden_size is '48'"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps is 'small'"),
        ({"eos_token_id": "two"}, "the special token 'two' is no id"),
        ({"num_hidden_layers": 2}, "the tensor model.layers.2.input_layernorm.weight and 8 more"),
        ({"num_hidden_layers": 4}, "lacks the tensor model.layers.3.input_layernorm.weight and 8"),
        ({"vocab_size": 200}, "embed_tokens.weight has the shape (199, 48); by its config.json"),
    ],
)
def test_configs_that_do_not_fit(changes, message, tmp_path):
    folder = edited(tmp_path, **changes)
    if "eos_token_id" in changes:
        (folder / "generation_config.json").unlink()
    with pytest.raises(UserError, match=re.escape(message)) as error:
        huggingface.load(folder)
    assert "\n" not in str(error.value)


def missing_tensor(folder):
    found = tensors(folder)
    del found["model.norm.weight"]
    save_file(found, folder / "model.safetensors")


def surplus_tensor(folder):
    found = tensors(folder)
    found["model.layers.1.self_attn.q_proj.bias"] = np.zeros(48, np.float32)
    save_file(found, folder / "model.safetensors")


def wrong_shape(folder):
    found = tensors(folder)
    found["model.layers.1.mlp.up_proj.weight"] = np.zeros((48, 88), np.float32)
    save_file(found, folder / "model.safetensors")


def integers(folder):
    found = tensors(folder)
    found["model.norm.weight"] = np.ones(48, np.int8)
    save_file(found, folder / "model.safetensors")


def one_layer_in_another_dtype(folder):
    found = tensors(folder)
    found["model.layers.1.mlp.up_proj.weight"] = np.ones((88, 48), np.float16)
    save_file(found, folder / "model.safetensors")


def cut_short(folder):
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-1])


def cut_in_the_header(folder):
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:5])


def no_config(folder):
    (folder / "config.json").unlink()


def config_that_is_no_json(folder):
    (folder / "config.json").write_text("{")


def config_that_is_a_list(folder):
    (folder / "config.json").write_text("[]")


def no_weights(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (missing_tensor, "lacks the tensor model.norm.weight"),
        (surplus_tensor, "has too much: the tensor model.layers.1.self_attn.q_proj.bias"),
        (wrong_shape, "model.layers.1.mlp.up_proj.weight has the shape (48, 88)"),
        (integers, "model.norm.weight is I8"),
        (one_layer_in_another_dtype, "up_proj.weight has another dtype"),
        (cut_short, "model.safetensors is no whole safetensors file"),
        (cut_in_the_header, "model.safetensors is no whole safetensors file"),
        (no_config, "has no config.json"),
        (config_that_is_no_json, "config.json cannot be read as JSON"),
        (config_that_is_a_list, "config.json is no JSON object"),
        (no_weights, "has neither model.safetensors nor model.safetensors.index.json"),
    ],
)
def test_damaged_folders(damage, message, tmp_path):
    folder = edited(tmp_path)
    damage(folder)
    with pytest.raises(UserError, match=re.escape(message)) as error:
        huggingface.load(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda index: index.clear(), "is no index of safetensors files"),
        (lambda index: index["weight_map"].update(x="../x"), "is no index of safetensors files in"),
        (lambda index: index["weight_map"].update(x="x.safetensors"), "lacks x.safetensors, which"),
        (
            lambda index: index["weight_map"].update(x="model-00001-of-00006.safetensors"),
            "model-00001-of-00006.safetensors lacks the tensor x that",
        ),
        (lambda index: index["weight_map"].pop("model.norm.weight"), "a tensor model.norm.weight"),
    ],
)
def test_an_index_that_does_not_fit_its_files(change, message, tmp_path):
    shutil.copytree(GOLDEN / "llama_tied_sharded", tmp_path / "copy")
    path = tmp_path / "copy" / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))
    with pytest.raises(UserError, match=re.escape(message)) as error:
        huggingface.load(tmp_path / "copy")
    assert "\n" not in str(error.value)


def test_no_folder_and_no_dtype(tmp_path):
    with pytest.raises(UserError, match="is no folder"):
        huggingface.load(tmp_path / "nowhere")
    with pytest.raises(UserError, match="dtype is 'int8'"):
        huggingface.load(GOLDEN / "llama_gqa", "int8")


class Tokenizer:
    vocab_size = 62

    def save(self, folder):
        raise AssertionError


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda params: params.pop("final_norm"), "final_norm/scale is no array, not (32,)"),
        (lambda params: params.update(more={"x": jnp.ones(3)}), "more/x is (3,), not no array"),
        (
            lambda params: params["lm_head"].update(kernel=jnp.ones((61, 32))),
            "lm_head/kernel is (61, 32), not (32, 61)",
        ),
        (
            lambda params: params["final_norm"].update(scale=jnp.ones(32, jnp.int32)),
            "final_norm/scale is int32",
        ),
    ],
)
def test_params_that_cannot_be_saved(change, message, tmp_path):
    params = draw(TINY)
    change(params)
    with pytest.raises(UserError, match=re.escape(message)):
        huggingface.save(tmp_path / "saved", TINY, params)
    assert not list(tmp_path.iterdir())


def test_nothing_is_overwritten_or_half_written(tmp_path, monkeypatch):
    params = draw(TINY)
    with pytest.raises(
        UserError, match="the tokenizer has 62 ids and the model a vocabulary of 61"
    ):
        huggingface.save(tmp_path / "saved", TINY, params, Tokenizer())
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(UserError, match="full exists already"):
        huggingface.save(tmp_path / "full", TINY, params)
    (tmp_path / "full" / "file").unlink()
    huggingface.save(tmp_path / "full", TINY, params)  # empty is as good as none

    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(leaf_tensors, "write_tensors", fail)
    with pytest.raises(UserError, match="saved: No space left on device"):
        huggingface.save(tmp_path / "saved", TINY, params)
    assert [path.name for path in tmp_path.iterdir()] == ["full"]
