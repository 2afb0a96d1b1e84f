"""Diagnostics against closed forms and NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from galore_jax.diagnostics import captured_energy, overlap, stable_rank
from galore_jax.projection import TwoSided


def orthonormal(seed, *shape):
    columns = np.random.default_rng(seed).standard_normal(shape)
    return jnp.asarray(np.linalg.qr(columns)[0], jnp.float32)


def matrices(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def test_captured_energy_of_a_diagonal_is_that_of_the_chosen_entries():
    values = np.array([4.0, 3.0, 2.0, 1.0])
    gradient = jnp.asarray(np.diag(values))[:, :3]
    total = 16 + 9 + 4
    for side, rows in (("left", 4), ("right", 3)):
        for r in range(1, 4):
            expected = np.sum(values[:r] ** 2) / total
            found = captured_energy(gradient, jnp.eye(rows, r), side)
            np.testing.assert_allclose(found, expected, rtol=1e-6)
    both = TwoSided(jnp.eye(4)[:, 1:3], jnp.eye(3, 2))
    np.testing.assert_allclose(captured_energy(gradient, both), 9 / total, rtol=1e-6)


def test_captured_energy_of_svd_is_the_share_of_the_top_singular_values():
    gradient = matrices(0, 5, 12, 20)
    u, s, vh = np.linalg.svd(np.asarray(gradient, np.float64), full_matrices=False)
    expected = (s[:, :4] ** 2).sum(-1) / (s**2).sum(-1)
    left, right = jnp.asarray(u[..., :4]), jnp.asarray(np.swapaxes(vh, -2, -1)[..., :4])
    for projector in (left, right, TwoSided(left, right)):
        found = captured_energy(gradient, projector)
        assert (found.shape, found.dtype) == ((5,), jnp.float32)
        np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_the_side_of_a_square_matrix_is_left_unless_told():
    gradient = jnp.array([[1.0, 3.0], [0.0, 0.0]])
    first = jnp.eye(2, 1)
    assert captured_energy(gradient, first) == captured_energy(gradient, first, "left") == 1
    np.testing.assert_allclose(captured_energy(gradient, first, "right"), 0.1, rtol=1e-6)


def test_nothing_is_lost_of_a_zero_gradient():
    gradient = jnp.zeros((3, 6, 10)).at[1].set(1.0)
    energy = captured_energy(gradient, jnp.broadcast_to(jnp.eye(6, 2), (3, 6, 2)))
    np.testing.assert_allclose(energy, [1, 1 / 3, 1], rtol=1e-6)
    assert captured_energy(jnp.zeros((6, 10)), jnp.zeros((6, 2))) == 1
    assert captured_energy(jnp.ones((6, 10)), jnp.zeros((6, 2))) == 0
    np.testing.assert_allclose(stable_rank(gradient), [0, 1, 0], rtol=1e-6)


@pytest.mark.parametrize("magnitude", [1e-30, 1e-20, 1e20, 1e30])
def test_magnitudes_whose_squares_float32_cannot_hold_are_fine(magnitude):
    gradient, basis = matrices(0, 6, 10), orthonormal(1, 6, 2)
    for found, expected in (
        (captured_energy(magnitude * gradient, basis), captured_energy(gradient, basis)),
        (stable_rank(magnitude * gradient), stable_rank(gradient)),
    ):
        np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_gives_nan(bad):
    gradient = jnp.ones((6, 10)).at[2, 3].set(bad)
    assert jnp.isnan(captured_energy(gradient, jnp.eye(6, 2)))
    assert jnp.isnan(stable_rank(gradient))
    assert jnp.isnan(overlap(gradient, jnp.eye(6, 2)))


@pytest.mark.parametrize(("r_a", "r_b"), [(3, 3), (2, 5), (5, 2), (1, 1)])
def test_overlap_is_the_mean_squared_cosine_of_the_principal_angles(r_a, r_b):
    a, b = orthonormal(0, 4, 12, r_a), orthonormal(1, 4, 12, r_b)
    cosines = np.linalg.svd(
        np.swapaxes(np.asarray(a, np.float64), -2, -1) @ np.asarray(b, np.float64),
        compute_uv=False,
    )
    found = overlap(a, b)
    assert (found.shape, found.dtype) == ((4,), jnp.float32)
    np.testing.assert_allclose(found, (cosines**2).mean(-1), rtol=1e-5)
    np.testing.assert_allclose(found, overlap(b, a), rtol=1e-5)


def test_overlap_is_one_for_a_subspace_and_zero_for_orthogonal_ones():
    basis, turn = orthonormal(0, 12, 5), orthonormal(1, 5, 5)
    assert 1 - 1e-5 < overlap(basis, basis @ turn) <= 1
    assert 1 - 1e-5 < overlap(basis, basis[:, 1:3]) <= 1
    assert overlap(jnp.eye(6, 2), jnp.eye(6)[:, 2:]) == 0


def test_stable_rank_of_known_singular_values():
    assert stable_rank(jnp.eye(7)) == 7
    assert stable_rank(jnp.diag(jnp.array([2.0, 1.0, 1.0, 0.0]))[:, :3]) == 1.5
    np.testing.assert_allclose(stable_rank(jnp.ones((3, 40))), 1, rtol=1e-6)
    gradient = matrices(0, 2, 3, 20, 12)
    s = np.linalg.svd(np.asarray(gradient, np.float64), compute_uv=False)
    expected = (s**2).sum(-1) / s[..., 0] ** 2
    for found in (stable_rank(gradient), stable_rank(jnp.swapaxes(gradient, -2, -1))):
        assert (found.shape, found.dtype) == ((2, 3), jnp.float32)
        np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_a_stack_is_a_loop_over_its_matrices():
    gradient, left, right = matrices(0, 3, 6, 10), orthonormal(1, 3, 6, 2), orthonormal(2, 3, 10, 2)
    for function, arguments in (
        (captured_energy, (gradient, left)),
        (captured_energy, (gradient, right)),
        (captured_energy, (gradient, TwoSided(left, right))),
        (overlap, (left, left[..., ::-1, :])),
        (stable_rank, (gradient,)),
    ):
        loop = [function(*jax.tree.map(lambda x, i=i: x[i], arguments)) for i in range(3)]
        for found in (function(*arguments), jax.jit(function)(*arguments)):
            np.testing.assert_allclose(found, loop, rtol=1e-5)


def test_one_basis_serves_a_whole_stack():
    gradient, basis = matrices(0, 3, 6, 10), orthonormal(1, 6, 2)
    energy = captured_energy(gradient, basis)
    np.testing.assert_allclose(energy, [captured_energy(g, basis) for g in gradient], rtol=1e-6)
    several = orthonormal(1, 3, 6, 2)
    assert overlap(several, basis).shape == captured_energy(gradient[0], several).shape == (3,)


def test_bfloat16_is_computed_in_float32():
    gradient, basis = matrices(0, 6, 10).astype(jnp.bfloat16), orthonormal(1, 6, 2)
    wide, stored = gradient.astype(jnp.float32), basis.astype(jnp.bfloat16)
    assert captured_energy(gradient, basis) == captured_energy(wide, basis)
    assert stable_rank(gradient) == stable_rank(wide)
    rounded = captured_energy(gradient, stored)
    assert rounded.dtype == jnp.float32
    np.testing.assert_allclose(rounded, captured_energy(wide, basis), rtol=0.02)
    assert 0.98 < overlap(stored, basis) <= 1


@pytest.mark.parametrize(
    ("projector", "side", "match"),
    [
        (jnp.eye(5, 2), None, r"\(5, 2\) fits no side .* \(6, 10\)"),
        (jnp.eye(6, 2), "right", r"\(6, 2\) fits not side='right' .* \(6, 10\)"),
        (jnp.eye(6, 2), "both", r"\(6, 2\) fits not side='both'"),
        (TwoSided(jnp.eye(10, 2), jnp.eye(6, 2)), None, r"\(10, 2\) and \(6, 2\) fits no side"),
        (TwoSided(jnp.eye(6, 2), jnp.eye(10, 2)), "left", "fits not side='left'"),
        (jnp.ones(6), None, r"must be \(\.\.\., m, n\) .* \(6,\)"),
    ],
)
def test_a_projector_of_another_matrix_is_refused(projector, side, match):
    with pytest.raises(ValueError, match=match):
        captured_energy(jnp.ones((6, 10)), projector, side)


def test_mistakes_are_named():
    with pytest.raises(ValueError, match=r"\(2, 6, 10\) and \(3, 6, 2\) do not broadcast"):
        captured_energy(jnp.ones((2, 6, 10)), jnp.ones((3, 6, 2)))
    with pytest.raises(TypeError, match="an array or a TwoSided, got MaskedNode"):
        captured_energy(jnp.ones((6, 10)), optax.MaskedNode())
    with pytest.raises(TypeError, match="each side"):
        overlap(TwoSided(jnp.eye(6, 2), jnp.eye(10, 2)), jnp.eye(6, 2))
    with pytest.raises(ValueError, match=r"got \(6, 2\) and \(10, 2\)"):
        overlap(jnp.eye(6, 2), jnp.eye(10, 2))
    with pytest.raises(ValueError, match=r"got \(6,\)"):
        stable_rank(jnp.ones(6))
