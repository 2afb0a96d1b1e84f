"""Generation: with the cache as without it, sampling as its words say, and the command."""

import dataclasses
import functools
import itertools
import json
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import tiny_config

from galore_jax import generate as command
from galore_jax.data.sample import prepare_sample
from galore_jax.data.tokenizer import open_tokenizer
from galore_jax.errors import UserError
from galore_jax.models import generate as generate_lib
from galore_jax.models import huggingface
from galore_jax.models.attention import empty_cache
from galore_jax.models.config import LlamaConfig, RopeScaling
from galore_jax.models.generate import Sampling, generate
from galore_jax.models.llama import apply, init_params
from galore_jax.training.checkpoints import Checkpoints
from galore_jax.training.experiment import make_experiment
from galore_jax.training.saved_run import open_model, open_run
from galore_jax.training.workdir import config_json, keep_tokenizer

GOLDEN = Path(__file__).parents[1] / "golden" / "huggingface"
TINY = LlamaConfig(
    hidden_size=32, intermediate_size=48, num_layers=3, num_heads=4, num_kv_heads=2, vocab_size=61
)


def abstract(config):
    return jax.eval_shape(functools.partial(init_params, config), jax.random.key(0))


@functools.cache
def draw(config):
    rng = np.random.default_rng(0)
    _, shapes = abstract(config)
    # Large enough that the text wanders; with smaller weights it repeats one token.
    return jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape), x.dtype), shapes)


def without_cache(config, params, prompt, count):
    """Greedy continuation by the training forward over the whole text, for each token anew."""
    graphdef, _ = abstract(config)
    text = np.zeros((1, len(prompt) + count), np.int32)
    text[0, : len(prompt)] = prompt

    @jax.jit
    def best(params, text):
        return jnp.argmax(apply(graphdef, params).logits(text)[0], axis=-1)

    for end in range(len(prompt), len(prompt) + count):
        text[0, end] = best(params, text)[end - 1]
    return text[0, len(prompt) :].tolist()


# The cache.


@pytest.mark.parametrize(
    ("change", "length"),
    [
        ({}, 1),
        ({"num_kv_heads": None, "tie_embeddings": True}, 16),
        ({"head_dim": 6, "rope_scaling": RopeScaling(8.0, 1.0, 4.0, 32)}, 17),
        ({"max_positions": 260, "remat": True}, 40),
    ],
)
def test_with_the_cache_as_without_past_200_tokens(change, length):
    config = dataclasses.replace(TINY, **change)
    params = draw(config)
    prompt = np.random.default_rng(length).integers(0, 61, length).tolist()
    want = without_cache(config, params, prompt, 220)
    assert generate(config, params, prompt, 220) == want
    assert len(set(want)) > 20


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_hidden_states_with_the_cache_in_16_bits(dtype):
    config = dataclasses.replace(TINY, dtype=dtype, param_dtype=dtype)
    graphdef, _ = abstract(config)
    params = jax.tree.map(lambda leaf: leaf / 8, draw(config))
    tokens = np.random.default_rng(0).integers(0, 61, (2, 12)).astype(np.int32)
    want = jax.jit(lambda params: apply(graphdef, params).hidden_states(tokens))(params)
    extend = jax.jit(lambda params, *arguments: apply(graphdef, params).extend(*arguments))
    cache, got = empty_cache(config, 2, 20), []
    for begin, end in itertools.pairwise((0, 5, 6, 7, 12)):
        hidden, cache = extend(params, tokens[:, begin:end], cache, begin)
        assert hidden.dtype == jnp.dtype(dtype)
        got.append(hidden)
    np.testing.assert_allclose(
        np.concatenate(got, axis=1).astype(np.float32), want.astype(np.float32), atol=0.05
    )


def test_two_programs_serve_every_text_of_about_a_length():
    params = draw(TINY)
    generate(TINY, params, [1, 2, 3], 40)
    before = generate_lib._next_token._cache_size()
    for length, count, seed in ((4, 30, 0), (16, 100, 1), (9, 1, 2)):
        generate(TINY, params, [7] * length, count, sampling=Sampling(seed=seed))
    assert generate_lib._next_token._cache_size() == before
    generate(TINY, params, [7] * 17, 30)
    assert generate_lib._next_token._cache_size() == before + 1  # a longer prompt


def test_stops_at_an_end_token_and_at_the_last_position():
    params = draw(TINY)
    text = generate(TINY, params, [3, 1], 50)
    end = text[9]
    stopped = generate(dataclasses.replace(TINY, eos_ids=(60, end)), params, [3, 1], 50)
    assert stopped == text[: text.index(end) + 1]
    short = dataclasses.replace(TINY, max_positions=20)
    # The token after the last position is predicted, but cannot be read.
    assert generate(short, params, [3, 1], 50) == text[:19]
    assert len(generate(short, params, [3] * 20, 50)) == 1


def test_each_token_is_told_at_once():
    seen = []
    new = generate(TINY, draw(TINY), [5], 7, on_token=seen.append)
    assert seen == new
    assert len(new) == 7

    class Enough(Exception):
        pass

    def stop(token):
        if len(seen) > 9:
            raise Enough
        seen.append(token)

    with pytest.raises(Enough):
        generate(TINY, draw(TINY), [5], 7, on_token=stop)
    assert seen[7:] == new[:3]


# Sampling.

LOGITS = np.log([0.4, 0.3, 0.2, 0.06, 0.04])


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(0.0), [1, 0, 0, 0, 0]),
        (Sampling(1.0), [0.4, 0.3, 0.2, 0.06, 0.04]),
        (Sampling(0.5), [0.16, 0.09, 0.04, 0.0036, 0.0016]),
        (Sampling(1.0, top_k=2), [4, 3, 0, 0, 0]),
        (Sampling(1.0, top_k=9), [0.4, 0.3, 0.2, 0.06, 0.04]),
        (Sampling(1.0, top_p=0.39), [1, 0, 0, 0, 0]),
        (Sampling(1.0, top_p=0.41), [4, 3, 0, 0, 0]),
        (Sampling(1.0, top_p=0.8), [4, 3, 2, 0, 0]),
        (Sampling(1.0, top_p=1.0), [0.4, 0.3, 0.2, 0.06, 0.04]),
        (Sampling(1.0, top_k=3, top_p=0.7), [4, 3, 0, 0, 0]),
        (Sampling(0.5, top_p=0.6), [16, 9, 0, 0, 0]),
    ],
)
def test_tokens_are_drawn_with_their_probabilities(sampling, expected):
    order = np.random.default_rng(0).permutation(5)
    draws = 20_000
    logits = jnp.broadcast_to(jnp.asarray(LOGITS[order], jnp.float32), (draws, 5))
    drawn = np.asarray(generate_lib._choose(sampling, logits, jax.random.key(1)))
    frequency = np.bincount(drawn, minlength=5) / draws
    want = np.asarray(expected, float)[order] / np.sum(expected)
    np.testing.assert_allclose(frequency, want, atol=0.015)
    np.testing.assert_array_equal(frequency > 0, want > 0)


def test_a_seed_gives_its_text():
    def text(seed, **settings):
        return generate(TINY, draw(TINY), [1], 30, sampling=Sampling(1.0, seed=seed, **settings))

    assert text(3) == text(3)
    assert text(3) != text(4)
    assert text(3, top_k=1) == generate(TINY, draw(TINY), [1], 30)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -1.0}, "temperature is -1.0; it must be at least 0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_k": 0}, "top_k is 0; it must be at least 1"),
        ({"top_p": 0.0}, "top_p is 0.0; it must be greater than 0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
    ],
)
def test_sampling_out_of_range(settings, message):
    with pytest.raises(UserError, match=re.escape(message)):
        Sampling(**settings)


@pytest.mark.parametrize(
    ("prompt", "count", "message"),
    [
        ([], 3, "the prompt has no tokens"),
        ([3, 61], 3, "the prompt's id 61 is none of the model's 61"),
        ([-1], 3, "the prompt's id -1"),
        ([1] * 21, 3, "the prompt has 21 tokens and the model 20 positions"),
        ([1], 0, "max_tokens is 0"),
    ],
)
def test_prompts_that_cannot_go_on(prompt, count, message):
    config = dataclasses.replace(TINY, max_positions=20)
    with pytest.raises(UserError, match=re.escape(message)):
        generate(config, draw(TINY), prompt, count)


# The command.


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run's folder with two checkpoints and its tokenizer, as the trainer leaves it."""
    config = tiny_config(data__seq_len=64, param_dtype="bfloat16")
    workdir = tmp_path_factory.mktemp("run")
    experiment = make_experiment(config)
    (workdir / "config.json").write_text(json.dumps(config_json(config)))
    keep_tokenizer(workdir, open_tokenizer(prepare_sample()[1]))
    with Checkpoints(workdir / "checkpoints", keep=2) as saved:
        for step in (4, 8):
            saved.save(step, jax.jit(experiment.init)(jax.random.key(step)), {"source": "none"})
    return workdir


def call(*arguments):
    return command.main(["generate", *map(str, arguments)])


def test_ids_are_continued_as_transformers_does(capsys):
    folder = GOLDEN / "llama_gqa"
    with np.load(folder / "expected.npz") as expected:
        want = expected["greedy"][0].tolist()
    prompt = ",".join(map(str, want[:6]))
    assert call(f"--model={folder}", f"--ids={prompt}", "--max_tokens=24") == 0
    out, err = capsys.readouterr()
    assert out == ",".join(map(str, want)) + "\n"
    assert err.startswith("24 tokens, ")


def test_a_run_is_continued_in_text(run, capsys):
    assert call(f"--model={run}", "--prompt=The operation returns", "--max_tokens=12") == 0
    out, _ = capsys.readouterr()
    opened = open_model(run)
    assert opened.tokenizer is not None
    prompt = opened.tokenizer.encode_prompt("The operation returns")
    new = generate(opened.config, opened.params, prompt, 12)
    assert out.rstrip("\n") == opened.tokenizer.decode([*prompt, *new])
    assert out.startswith("The operation returns")
    # Another checkpoint has other weights, and so has another text.
    assert call(f"--model={run}", "--prompt=The operation returns", "--step=4") == 0
    assert capsys.readouterr().out[:40] != out[:40]


def test_positions_end(run, capsys):
    assert call(f"--model={run}", "--prompt=The", "--max_tokens=500") == 0
    assert "the model has no more than 64 positions" in capsys.readouterr().err


def test_a_run_opens_with_what_it_was_trained_with(run):
    opened = open_run(run)
    assert (opened.step, opened.model.max_positions, opened.model.eos_ids) == (8, 64, (1,))
    want = jax.jit(make_experiment(opened.config).init)(jax.random.key(8)).params
    assert jax.tree.structure(opened.params) == jax.tree.structure(want)
    for got, leaf in zip(jax.tree.leaves(opened.params), jax.tree.leaves(want), strict=True):
        assert got.dtype == leaf.dtype == jnp.bfloat16
        np.testing.assert_array_equal(got, leaf)
    assert open_run(run, tokenizer=False).tokenizer is None
    wide = open_model(run, dtype="float32")
    assert {leaf.dtype for leaf in jax.tree.leaves(wide.params)} == {jnp.dtype("float32")}
    assert wide.config.dtype == jnp.float32


def test_a_run_is_not_touched(run):
    partial = run / "checkpoints" / "12.orbax-checkpoint-tmp"
    partial.mkdir()  # of a save that is under way in another process
    open_run(run)
    assert partial.is_dir()
    partial.rmdir()


def test_a_saved_run_goes_on_with_the_same_text(run, tmp_path, capsys):
    opened = open_run(run)
    huggingface.save(tmp_path / "saved", opened.model, opened.params, opened.tokenizer)
    texts = []
    for folder in (run, tmp_path / "saved"):
        arguments = ("--prompt=Amazon 12 é", "--max_tokens=20", "--dtype=float32")
        assert call(f"--model={folder}", *arguments) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]


def tokenizer_too_large(run, folder):
    huggingface.save(folder, TINY, draw(TINY))
    opened = open_run(run).tokenizer
    assert opened is not None
    opened.save(folder)


def no_checkpoint(run, folder):
    folder.mkdir()
    shutil.copy(run / "config.json", folder)
    (folder / "checkpoints").mkdir()


def damaged_checkpoints(run, folder):
    shutil.copytree(run, folder)
    for path in folder.glob("checkpoints/*/leaves/*"):
        path.write_text("{")


def another_model(run, folder):
    shutil.copytree(run, folder)
    path = folder / "config.json"
    values = json.loads(path.read_text())
    values["model"]["hidden_size"] = 32
    path.write_text(json.dumps(values))


def no_config_of_a_run(run, folder):
    shutil.copytree(run, folder)
    (folder / "config.json").write_text('{"model_type": "llama"}')


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (tokenizer_too_large, "has 8192 ids and the model a vocabulary of 61"),
        (no_checkpoint, "has no checkpoint yet"),
        (damaged_checkpoints, "is damaged"),
        (another_model, "do not fit the model: blocks/attn/k_proj/kernel is (2, 16, 16), not"),
        (no_config_of_a_run, "is no config of a run"),
    ],
)
def test_folders_that_cannot_go_on(make, message, run, tmp_path, capsys):
    make(run, tmp_path / "folder")
    assert call(f"--model={tmp_path / 'folder'}", "--prompt=The") == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert err.splitlines()[-1].startswith("error: ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt=The"], "give --model=FOLDER"),
        (["--model=GQA"], "give either --prompt=TEXT or --ids"),
        (["--model=GQA", "--prompt=x", "--ids=1"], "give either --prompt=TEXT or --ids"),
        (["--model=GQA", "--prompt=x"], "no such file as tokenizer.json or tokenizer.model"),
        (["--model=GQA", "--ids=1,x"], "--ids=1,x must be integers"),
        (["--model=GQA", "--ids=199"], "the prompt's id 199 is none of the model's 199"),
        (["--model=GQA", "--ids=1", "--step=3"], "is no run, so that it has no step 3"),
        (["--model=GQA", "--ids=1", "--top_k=x"], "--top_k: invalid int value: 'x'"),
        (["--model=GQA", "--ids=1", "--temprature=1"], "did you mean --temperature?"),
        (["--model=GQA", "--ids=1", "--temperature=-1"], "temperature is -1.0"),
        (["--model=GQA", "--ids=1", "--max_tokens=0"], "max_tokens is 0"),
        (["--model=GQA", "--ids=1", "--dtype=int8"], "--dtype: invalid choice: 'int8'"),
        (["--model=/nowhere", "--ids=1"], "/nowhere is no folder"),
        (["--model=GQA", "--ids=" + ",".join("1" * 129)], "129 tokens and the model 128 positions"),
    ],
)
def test_wrong_arguments_are_one_line(arguments, message, capsys):
    folder = str(GOLDEN / "llama_gqa")
    assert call(*(argument.replace("GQA", folder) for argument in arguments)) == 2
    out, err = capsys.readouterr()
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert message in err
    assert out == ""


def test_a_step_that_a_run_lacks(run, capsys):
    assert call(f"--model={run}", "--prompt=The", "--step=5") == 2
    assert "has no checkpoint of step 5; it has those of steps [4, 8]" in capsys.readouterr().err


def test_help_tells_every_flag(capsys):
    assert call("--help") == 0
    text = capsys.readouterr().out
    source = Path(command.__file__).read_text()
    flags = re.findall(r'add_argument\("(--\w+)"', source)
    assert len(flags) > 9
    for flag in flags:
        assert flag in text
