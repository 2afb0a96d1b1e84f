"""Which leaves are projected, along which axes, and at which rank."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax.contrib import GaLoreDimensionNumbers, MuonDimensionNumbers

from galore_jax import galore
from galore_jax.weights import matrix_specs

PARAMS = {
    "attn": {"kernel": jnp.ones((8, 2, 5)), "bias": jnp.ones(10)},
    "embed": jnp.ones((12, 8)),
    "norm": jnp.ones(8),
}
PATHS = ["attn/bias", "attn/kernel", "embed", "norm"]


def found(**arguments):
    specs = jax.tree.structure(PARAMS).flatten_up_to(
        matrix_specs(PARAMS, **{"rank": 3, **arguments})
    )
    return {path: spec for path, spec in zip(PATHS, specs, strict=True) if spec is not None}


def test_axes_that_are_not_named_index_a_stack():
    numbers = {"attn": {"kernel": GaLoreDimensionNumbers(0, 2), "bias": None}, "embed": None}
    matrices = found(weight_dimension_numbers={**numbers, "norm": None})
    assert list(matrices) == ["attn/kernel"]
    assert matrices["attn/kernel"].matrix_shape == (2, 8, 5)
    leaf = jax.random.normal(jax.random.key(0), (8, 2, 5))
    matrix = matrices["attn/kernel"].to_matrix(leaf)
    assert np.array_equal(matrix[1], leaf[:, 1])
    assert np.array_equal(matrices["attn/kernel"].from_matrix(matrix), leaf)


@pytest.mark.parametrize("kind", [GaLoreDimensionNumbers, MuonDimensionNumbers])
@pytest.mark.parametrize("axes", [(0, (1, 2)), (-3, (-2, 2)), ((2, 0), 1), (1, (2, 0))])
def test_several_axes_make_one_side(kind, axes):
    rows, columns = axes
    numbers = kind(reduction_axis=rows, output_axis=columns)
    spec = lambda params: {  # noqa: E731
        "attn": {"kernel": numbers, "bias": None}, "embed": None, "norm": None
    }  # fmt: skip
    matrix = found(weight_dimension_numbers=spec)["attn/kernel"]
    leaf = jax.random.normal(jax.random.key(0), (8, 2, 5))
    order = np.r_[rows, columns]
    expected = np.transpose(leaf, order).reshape(matrix.matrix_shape)
    assert np.array_equal(matrix.to_matrix(leaf), expected)
    assert np.array_equal(matrix.from_matrix(expected), leaf)


def test_one_specification_is_for_every_leaf_of_two_axes_or_more():
    matrices = found(weight_dimension_numbers=GaLoreDimensionNumbers())
    assert {path: m.matrix_shape for path, m in matrices.items()} == {
        "attn/kernel": (5, 8, 2), "embed": (12, 8)
    }  # fmt: skip
    matrices = found(weight_dimension_numbers=GaLoreDimensionNumbers(), target_modules="attn")
    assert list(matrices) == ["attn/kernel"]


def test_an_update_of_a_permuted_leaf_is_that_of_the_matrix():
    leaf = jax.random.normal(jax.random.key(0), (8, 2, 5))
    flat = leaf.reshape(8, 10)
    tall = galore(optax.adam(0.1), rank=3)
    apart = galore(
        optax.adam(0.1), rank=3, weight_dimension_numbers=GaLoreDimensionNumbers(0, (1, 2))
    )
    expected, _ = tall.update({"w": flat}, tall.init({"w": flat}), {"w": flat})
    updates, state = apart.update({"w": leaf}, apart.init({"w": leaf}), {"w": leaf})
    np.testing.assert_allclose(updates["w"].reshape(8, 10), expected["w"], rtol=1e-6)
    assert state.inner_state[0].mu["w"].shape == (3, 10)


def test_rank_by_path_and_leaf():
    asked = {}

    def rank(path, leaf):
        asked[path] = leaf.shape
        return {"embed": 4, "attn/kernel": None}[path]

    matrices = found(rank=rank, target_modules=("attn", "embed"))
    assert {path: m.rank for path, m in matrices.items()} == {"embed": 4}
    assert asked == {"attn/kernel": (8, 2, 5), "embed": (12, 8)}
    state = galore(optax.adam(0.1), rank=lambda path, leaf: leaf.shape[-1] // 2).init(PARAMS)
    assert state.projector["embed"].shape == (8, 4)


def test_no_leaf_at_all_is_the_plain_optimizer():
    params = {"bias": jnp.ones(3)}
    tx, plain = galore(optax.adam(0.1), rank=2), optax.adam(0.1)
    ours, _ = jax.jit(tx.update)(params, tx.init(params), params)
    expected, _ = plain.update(params, plain.init(params), params)
    np.testing.assert_allclose(ours["bias"], expected["bias"], rtol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"rank": lambda path, leaf: 0}, ValueError, r"rank\('embed', leaf\) must be .* got 0"),
        ({"rank": lambda path, leaf: 2.5}, TypeError, r"rank\('embed', leaf\) must be .* got 2.5"),
        (
            {"weight_dimension_numbers": GaLoreDimensionNumbers(0, 3)},
            ValueError,
            "does not fit the 3 axes of attn/kernel",
        ),
        (
            {"weight_dimension_numbers": GaLoreDimensionNumbers((), 1)},
            ValueError,
            "does not fit the 3 axes of attn/kernel",
        ),
        (
            {"weight_dimension_numbers": GaLoreDimensionNumbers(0, -3)},
            ValueError,
            "names an axis of attn/kernel twice",
        ),
        (
            {"weight_dimension_numbers": {"embed": GaLoreDimensionNumbers()}},
            ValueError,
            "weight_dimension_numbers must be .* structure of the params",
        ),
        (
            {"weight_dimension_numbers": jax.tree.map(lambda x: 1, PARAMS)},
            TypeError,
            "weight_dimension_numbers must hold .* got 1",
        ),
        ({"target_modules": "atn"}, ValueError, "'atn' matches no leaf.*attn/bias, attn/kernel"),
    ],
)
def test_what_does_not_fit_is_named(arguments, error, message):
    with pytest.raises(error, match=message):
        galore(optax.sgd(1.0), **{"rank": 2, **arguments}).init(PARAMS)


def test_a_state_of_another_rank_is_refused():
    params = {"w": jnp.ones((6, 8))}
    state = galore(optax.sgd(1.0), rank=2).init(params)
    with pytest.raises(ValueError, match=r"made with another rank.*\(6, 2\).*\(6, 3\)"):
        galore(optax.sgd(1.0), rank=3).update(params, state, params)
