"""Every basis against NumPy's SVD in float64, and at the edges: ranks, magnitudes, stacks."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from galore_jax import projectors
from galore_jax.diagnostics import captured_energy
from galore_jax.projection import MatrixSpec, TwoSided
from galore_jax.projectors import PROJECTOR_METHODS, find_projector

SIDES = ("left", "right", "both")
SHAPES = {
    "wide": (24, 40),
    "square": (24, 24),
    "stack": (4, 24, 40),
    "tall, two axes of a stack": (2, 2, 40, 24),
}
RANK = 6
KEY = jax.random.key(7)
STATIC = ("method", "rank", "side")
compiled_projector = jax.jit(find_projector, static_argnames=(*STATIC, "power_iterations"))
captured = jax.jit(captured_energy, static_argnames="side")
SEPARATED = 0.75 ** np.arange(24)
SPECTRA = {
    "1 / i": 1 / np.arange(1, 97),
    "exponential": np.exp(-np.arange(96) / 16),
}


def with_spectrum(shape, values, seed=0):
    """Random singular vectors and the given singular values, (..., m, n) float32."""
    rng = np.random.default_rng(seed)
    *stack, m, n = shape
    u, v = (np.linalg.qr(rng.standard_normal((*stack, s, min(m, n))))[0] for s in (m, n))
    return jnp.asarray((u * values) @ np.swapaxes(v, -2, -1), jnp.float32)


def with_positive_largest(columns):
    largest = np.abs(columns).argmax(-2)[..., None, :]
    return columns * np.sign(np.take_along_axis(columns, largest, -2))


def exact(gradient, rank, side):
    """The top singular vectors of NumPy's SVD in float64."""
    u, _, vh = np.linalg.svd(np.asarray(gradient, np.float64), full_matrices=False)
    left, right = u[..., :rank], np.swapaxes(vh, -2, -1)[..., :rank]
    sides = TwoSided(with_positive_largest(left), with_positive_largest(right))
    return sides if side == "both" else sides.left if side == "left" else sides.right


def find(
    method, gradient, side, rank=RANK, old=None, key=KEY, rounds=1, function=compiled_projector
):
    if old is None:
        proj_type = "full" if side == "both" else side
        shape = MatrixSpec.of_kernel(gradient.shape, rank, proj_type).projector_shape
        old = TwoSided(*map(jnp.zeros, shape)) if side == "both" else jnp.zeros(shape)
    return function(
        method=method,
        gradient=gradient,
        rank=rank,
        side=side,
        old=old,
        key=key,
        power_iterations=rounds,
    )


def assert_close(a, b, atol):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=atol), a, b)


def assert_orthonormal(projector):
    for columns in map(np.asarray, jax.tree.leaves(projector)):
        gram = np.swapaxes(columns, -2, -1) @ columns
        identity = np.broadcast_to(np.eye(columns.shape[-1]), gram.shape)
        np.testing.assert_allclose(gram, identity, atol=1e-5)


def relative_energy(gradient, projector, rank, side):
    best = jax.tree.map(jnp.asarray, exact(gradient, rank, side))
    ratio = captured(gradient, projector, side) / captured(gradient, best, side)
    return float(ratio.min())


@pytest.mark.parametrize("shape", SHAPES.values(), ids=list(SHAPES))
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize(("method", "atol"), [("svd", 1e-5), ("eigh", 1e-4)])
def test_svd_and_eigh_give_the_top_singular_vectors(method, atol, side, shape):
    gradient = with_spectrum(shape, SEPARATED)
    assert_close(find(method, gradient, side), exact(gradient, RANK, side), atol)


@pytest.mark.parametrize("side", SIDES)
def test_iterated_bases_converge_to_the_top_singular_vectors(side):
    gradient = with_spectrum((24, 40), SEPARATED)
    best = exact(gradient, RANK, side)
    many = {"rounds": jnp.int32(24), "function": jax.jit(find_projector, static_argnames=STATIC)}
    assert_close(find("randomized", gradient, side, **many), best, 1e-3)
    iterated = find("subspace_iteration", gradient, side, **many)
    for found, of_best in zip(jax.tree.leaves(iterated), jax.tree.leaves(best), strict=True):
        projections = (x @ np.swapaxes(x, -2, -1) for x in (np.asarray(found), of_best))
        assert_close(*projections, 1e-3)


@pytest.mark.parametrize("spectrum", SPECTRA.values(), ids=list(SPECTRA))
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize(
    ("method", "rounds", "start", "least"),
    [
        ("subspace_iteration", 1, "cold", 0.96),
        ("subspace_iteration", 1, "warm", 0.99),
        ("subspace_iteration", 2, "cold", 0.99),
        ("subspace_iteration", 2, "warm", 0.995),
        ("randomized", 1, "cold", 0.995),
    ],
)
def test_iterated_bases_capture_what_svd_does(method, rounds, start, least, side, spectrum):
    gradient, rank, old = with_spectrum((96, 160), spectrum), 24, None
    if start == "warm":
        noise = with_spectrum(gradient.shape, spectrum, seed=1)
        old = jax.tree.map(jnp.asarray, exact(gradient + 0.5 * noise, rank, side))
    found = find(method, gradient, side, rank, old, rounds=rounds)
    assert least <= relative_energy(gradient, found, rank, side) < 1 + 1e-5


@pytest.mark.parametrize("side", SIDES)
def test_subspace_iteration_finds_what_the_old_basis_is_orthogonal_to(side):
    rank, inside = 24, with_spectrum((48, 80), SPECTRA["exponential"][:48])
    gradient = jnp.zeros((96, 160)).at[:48, :80].set(inside)
    outside = TwoSided(jnp.eye(96)[:, 48 : 48 + rank], jnp.eye(160)[:, 80 : 80 + rank])
    old = outside if side == "both" else outside[SIDES.index(side)]
    assert captured(gradient, old, side) == 0
    found = find("subspace_iteration", gradient, side, rank, old)
    assert relative_energy(gradient, found, rank, side) > 0.95
    again = find("subspace_iteration", gradient, side, rank, found)
    assert relative_energy(gradient, again, rank, side) > 0.99


@pytest.mark.parametrize("side", SIDES)
def test_subspace_iteration_moves_continuously(side):
    gradient = with_spectrum((24, 40), 1 / np.arange(1, 25))
    direction = with_spectrum((24, 40), np.full(24, 24**-0.5), seed=1)
    old = jax.tree.map(jnp.asarray, exact(gradient, RANK, side))
    found = find("subspace_iteration", gradient, side, old=old)
    for eps in (1e-2, 1e-3, 1e-4):
        moved = find("subspace_iteration", gradient + eps * direction, side, old=old)
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(moved), strict=True):
            assert jnp.linalg.norm(a - b) < 20 * eps
            assert (jnp.sum(a * b, axis=0) > 0.9).all()


def test_subspace_iteration_keeps_columns_where_singular_values_cross():
    values = jnp.array([1.0, 1.01, 0.1, 0.01])
    before, after = jnp.diag(values), jnp.diag(values[jnp.array([1, 0, 2, 3])])
    swapped = [find("svd", g, "left", rank=2) for g in (before, after)]
    assert jnp.abs(swapped[0] - swapped[1]).max() == 1
    old = jnp.eye(4, 2)
    kept = [find("subspace_iteration", g, "left", rank=2, old=old) for g in (before, after)]
    assert jnp.abs(kept[0] - kept[1]).max() < 0.01


@pytest.mark.parametrize("side", ["right", "both"])
@pytest.mark.parametrize("method", PROJECTOR_METHODS)
def test_columns_are_orthonormal_whatever_the_rank_of_the_gradient(method, side):
    low = with_spectrum((24, 40), SEPARATED * (np.arange(24) < 3))
    one = jnp.ones((24, 40))
    single = jnp.zeros((24, 40)).at[3, 5].set(-2.0)
    gradient = jnp.stack([low, one, single, jnp.zeros((24, 40))])
    assert_orthonormal(find(method, gradient, side))


@pytest.mark.parametrize("magnitude", [1e-30, 1e30])
@pytest.mark.parametrize("method", PROJECTOR_METHODS)
def test_the_magnitude_of_the_gradient_does_not_matter(method, magnitude):
    gradient = with_spectrum((24, 40), SEPARATED)
    for side in ("right", "both"):
        ordinary, extreme = (find(method, g, side) for g in (gradient, magnitude * gradient))
        assert_close(extreme, ordinary, 1e-4)


@pytest.mark.parametrize("method", PROJECTOR_METHODS)
def test_a_rank_above_the_matrix_takes_all_of_it(method):
    gradient = with_spectrum((8, 12), SEPARATED[:8])
    found = find(method, gradient, "both", rank=64)
    assert (found.left.shape, found.right.shape) == ((8, 8), (12, 8))
    assert_orthonormal(found)


@pytest.mark.parametrize("method", PROJECTOR_METHODS)
def test_a_bfloat16_gradient_has_the_basis_of_its_float32(method):
    gradient = with_spectrum((24, 40), SEPARATED).astype(jnp.bfloat16)
    found = find(method, gradient, "right")
    assert found.dtype == jnp.float32
    assert_close(found, find(method, gradient.astype(jnp.float32), "right"), 0)


def test_random_looks_at_the_key_alone():
    gradients = with_spectrum((24, 40), SEPARATED), jnp.zeros((24, 40))
    for side in ("right", "both"):
        a, b = (find("random", gradient, side) for gradient in gradients)
        assert_close(a, b, 0)
        other = find("random", gradients[0], side, key=jax.random.key(8))
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(other), strict=True):
            assert jnp.abs(x - y).max() > 0.1


@pytest.mark.parametrize("side", ["right", "both"])
@pytest.mark.parametrize("method", PROJECTOR_METHODS)
def test_a_stack_is_a_loop_over_its_matrices(method, side):
    gradient, other = (with_spectrum(SHAPES["stack"], SEPARATED, seed) for seed in (0, 1))
    old = jax.tree.map(jnp.asarray, exact(other, RANK, side))
    stacked = find(method, gradient, side, old=old)
    for i in range(len(gradient)):
        alone = find(method, gradient[i], side, old=jax.tree.map(lambda x, i=i: x[i], old))
        assert_close(jax.tree.map(lambda x, i=i: x[i], stacked), alone, 1e-5)


@pytest.mark.parametrize("method", PROJECTOR_METHODS)
def test_compiled_is_the_same(method):
    gradient = with_spectrum((24, 40), SEPARATED)
    called = find(method, gradient, "both", function=find_projector)
    assert_close(find(method, gradient, "both"), called, 1e-4)


@pytest.mark.parametrize("side", ["right", "both"])
@pytest.mark.parametrize("method", ["svd", "eigh", "randomized"])
def test_the_largest_entry_of_a_vector_is_positive(method, side):
    gradient = with_spectrum(SHAPES["stack"], SEPARATED)
    for sign in (1, -1):
        for columns in map(np.asarray, jax.tree.leaves(find(method, sign * gradient, side))):
            assert (columns.max(-2) == np.abs(columns).max(-2)).all()


def test_orthonormalized_columns_keep_their_side():
    columns = with_spectrum((3, 24, 6), SEPARATED[:6])
    found = projectors.orthonormalized(columns)
    assert_orthonormal(found)
    triangular = jnp.swapaxes(found, -2, -1) @ columns
    assert jnp.abs(jnp.tril(triangular, -1)).max() < 1e-6
    assert (jnp.diagonal(triangular, axis1=-2, axis2=-1) > 0).all()


def test_stacks_are_orthonormalized_at_once_without_a_hang():
    # Stacked QRs that run at once (jaxlib 0.10.2, CPU) take the cores from each other's threads.
    program = """
import jax
from galore_jax.projectors import orthonormalized

stacks = [jax.random.normal(jax.random.key(i), (6, 256, 64)) for i in range(4)]
for columns in jax.block_until_ready(jax.jit(lambda s: list(map(orthonormalized, s)))(stacks)):
    assert bool(abs(columns.mT @ columns - jax.numpy.eye(64)).max() < 1e-5)
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
