"""The axes of kernels, found from their paths in Tunix's, Flax's and MaxText's models."""

import functools

import jax
import jax.numpy as jnp
import pytest

from galore_jax import dimension_numbers, galore_adamw
from galore_jax.dimension_numbers import RULES

D, N, K, H, F, V, L = 16, 4, 2, 8, 32, 64, 3
LLAMA = {  # google/tunix models/llama3/model.py
    "embedder/input_embedding": ((V, D), None),
    "layers/0/attn/q_proj/w": ((D, N, H), (D, N * H)),
    "layers/0/attn/k_proj/w": ((D, K, H), (D, K * H)),
    "layers/0/attn/v_proj/w": ((D, K, H), (D, K * H)),
    "layers/0/attn/o_proj/w": ((N, H, D), (N * H, D)),
    "layers/0/mlp/gate_proj/kernel": ((D, F), (D, F)),
    "layers/0/mlp/down_proj/kernel": ((F, D), (F, D)),
    "layers/0/input_layernorm/w": ((D,), None),
    "final_norm/w": ((D,), None),
    "lm_head/w": ((D, V), None),
}
GEMMA = {  # models/gemma/model.py
    "layers/0/attn/attn_vec_einsum/w": ((N, H, D), (N * H, D)),
    "layers/0/attn/q_einsum/w": ((N, D, H), (D, N * H)),
    "layers/0/attn/kv_einsum/w": ((2, K, D, H), (2, D, K * H)),
    "layers/0/attn/qkv_einsum/w": ((3, N, D, H), (3, D, N * H)),
}
QWEN = {  # models/qwen3/model.py: experts
    "layers/0/attn/q_bias": ((N * H,), None),
    "layers/0/mlp/router/kernel": ((D, 4), None),
    "layers/0/mlp/gate_proj": ((4, D, F), (4, D, F)),
}
FLAX = {  # nnx.MultiHeadAttention, and stacks
    "self_attention/query/kernel": ((D, N, H), (D, N * H)),
    "self_attention/query/bias": ((N, H), None),
    "self_attention/out/kernel": ((N, H, D), (N * H, D)),
    "blocks/attn/q_proj/kernel": ((L, D, N * H), (L, D, N * H)),
    "blocks/norm/scale": ((L, D), None),
    "blocks/mlp/bias": ((L, F), None),
}


def tree(shapes):
    return {path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, (shape, _) in shapes.items()}


def matrix_shape(numbers, shape):
    rows, columns = numbers
    size = lambda axes: functools.reduce(lambda a, i: a * shape[i], axes, 1)  # noqa: E731
    stack = [shape[i] for i in range(len(shape)) if i not in rows + columns]
    return (*stack, size(rows), size(columns))


@pytest.mark.parametrize("shapes", [LLAMA, GEMMA, QWEN, FLAX])
def test_the_matrices_of_real_models(shapes):
    found = dimension_numbers(tree(shapes))
    for path, (shape, expected) in shapes.items():
        assert (found[path] and matrix_shape(found[path], shape)) == expected, path


def test_stacks_along_the_second_axis():
    # MaxText with scan_layers: the kernels' second axis indexes layers.
    rules = [("(query|key|value)/kernel", "mlnn"), ("out/kernel", "mlmn"), ("mlp", "mln")]
    shapes = {
        "layers/self_attention/query/kernel": (D, L, N, H),
        "layers/self_attention/out/kernel": (N, L, H, D),
        "layers/mlp/wi_0/kernel": (D, L, F),
    }
    params = {path: jnp.ones(shape) for path, shape in shapes.items()}
    found = dimension_numbers(params, rules=rules)
    matrices = [matrix_shape(found[path], shape) for path, shape in shapes.items()]
    assert matrices == [(L, D, N * H), (L, N * H, D), (L, D, F)]


def test_galore_takes_the_function():
    params = {path: jnp.ones(shape) for path, (shape, _) in LLAMA.items()}
    state = galore_adamw(0.1, rank=4, weight_dimension_numbers=dimension_numbers).init(params)
    assert state.projector["layers/0/attn/q_proj/w"].shape == (D, 4)
    assert state.inner_state[0].mu["layers/0/attn/o_proj/w"].shape == (N * H, 4)
    assert state.inner_state[0].mu["lm_head/w"].shape == (D, V)


def test_own_rules_come_first_and_may_be_all():
    params = {"lm_head": jnp.ones((4, 6)), "mlp": jnp.ones((4, 6)), "deep": jnp.ones((2, 4, 6))}
    found = dimension_numbers(params, rules=[("lm_head", "nm"), ("mlp", None)])
    assert found["lm_head"] == ((1,), (0,))
    assert found["mlp"] is None
    assert found["deep"] == ((1,), (2,))
    alone = dimension_numbers(params, rules=[("mlp", "mn")], default=False)
    assert alone == {"lm_head": None, "mlp": ((0,), (1,)), "deep": None}


def test_a_rule_with_more_letters_than_axes_passes_a_leaf_by():
    params = {"attn": {"kernel": jnp.ones((4, 2, 3)), "flat": jnp.ones((4, 6))}}
    found = dimension_numbers(params, rules=[("attn", "mnn")])["attn"]
    assert found == {"kernel": ((0,), (1, 2)), "flat": ((0,), (1,))}


@pytest.mark.parametrize(
    ("rule", "error", "words"),
    [
        ("attn", TypeError, "is a regular expression and letters"),
        (("attn", "mk"), ValueError, "the letters are m and n, both, and l"),
        (("attn", "mm"), ValueError, "the letters are m and n, both, and l"),
        (("attn", 2), ValueError, "the letters are m and n"),
        (("(", "mn"), ValueError, "no regular expression"),
        (("atn", "mn"), ValueError, r"no leaf follows the rule \('atn', 'mn'\).*paths are attn/w"),
        (("attn", "lmnn"), ValueError, "more letters than axes"),
    ],
)
def test_rules_that_are_none(rule, error, words):
    with pytest.raises(error, match=words):
        dimension_numbers({"attn": {"w": jnp.ones((2, 3, 4))}}, rules=[rule])


def test_the_last_rule_takes_every_matrix():
    assert RULES[-1] == ("", "mn")
