"""Lazy refreshes: gaps that double while a basis stays, for each matrix by itself."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from galore_jax import galore
from galore_jax.lazy_refresh import OBSERVED, overlap, times_in
from galore_jax.projected_grad import galore_state

GAP = 2


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def steady(stack, shape=(12, 20), rank=3):
    """Gradients of one subspace for each matrix, other ones at each count."""
    left = jnp.stack([normal(100 + i, shape[0], rank) for i in range(stack)])
    return lambda count: left @ normal(count, stack, rank, shape[1])


def wandering(count, stack, shape=(12, 20)):
    return normal(1000 + count, stack, *shape)


def test_overlap_is_one_for_the_same_space_and_zero_for_random_ones():
    basis = jnp.linalg.qr(normal(0, 30, 5))[0]
    turned = basis @ jnp.linalg.qr(normal(1, 5, 5))[0]
    assert overlap(basis, turned) == pytest.approx(1, abs=1e-5)
    others = jnp.linalg.qr(normal(2, 2000, 30, 5))[0]
    assert overlap(jnp.broadcast_to(basis, others.shape), others).mean() == pytest.approx(
        0, abs=0.01
    )
    assert overlap(jnp.eye(4), jnp.eye(4)) == 1


@pytest.mark.parametrize("projector_bits", [None, 4])
@pytest.mark.parametrize("projector", ["svd", "subspace_iteration"])
def test_gaps_double_where_the_basis_stays_and_only_there(projector, projector_bits):
    tx = galore(
        optax.adam(0.1),
        rank=3,
        update_proj_gap=GAP,
        projector=projector,
        lazy_refresh=0.6,
        rotate_moments=True,
        projector_bits=projector_bits,
        stacked_modules="^w$",
        target_modules="w",
    )
    params = {"w": jnp.zeros((3, 12, 20)), "b": jnp.zeros(20)}
    state = tx.init(params)
    still = steady(2)
    made = [[], [], []]
    step = jax.jit(tx.update)
    for count in range(48):
        grad = jnp.concatenate([still(count), wandering(count, 1)])
        before = state
        _, state = step({"w": grad, "b": jnp.ones(20)}, state, params)
        times, old = times_in(state)[0], times_in(before)[0]
        for i in range(3):
            if times.made[i] > old.made[i]:
                made[i].append(count)
            else:  # a matrix that is not due keeps its projector, bit for bit
                same = jax.tree.map(
                    lambda x, y, i=i: bool((x[i] == y[i]).all()),
                    galore_state(before).projector["w"],
                    galore_state(state).projector["w"],
                )
                assert all(jax.tree.leaves(same))
    first = [GAP * i for i in range(OBSERVED + 1)]
    doubled = [first[-1] + 2 * GAP * i for i in range(1, OBSERVED + 1)]
    again = [doubled[-1] + 4 * GAP * i for i in range(1, 3)]
    wanted = [x for x in first + doubled + again if x < 48]
    assert made[0] == made[1] == wanted
    assert made[2] == list(range(0, 48, GAP))
    assert isinstance(galore_state(state).refresh_times["b"], optax.MaskedNode)


def test_a_gap_halves_when_the_basis_moves_again():
    tx = galore(optax.sgd(0.1), rank=3, update_proj_gap=1, lazy_refresh=0.6, projector="eigh")
    params = {"w": jnp.zeros((12, 20))}
    state, still, step = tx.init(params), steady(1), jax.jit(tx.update)
    gaps = []
    for count in range(40):
        grad = still(count)[0] if count < 12 else wandering(count, 1)[0]
        _, state = step({"w": grad}, state, params)
        gaps.append(int(times_in(state)[0].gap))
    assert max(gaps) > 1
    assert gaps[-1] == 1


def test_without_it_nothing_changes():
    params, grads = {"w": jnp.zeros((12, 20))}, {"w": normal(0, 12, 20)}
    plain = galore(optax.adam(0.1), rank=3, update_proj_gap=2)
    lazy = galore(optax.adam(0.1), rank=3, update_proj_gap=2, lazy_refresh=1.0)
    one, other = plain.init(params), lazy.init(params)
    assert galore_state(one).refresh_times == ()
    for count in range(7):
        grads = {"w": normal(count, 12, 20)}
        a, one = plain.update(grads, one, params)
        b, other = lazy.update(grads, other, params)
        np.testing.assert_array_equal(a["w"], b["w"])
    assert int(times_in(other)[0].made) == 4


@pytest.mark.parametrize("bad", [0.0, jnp.nan])
def test_a_gradient_that_gives_no_projector_is_no_observation(bad):
    tx = galore(optax.sgd(0.1), rank=3, update_proj_gap=1, lazy_refresh=0.0)
    params = {"w": jnp.zeros((12, 20))}
    _, state = tx.update({"w": normal(0, 12, 20)}, tx.init(params), params)
    _, after = tx.update({"w": jnp.full((12, 20), bad)}, state, params)
    times = times_in(after)[0]
    assert (int(times.made), int(times.observed), int(times.due_at)) == (1, 0, 2)
    np.testing.assert_array_equal(after.projector["w"], state.projector["w"])


def test_refusals():
    for value, error in ((1.5, ValueError), (True, TypeError), ("0.4", TypeError)):
        with pytest.raises(error, match="lazy_refresh must be a number from 0 to 1"):
            galore(optax.sgd(0.1), lazy_refresh=value)
    tx = galore(optax.contrib.schedule_free_adamw(0.1), rank=3, lazy_refresh=0.4)
    with pytest.raises(ValueError, match="copies of the weights"):
        tx.init({"w": jnp.zeros((12, 20))})
