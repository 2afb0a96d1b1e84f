"""Orbax keeps a GaLoreState as it is: the masked leaves, both bases of ``full``, every bit."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from orbax.checkpoint import v1 as ocp

from galore_jax import GaLoreState, galore
from galore_jax.projection import TwoSided

SHAPES = {"wide": (6, 10), "tall": (10, 6), "bias": (10,)}


def tree(seed):
    rng = np.random.default_rng(seed)
    return {
        name: jnp.asarray(rng.standard_normal(shape), jnp.bfloat16 if name == "tall" else None)
        for name, shape in SHAPES.items()
    }


def make(proj_type):
    return galore(
        optax.adamw(optax.linear_schedule(0.1, 0.01, 6), weight_decay=0.1),
        rank=2,
        update_proj_gap=2,
        proj_type=proj_type,
        projector="subspace_iteration",  # the one basis that starts from the stored one
        target_modules=("wide", "tall"),
        projector_dtype="float32",
    )


def train(update, params, state, steps):
    for step in steps:
        updates, state = update(tree(step + 1), state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def same_bits(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        assert x.weak_type == y.weak_type
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


@pytest.mark.parametrize("proj_type", ["std", "full"])
def test_training_resumed_from_a_checkpoint_is_the_same_bit_for_bit(proj_type, tmp_path):
    # Guards against an array of the state that a checkpoint loses or casts (the count that decides
    # on refreshes, a float32 basis of a bfloat16 leaf, the second of two bases), and against a
    # node that does not survive the trip (MaskedNode, TwoSided).
    tx = make(proj_type)
    update = jax.jit(tx.update)
    # Five updates: the next one is within a gap, the one after it is a refresh.
    params, state = train(update, tree(0), tx.init(tree(0)), range(5))
    ocp.save(tmp_path / "state", {"params": params, "optimizer": state})

    fresh = {"params": tree(9), "optimizer": tx.init(tree(9))}
    restored = ocp.load(tmp_path / "state", jax.eval_shape(lambda: fresh))
    assert isinstance(restored["optimizer"], GaLoreState)
    assert restored["optimizer"].projector["bias"] == optax.MaskedNode()
    assert isinstance(restored["optimizer"].projector["wide"], TwoSided) == (proj_type == "full")
    same_bits(restored["optimizer"], state)

    expected = train(update, params, state, range(5, 8))
    resumed = train(update, restored["params"], restored["optimizer"], range(5, 8))
    same_bits(resumed, expected)


def test_a_checkpoint_of_another_rank_is_not_taken_for_this_one(tmp_path):
    # Orbax itself would cut or pad, were it asked to: here nothing is restored under a wrong rank.
    params = {"w": jnp.ones((6, 10))}
    state = galore(optax.adam(0.1), rank=3).init(params)
    ocp.save(tmp_path / "state", state)
    tx = galore(optax.adam(0.1), rank=2)
    with pytest.raises(ValueError, match=r"(?i)shape"):
        ocp.load(tmp_path / "state", jax.eval_shape(tx.init, params))
    as_saved = ocp.load(tmp_path / "state", jax.eval_shape(lambda: state))
    with pytest.raises(ValueError, match="made with another rank"):
        tx.update(params, as_saved, params)
