import dataclasses
import functools
import json
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from galore_jax.errors import UserError
from galore_jax.models.attention import causal_attention, rotary
from galore_jax.models.config import LlamaConfig
from galore_jax.models.llama import (
    Llama,
    RMSNorm,
    apply,
    count_params,
    init_params,
    linear,
    stages,
)
from galore_jax.models.losses import cross_entropy
from galore_jax.models.presets import PRESETS

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "llama_hf.npz"

TINY = LlamaConfig(
    hidden_size=32, intermediate_size=48, num_layers=3, num_heads=4, vocab_size=61, init_std=0.2
)

HF_BLOCK_NAMES = {
    "input_norm/scale": "input_layernorm",
    "post_attention_norm/scale": "post_attention_layernorm",
    **{f"attn/{n}_proj/kernel": f"self_attn.{n}_proj" for n in "qkvo"},
    **{f"mlp/{n}_proj/kernel": f"mlp.{n}_proj" for n in ("gate", "up", "down")},
}


def paths(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {"/".join(k.key for k in path): leaf for path, leaf in leaves}


def nest(flat):
    tree = {}
    for path, leaf in flat.items():
        *parents, name = path.split("/")
        functools.reduce(lambda node, key: node.setdefault(key, {}), parents, tree)[name] = leaf
    return tree


def from_hf(golden, kind, num_layers):
    """Arrays ``kind/NAME`` under Hugging Face names as our params: kernels are transposed."""

    def get(name):
        return golden[f"{kind}/{name}.weight"]

    flat = {
        "embed/embedding": get("model.embed_tokens"),
        "final_norm/scale": get("model.norm"),
        "lm_head/kernel": get("lm_head").T,
    }
    for ours, theirs in HF_BLOCK_NAMES.items():
        layers = [get(f"model.layers.{i}.{theirs}").T for i in range(num_layers)]
        flat[f"blocks/{ours}"] = np.stack(layers)
    return nest(flat)


def random_batch(vocab_size, shape=(2, 11), seed=0):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, vocab_size, (shape[0], shape[1] + 1)).astype(np.int32)
    return jnp.asarray(tokens[:, :-1]), jnp.asarray(tokens[:, 1:])


def make(config, seed=0):
    graphdef, params = init_params(config, jax.random.key(seed))
    # Scales of one would hide a norm that forgets its scale, or two that are swapped.
    noise = np.random.default_rng(seed)

    def stir(path, leaf):
        if path[-1].key != "scale":
            return leaf
        return (leaf * noise.uniform(0.5, 1.5, leaf.shape)).astype(leaf.dtype)

    return graphdef, jax.tree_util.tree_map_with_path(stir, params)


def value_and_grad(function, has_aux=False):
    return jax.jit(jax.value_and_grad(function, has_aux=has_aux))


def relative_error(got, want):
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return np.max(np.abs(got - want)) / np.max(np.abs(want))


def assert_trees_close(got, want, tolerance):
    got, want = paths(got), paths(want)
    assert got.keys() == want.keys()
    errors = {path: relative_error(got[path], want[path]) for path in want}
    assert max(errors.values()) < tolerance, errors


# Against Hugging Face.


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN) as arrays:
        arrays = dict(arrays)
    sizes = json.loads(str(arrays["config"]))
    config = LlamaConfig(
        hidden_size=sizes["hidden_size"],
        intermediate_size=sizes["intermediate_size"],
        num_layers=sizes["num_hidden_layers"],
        num_heads=sizes["num_attention_heads"],
        num_kv_heads=sizes["num_key_value_heads"],
        vocab_size=sizes["vocab_size"],
    )
    return config, arrays


@pytest.mark.parametrize("attention", [None, "xla"])
def test_logits_agree_with_hugging_face(golden, attention):
    config, arrays = golden
    config = dataclasses.replace(config, attention_implementation=attention)
    graphdef, own = init_params(config, jax.random.key(0))
    params = from_hf(arrays, "w", config.num_layers)
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, own)
    logits = apply(graphdef, params).logits(arrays["input_ids"].astype(np.int32))
    np.testing.assert_allclose(logits, arrays["logits"], atol=1e-4)


def test_loss_and_every_gradient_agree_with_hugging_face(golden):
    config, arrays = golden
    config = dataclasses.replace(config, loss_chunk_tokens=10)
    graphdef, _ = init_params(config, jax.random.key(0))
    tokens = arrays["input_ids"].astype(np.int32)
    targets = np.pad(arrays["labels"].astype(np.int32)[:, 1:], ((0, 0), (0, 1)), constant_values=-1)

    def mean_loss(params):
        nll, count = apply(graphdef, params).loss(tokens, targets)
        return nll / count

    params = from_hf(arrays, "w", config.num_layers)
    loss, grads = value_and_grad(mean_loss)(params)
    np.testing.assert_allclose(loss, arrays["loss"], rtol=1e-5)
    assert_trees_close(grads, from_hf(arrays, "g", config.num_layers), 1e-4)


# The model.


def test_a_position_sees_itself_and_the_past_alone():
    graphdef, params = make(TINY)
    tokens, _ = random_batch(TINY.vocab_size, (1, 7))
    model = apply(graphdef, params)
    rows = model.embed(tokens)

    (block,) = stages(TINY).block
    layer = jax.tree.map(lambda p: p[0], params["blocks"])

    def read(rows):
        return block.run(layer, rows).sum(axis=-1)[0]

    seen = np.abs(jax.jit(jax.jacobian(read))(rows)[:, 0]).sum(axis=-1)  # (reader, read)
    np.testing.assert_array_equal(seen > 0, np.tril(np.ones((7, 7), bool)))


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("implementation", [None, "xla"])
def test_grouped_attention_is_attention_with_repeated_heads(kv_heads, implementation):
    rng = np.random.default_rng(0)

    def draw(heads):
        return rng.standard_normal((2, 9, heads, 6)).astype(np.float32)

    query, key, value = draw(4), draw(kv_heads), draw(kv_heads)
    want = np.zeros_like(query)
    for b, head, t in np.ndindex(2, 4, 9):
        group = head // (4 // kv_heads)
        score = key[b, : t + 1, group] @ query[b, t, head] / np.sqrt(6)
        weight = np.exp(score - score.max())
        want[b, t, head] = weight @ value[b, : t + 1, group] / weight.sum()
    got = causal_attention(query, key, value, implementation)
    np.testing.assert_allclose(got, want, atol=2e-6)


def test_grouped_model_equals_the_full_one_with_repeated_kernels():
    grouped = dataclasses.replace(TINY, num_kv_heads=2)
    graphdef, params = make(grouped)
    full_graphdef, _ = make(TINY)
    assert params["blocks"]["attn"]["k_proj"]["kernel"].shape == (3, 32, 16)

    def repeat(kernel):
        heads = kernel.reshape(*kernel.shape[:2], 2, grouped.head_size)
        return jnp.repeat(heads, 2, axis=2).reshape(*kernel.shape[:2], -1)

    full = jax.tree.map(lambda leaf: leaf, params)
    for name in ("k_proj", "v_proj"):
        full["blocks"]["attn"][name]["kernel"] = repeat(params["blocks"]["attn"][name]["kernel"])
    tokens, _ = random_batch(TINY.vocab_size)
    np.testing.assert_allclose(
        apply(graphdef, params).logits(tokens),
        apply(full_graphdef, full).logits(tokens),
        atol=1e-4,
    )


def test_tied_head_is_the_transposed_embedding_and_gradients_add():
    tied_graphdef, tied = make(dataclasses.replace(TINY, tie_embeddings=True))
    untied_graphdef, _ = make(TINY)
    assert "lm_head" not in tied
    untied = {**tied, "lm_head": {"kernel": tied["embed"]["embedding"].T}}
    tokens, targets = random_batch(TINY.vocab_size)

    def loss(graphdef, params):
        return apply(graphdef, params).loss(tokens, targets)[0]

    got_value, got = value_and_grad(functools.partial(loss, tied_graphdef))(tied)
    value, want = value_and_grad(functools.partial(loss, untied_graphdef))(untied)
    np.testing.assert_allclose(got_value, value, rtol=1e-6)
    want["embed"]["embedding"] += want.pop("lm_head")["kernel"].T
    assert_trees_close(got, want, 1e-5)


def test_rotary_scores_depend_on_distance_alone_and_keep_length():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((1, 1, 2, 8)), jnp.float32)

    def at(position):
        return rotary(x, jnp.array([position]), 1e4)[0, 0]

    def score(p, q):
        return jnp.vdot(at(p)[0], at(q)[1])

    np.testing.assert_allclose(score(3, 1), score(103, 101), rtol=1e-4)
    assert abs(score(3, 1) - score(3, 2)) > 1e-2
    np.testing.assert_allclose(jnp.linalg.norm(at(77)), jnp.linalg.norm(x), rtol=1e-6)


def test_positions_may_differ_by_row():
    graphdef, params = make(TINY)
    model = apply(graphdef, params)
    tokens, _ = random_batch(TINY.vocab_size)
    default = model.hidden_states(tokens)
    rows = jnp.stack([jnp.arange(11), 5 + jnp.arange(11)])
    # Rotary attention is relative: a shift of all the positions of a row changes nothing.
    np.testing.assert_allclose(model.hidden_states(tokens, rows), default, atol=2e-5)
    stretched = model.hidden_states(tokens, 2 * rows)
    assert np.abs(stretched - default).max() > 1e-2


@pytest.mark.parametrize("remat", [False, True])  # a block, or its halves
def test_scanned_stack_equals_a_loop_over_blocks_run_alone(remat):
    graphdef, params = make(TINY)
    model, cut = apply(graphdef, params), stages(dataclasses.replace(TINY, remat=remat))
    tokens, targets = random_batch(TINY.vocab_size)
    x = cut.before.run(params, {"tokens": tokens})
    for i in range(TINY.num_layers):
        layer = jax.tree.map(lambda leaf, i=i: leaf[i], params["blocks"])
        for stage in cut.block:
            x = stage.run(layer, x)
    hidden, head = cut.after.run(params, x)
    np.testing.assert_allclose(model.hidden_states(tokens), hidden, atol=1e-5)
    nll, _ = cross_entropy(hidden, head, targets, chunk_tokens=TINY.loss_chunk_tokens)
    np.testing.assert_allclose(nll, model.loss(tokens, targets)[0], rtol=1e-6)


def test_layers_are_drawn_differently_and_with_the_right_spread():
    config = dataclasses.replace(TINY, hidden_size=64, init_std=0.02, param_dtype="bfloat16")
    _, params = init_params(config, jax.random.key(0))
    for path, leaf in paths(params).items():
        leaf = np.asarray(leaf, np.float32)
        if path.endswith("scale"):
            np.testing.assert_array_equal(leaf, 1.0)
        else:
            assert abs(leaf.std() / 0.02 - 1) < 0.05, path
            # bfloat16 normals of JAX never pass 2.7 standard deviations; a truncated one, 2.
            assert np.abs(leaf).max() > 2.9 * 0.02, path
    kernel = np.asarray(params["blocks"]["attn"]["q_proj"]["kernel"], np.float32)
    assert np.corrcoef(kernel[0].ravel(), kernel[1].ravel())[0, 1] < 0.1


def test_unknown_token_gives_nan_not_another_tokens_row():
    graphdef, params = make(TINY)
    rows = apply(graphdef, params).embed(jnp.array([[0, TINY.vocab_size]]))
    assert np.isfinite(rows[0, 0]).all()
    assert np.isnan(rows[0, 1]).all()


def test_remat_changes_memory_not_values():
    tokens, targets = random_batch(TINY.vocab_size, (4, 64))
    results = {}
    for remat in (False, True):
        graphdef, params = make(dataclasses.replace(TINY, remat=remat))

        def loss(p, graphdef=graphdef):
            return apply(graphdef, p).loss(tokens, targets)[0]

        step = value_and_grad(loss).lower(params).compile()
        results[remat] = step(params), step.memory_analysis().temp_size_in_bytes
    (value, grads), kept = results[False]
    (remat_value, remat_grads), recomputed = results[True]
    np.testing.assert_allclose(value, remat_value, rtol=1e-6)
    assert_trees_close(remat_grads, grads, 1e-5)
    assert recomputed < kept


def test_a_pytree_node_in_a_kernels_place_reaches_linear():
    @jax.tree_util.register_dataclass
    @dataclasses.dataclass
    class Sum:
        left: jax.Array
        right: jax.Array

        def matmul(self, x, out_dtype):
            return linear(x, self.left, out_dtype) + linear(x, self.right, out_dtype)

    graphdef, params = make(TINY)
    tokens, targets = random_batch(TINY.vocab_size)
    want, want_grads = value_and_grad(lambda p: apply(graphdef, p).loss(tokens, targets)[0])(params)
    halves = jax.tree_util.tree_map_with_path(
        lambda path, leaf: Sum(leaf / 2, leaf / 2) if path[-1].key == "kernel" else leaf, params
    )
    got, grads = value_and_grad(lambda p: apply(graphdef, p).loss(tokens, targets)[0])(halves)
    np.testing.assert_allclose(got, want, rtol=1e-5)

    def is_sum(node):
        return isinstance(node, Sum)

    left = jax.tree.map(lambda g: g.left if is_sum(g) else g, grads, is_leaf=is_sum)
    assert_trees_close(left, want_grads, 1e-4)


# Numerics.


def test_bfloat16_compute_is_close_and_its_outputs_are_float32():
    config = dataclasses.replace(TINY, dtype="bfloat16", param_dtype="bfloat16", init_std=0.1)
    graphdef, params = make(config)
    tokens, targets = random_batch(TINY.vocab_size)
    model = apply(graphdef, params)
    assert model.hidden_states(tokens).dtype == jnp.bfloat16
    assert model.logits(tokens).dtype == jnp.float32
    (nll, count), grads = value_and_grad(
        lambda p: apply(graphdef, p).loss(tokens, targets), has_aux=True
    )(params)
    assert (nll.dtype, count.dtype) == (jnp.float32, jnp.int32)
    assert {g.dtype for g in jax.tree.leaves(grads)} == {jnp.dtype(jnp.bfloat16)}

    exact = dataclasses.replace(config, dtype="float32", param_dtype="float32")
    wide = jax.tree.map(lambda p: p.astype(jnp.float32), params)
    exact_graphdef, _ = init_params(exact, jax.random.key(0))
    want, want_grads = value_and_grad(lambda p: apply(exact_graphdef, p).loss(tokens, targets)[0])(
        wide
    )
    np.testing.assert_allclose(nll, want, rtol=5e-3)
    assert_trees_close(grads, want_grads, 0.1)


def test_norm_statistics_are_float32():
    # One rounding, of the result, is all that bfloat16 activations may cost.
    norm = RMSNorm(dataclasses.replace(TINY, dtype="bfloat16"))
    x = jnp.asarray(np.random.default_rng(0).standard_normal((64, 32)), jnp.bfloat16)
    exact = np.asarray(x, np.float64)
    exact /= np.sqrt(np.mean(exact**2, axis=-1, keepdims=True) + TINY.rms_norm_eps)
    assert norm(x).dtype == jnp.bfloat16
    np.testing.assert_allclose(norm(x).astype(jnp.float32), exact, rtol=1.01 * 2.0**-8)


def test_rotary_angles_are_float32():
    # Position 1001 is not a bfloat16 number: rounded there, neighbours turn by the same angle.
    x = jnp.ones((1, 2, 1, 8), jnp.bfloat16)
    turned = rotary(x, jnp.array([1000, 1001]), 1e4)
    wide = rotary(x.astype(jnp.float32), jnp.array([1000, 1001]), 1e4)
    assert turned.dtype == jnp.bfloat16
    np.testing.assert_allclose(turned.astype(jnp.float32), wide, atol=1e-2)


def test_embedding_gradient_of_a_frequent_token_is_not_lost_in_bfloat16():
    config = dataclasses.replace(TINY, dtype="bfloat16", param_dtype="bfloat16")
    graphdef, params = make(config)
    tokens = jnp.zeros((4, 1024), jnp.int32)
    grads = jax.grad(lambda p: apply(graphdef, p).embed(tokens).astype(jnp.float32).sum())(params)
    np.testing.assert_array_equal(grads["embed"]["embedding"][0], 4096.0)  # Stalls at 256.


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="accelerators choose their own")
def test_float32_products_are_exact_to_the_last_bit_on_cpu():
    x = np.random.default_rng(0).standard_normal((64, 32)).astype(np.float32)
    np.testing.assert_array_equal(linear(jnp.asarray(x), jnp.eye(32)), x)


# The loss.


@pytest.mark.parametrize("chunk_tokens", [1, 5, 11, 22, 1000])
def test_chunked_loss_equals_the_dense_one(chunk_tokens):
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.standard_normal((2, 11, 8)), jnp.float32)
    head = jnp.asarray(rng.standard_normal((8, 61)), jnp.float32)
    _, targets = random_batch(61)
    targets = targets.at[1, 3:6].set(-1)

    def chunked(hidden, head):
        return cross_entropy(hidden, head, targets, chunk_tokens=chunk_tokens)[0]

    def dense(hidden, head):
        log_p = jax.nn.log_softmax(hidden @ head)
        picked = jnp.take_along_axis(log_p, jnp.maximum(targets, 0)[..., None], axis=-1)
        return -jnp.sum(jnp.where(targets >= 0, picked[..., 0], 0.0))

    want = dense(hidden, head)
    np.testing.assert_allclose(chunked(hidden, head), want, rtol=1e-5)
    # A factor, since a cotangent of one would hide that it is forgotten.
    got, pull_back = jax.vjp(chunked, hidden, head)
    _, dense_pull_back = jax.vjp(dense, hidden, head)
    np.testing.assert_allclose(got, want, rtol=1e-5)
    for grad, want_grad in zip(
        pull_back(jnp.float32(0.37)), dense_pull_back(jnp.float32(0.37)), strict=True
    ):
        assert relative_error(grad, want_grad) < 1e-5


def test_ignored_targets_neither_count_nor_pull():
    graphdef, params = make(TINY)
    tokens, targets = random_batch(TINY.vocab_size)
    masked = targets.at[:, 6:].set(-100)

    def loss(tokens, targets):
        return apply(graphdef, params).loss(tokens, targets)

    nll, count = loss(tokens, masked)
    short, short_count = loss(tokens[:, :6], targets[:, :6])
    assert count == short_count == 12
    np.testing.assert_allclose(nll, short, rtol=1e-5)
    # What stands where nothing is predicted, and after everything that is, does not matter.
    other, _ = loss(tokens.at[:, 6:].set(0), masked)
    np.testing.assert_allclose(other, nll, rtol=1e-5)

    nothing = jnp.full_like(targets, -1)
    (nll, count), grads = value_and_grad(
        lambda p: apply(graphdef, p).loss(tokens, nothing), has_aux=True
    )(params)
    assert (nll, count) == (0.0, 0)
    assert all(not np.any(g) for g in jax.tree.leaves(grads))


def test_logits_of_the_whole_batch_never_exist():
    batch, length, vocab, chunk = 4, 48, 97, 40  # More than D, less than 4 * 48.
    config = dataclasses.replace(TINY, vocab_size=vocab, loss_chunk_tokens=chunk)
    graphdef, params = make(config)
    tokens, targets = random_batch(vocab, (batch, length))

    def loss(p):
        return apply(graphdef, p).loss(tokens, targets)[0]

    for program in (loss, jax.grad(loss)):
        hlo = jax.jit(program).lower(params).compile().as_text()
        rows = [
            np.prod([int(n) for n in dims.split(",")]) // vocab
            for dims in re.findall(r"\w+\[([\d,]+)\]", hlo)
            if str(vocab) in dims.split(",")
        ]
        assert max(rows) == chunk


def test_head_gradient_is_accumulated_in_float32():
    # A thousand chunks of one token, each adding the same: bfloat16 would stall near 256 of them.
    config = dataclasses.replace(
        TINY, dtype="bfloat16", param_dtype="bfloat16", loss_chunk_tokens=1
    )
    graphdef, params = make(config)
    hidden = jnp.ones((1, 2048, TINY.hidden_size), jnp.bfloat16)
    targets = jnp.zeros((1, 2048), jnp.int32)

    def loss(params, n):
        head = apply(graphdef, params).head
        return cross_entropy(hidden[:, :n], head, targets[:, :n], chunk_tokens=1)[0]

    def grad(n):
        return jax.grad(loss)(params, n)["lm_head"]["kernel"].astype(jnp.float32)

    assert relative_error(grad(2048), 2048 * grad(1)) < 0.01


@pytest.mark.parametrize("tokens", [22, 110])  # below and above twice as many as features
def test_head_gradient_in_bfloat16_is_the_float32_one_rounded(tokens):
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.standard_normal((tokens, 32)), jnp.bfloat16)
    head = jnp.asarray(rng.standard_normal((32, 61)), jnp.bfloat16)
    targets = jnp.asarray(rng.integers(-20, 61, tokens), jnp.int32)

    def grads(dtype):
        def loss(hidden, head):
            return cross_entropy(hidden, head, targets, chunk_tokens=8)[0]

        return jax.grad(loss, argnums=(0, 1))(hidden.astype(dtype), head.astype(dtype))

    for grad, want in zip(grads(jnp.bfloat16), grads(jnp.float32), strict=True):
        assert grad.dtype == jnp.bfloat16
        assert relative_error(grad.astype(jnp.float32), want) < 2**-8  # a rounding to 8 bits


# Sizes.


def shapes(config):
    return jax.eval_shape(functools.partial(init_params, config), jax.random.key(0))[1]


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("llama_60m", 58_073_600),
        ("llama_130m", 134_105_856),
        ("llama_350m", 367_969_280),
        ("llama_1b", 1_339_082_752),
        ("llama_7b", 6_738_415_616),
    ],
)
def test_parameter_counts_of_the_papers_models(name, count):
    assert count_params(shapes(PRESETS[name])) == count


@pytest.mark.parametrize("name", PRESETS)
def test_presets_fit_their_names_and_build_without_memory(name):
    config = PRESETS[name]
    millions = {"m": 1, "b": 1000}[name[-1]] * int(name.removeprefix("llama_")[:-1])
    params = shapes(dataclasses.replace(config, param_dtype="bfloat16"))
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}
    assert 0.8 < count_params(params) / (millions * 1e6) < 1.35


def test_attn_and_mlp_select_exactly_the_seven_linears():
    found = paths(shapes(TINY))
    selected = {path for path in found if re.search("attn|mlp", path)}
    assert selected == {f"blocks/attn/{n}_proj/kernel" for n in "qkvo"} | {
        f"blocks/mlp/{n}_proj/kernel" for n in ("gate", "up", "down")
    }
    assert found.keys() - selected == {
        "embed/embedding",
        "blocks/input_norm/scale",
        "blocks/post_attention_norm/scale",
        "final_norm/scale",
        "lm_head/kernel",
    }
    assert found["blocks/mlp/down_proj/kernel"].shape == (3, 48, 32)


def test_init_is_jittable_and_its_graphdef_static():
    init = functools.partial(init_params, TINY)
    graphdef, params = jax.jit(init)(jax.random.key(0))
    eager_graphdef, eager = init(jax.random.key(0))
    assert graphdef == eager_graphdef
    assert hash(graphdef) == hash(eager_graphdef)
    assert_trees_close(params, eager, 1e-5)


def test_init_draws_one_layer_at_a_time():
    def temporary_bytes(num_layers):
        init = functools.partial(init_params, dataclasses.replace(TINY, num_layers=num_layers))
        program = jax.jit(lambda key: init(key)[1]).lower(jax.random.key(0)).compile()
        return program.memory_analysis().temp_size_in_bytes

    assert temporary_bytes(64) < 1.5 * temporary_bytes(2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_heads": 5}, "hidden_size 32 is not a multiple of num_heads 5"),
        ({"num_kv_heads": 3}, "num_heads 4 is not a multiple of num_kv_heads 3"),
        ({"head_dim": 7}, "the head size is 7"),
        ({"num_heads": 32}, "the head size is 1;"),
        ({"num_layers": 0}, "num_layers is 0"),
        ({"vocab_size": 1.5}, "vocab_size is 1.5"),
        ({"num_kv_heads": 0}, "num_kv_heads is 0"),
        ({"loss_chunk_tokens": -1}, "loss_chunk_tokens is -1"),
        ({"rms_norm_eps": 0.0}, "rms_norm_eps is 0.0"),
        ({"dtype": "bf16"}, "dtype is 'bf16'"),
        ({"param_dtype": "int4"}, "param_dtype is 'int4'"),
        ({"attention_implementation": "flash"}, "attention_implementation is 'flash'"),
        ({"attention_implementation": "cudnn"}, "cudnn attention has no float32"),
    ],
)
def test_bad_configs_are_refused_in_one_line(change, message):
    with pytest.raises(UserError, match=re.escape(message)) as error:
        dataclasses.replace(TINY, **change)
    assert "\n" not in str(error.value)


def test_head_dim_is_free_of_hidden_size_and_survives_replace():
    config = dataclasses.replace(TINY, head_dim=6, num_kv_heads=2)
    model = Llama(config, rngs=nnx.Rngs(0))
    assert model.logits(jnp.zeros((1, 5), jnp.int32)).shape == (1, 5, 61)
    assert dataclasses.replace(TINY, hidden_size=64).head_size == 16
