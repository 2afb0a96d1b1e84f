"""The values against another implementation, rounding, blocks and slices of quantised arrays."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from galore_jax.blocks import block_shape, scales_shape
from galore_jax.encodings import ENCODINGS
from galore_jax.quantization import (
    FirstMoment,
    Quantized,
    dequantize,
    quantize,
    quantize_like,
    ratio_to_root,
)
from galore_jax.rounding import dithering

SIGNED = ("ratio", "int8", "int4")


def magnitudes(choice):
    """The roots of the adaptive values, as the module describes them.

    They are zero, and floats in equal steps of their bits.
    """
    step = (16 + choice % 16) * 2 ** (choice // 16) / 16 / 64
    place = -step * np.arange(254, -1, -1)  # in binades, linear between powers of two
    return np.append(0, 2 ** np.floor(place) * (1 + place - np.floor(place)))


def values_of(encoding, choice=0):
    if encoding in SIGNED:
        levels = 7 if encoding == "int4" else 127
        return np.arange(-levels, levels + 1) / levels
    return magnitudes(choice) ** 2


def scale_of(encoding, choice):
    """The scale near 1 of a block with that choice of step."""
    bits = np.float32(1).view(np.int32) | (0 if encoding in SIGNED else choice)
    return jnp.asarray([bits.view(np.float32)])


def there_and_back(array, encoding, **options):
    return np.asarray(_there_and_back(jnp.asarray(array, jnp.float32), encoding, **options))


@functools.partial(jax.jit, static_argnums=1, static_argnames="block_size")
def _there_and_back(array, encoding, **options):
    return dequantize(quantize(array, encoding, **options))


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("choice", [0, 13, 37, 55])
def test_values_of_the_map_are_fixed_points_with_codes_of_their_own(encoding, choice):
    values, scales = values_of(encoding, choice), scale_of(encoding, choice)
    quantized = quantize(jnp.asarray(values, jnp.float32), encoding, scales=scales)
    assert len(set(np.asarray(quantized.codes).tolist())) == len(values)
    np.testing.assert_allclose(dequantize(quantized), values, rtol=2e-5)
    again = quantize(dequantize(quantized), encoding, scales=scales)
    np.testing.assert_array_equal(again.codes, quantized.codes)


@pytest.mark.parametrize("choice", [0, 13, 37, 55])
def test_rounding_is_to_the_nearest_root(choice):
    values, scale = magnitudes(choice), scale_of("adaptive_root", choice)
    middles = (values[1:] + values[:-1]) / 2
    for nudge, expected in ((1e-4, values[1:]), (-1e-4, values[:-1])):
        expected = np.maximum(expected, values[1])
        given = (middles * (1 + nudge) * float(scale[0])) ** 2
        found = there_and_back(given, "adaptive_root", scales=scale)
        np.testing.assert_allclose(found, expected**2, rtol=3e-5, atol=1e-30)


@pytest.mark.parametrize("binades", [4, 8, 16, 32, 55])
def test_relative_error_down_to_the_smallest_value(binades):
    # Half a step, of as many binades as are reached over the number of codes, and up to a sixteenth
    # coarser; twice that for the smallest values, beside which zero is, and for squares.
    rng = np.random.default_rng(0)
    given = np.append(2.0 ** rng.uniform(-binades, 0, 5000), [1.0, 2.0**-binades])
    found = there_and_back(given**2, "adaptive_root", block_size=5002)
    error = np.abs(found / given**2 - 1).max()
    bound = binades / 255 * 17 / 16
    assert error <= (1 + bound) ** 2 - 1 + 1e-4


def test_a_first_moment_is_decoded_with_the_second():
    first = jax.random.normal(jax.random.key(0), (8, 512)) * jnp.logspace(-9, 9, 512)
    second = jnp.square(first) * jax.random.uniform(jax.random.key(1), (8, 512), minval=0.5)
    nu = quantize(second, "adaptive_root")
    ratio = ratio_to_root(first, dequantize(nu))
    both = FirstMoment(quantize(ratio, "ratio"), nu)
    scale = jnp.abs(ratio.reshape(-1, 256)).max(1).repeat(256).reshape(8, 512)
    error = jnp.abs(dequantize(both) - first) / jnp.sqrt(dequantize(nu))
    assert (error <= 0.51 / 127 * scale).all()
    again = quantize_like(both, dequantize(both))
    np.testing.assert_array_equal(again.ratio.codes, both.ratio.codes)
    assert again.second is nu
    assert both.shape == (8, 512)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_zero_stays_zero_for_every_noise(encoding):
    # With 1 - noise, which is 1 once in 2**24 draws, it does not.
    array = jnp.zeros((2**12, 257)).at[:, 0].set(1.0)

    @jax.jit
    def codes(array, number):
        values = jax.lax.iota(jnp.int32, 2**20) + number * 2**20
        noise = values.reshape(-1, 256).astype(jnp.float32) * jnp.float32(2.0**-24)
        noise = jnp.pad(noise, ((0, 0), (1, 0)))
        return quantize(array, encoding, noise=noise, block_size=257).codes[:, 1:]

    for number in range(16):
        assert not codes(array, number).any()


def test_a_root_that_is_not_zero_has_no_code_zero():
    noise = jnp.arange(2**12).reshape(-1, 256) * jnp.float32(2.0**-12)
    for size in (1e-5, 1e-15, 1e-25, 1e-35):
        array = jnp.full(noise.shape, size).at[:, 0].set(1.0)
        quantized = quantize(array, "adaptive_root", noise=noise)
        assert quantized.codes.min() > 0
        assert dequantize(quantized).min() > 0


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_monotone_and_zero_is_exact(encoding):
    start = -1 if encoding in SIGNED else 0
    given = np.unique(np.append(np.linspace(start, 1, 4001), np.logspace(-9, 0, 4001)))
    found = there_and_back(given, encoding, block_size=len(given))
    assert (np.diff(found) >= 0).all()
    assert found[np.searchsorted(given, 0.0)] == 0
    assert (there_and_back(np.zeros((4, 300)), encoding) == 0).all()


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("size", [1e-45, 1e-38, 1e-30, 1e30, 3e38])
def test_finite_numbers_never_give_nan(encoding, size):
    given = np.float32(size) * np.linspace(0, 1, 701, dtype=np.float32)  # a prime: padded
    for noise in (None, dithering((701,), 1)):
        assert np.isfinite(there_and_back(given, encoding, noise=noise)).all()
    bad = given.copy()
    bad[3] = np.nan
    assert np.isnan(there_and_back(bad, encoding)[:256]).all()
    assert np.isfinite(there_and_back(bad, encoding)[256:]).all()


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf])
def test_what_is_not_finite_makes_its_block_nan(encoding, bad):
    # In several rows: there XLA's maximum on CPUs ignores a NaN.
    given = jnp.abs(jax.random.normal(jax.random.key(0), (8, 512)))
    for column in (0, 7, 255):
        found = np.isnan(there_and_back(given.at[2, column].set(bad), encoding))
        assert found[2, :256].all()
        assert found.sum() == 256


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_stochastic_rounding_is_right_on_average(encoding):
    # Noise that sweeps evenly: after 400 counts a mean is off by a bin over 400, and a bin is at
    # most as large as the value it is next to. Unsigned shares below the least value are left out.
    share = np.append(np.logspace(-5.5, -0.01, 300), 1.0)
    given = share**2 if encoding == "adaptive_root" else share
    given = jnp.asarray(given, jnp.float32)

    @jax.jit
    def rounded(count):
        noise = dithering((301,), count)
        return dequantize(quantize(given, encoding, block_size=301, noise=noise))

    found = np.array([rounded(t) for t in range(400)])
    found = np.sqrt(found) if encoding == "adaptive_root" else found
    if encoding in SIGNED:
        np.testing.assert_allclose(found.mean(0), share, atol=0.02 / 7)
    else:
        np.testing.assert_allclose(found.mean(0), share, rtol=0.02)


SHAPES = [(1000,), (3, 33, 70), (2, 5, 700), (64, 256), (7, 1), (5, 128)]
PADDED = [(2, 5, 701), (3, 31, 32)]  # no divisor of the columns, of the rows, is near enough


def test_padded_shapes_are():
    for m, n in [shape[-2:] for shape in PADDED]:
        rows, columns = block_shape((m, n))
        assert m % rows or n % columns


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("shape", SHAPES + PADDED)
def test_blocks_of_any_shape(shape, encoding):
    # The scale of every block is its own largest magnitude: a block across a stack would share it.
    rng = np.random.default_rng(0)
    given = np.abs(rng.standard_normal(shape)).astype("float32")
    quantized = quantize(jnp.asarray(given), encoding)
    assert quantized.codes.shape == shape
    assert quantized.scales.shape == scales_shape(shape)
    assert quantized.scales.dtype == jnp.float32
    # In int4 half a step is a fourteenth of the largest of at most 256 values, about 4 here.
    bound = {"int4": 0.36, "int8": 0.02}.get(encoding, 0.3)
    assert np.abs(np.asarray(dequantize(quantized)) - given).max() < bound


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_slice_of_a_stack_is_the_slice_quantised(encoding):
    given = jnp.abs(jax.random.normal(jax.random.key(0), (4, 48, 70)))
    stack = quantize(given, encoding)
    for i in range(4):
        one, alone = jax.tree.map(lambda x, i=i: x[i], stack), quantize(given[i], encoding)
        np.testing.assert_array_equal(one.codes, alone.codes)
        np.testing.assert_array_equal(one.scales, alone.scales)
        np.testing.assert_array_equal(dequantize(one), dequantize(stack)[i])
    mapped = jax.vmap(lambda x: quantize(x, encoding))(given)
    np.testing.assert_array_equal(mapped.codes, stack.codes)
    _, scanned = jax.lax.scan(lambda _, x: (None, dequantize(x)), None, stack)
    np.testing.assert_array_equal(scanned, jax.jit(dequantize)(stack))


def test_what_cannot_be_quantised():
    with pytest.raises(ValueError, match=r"encoding must be one of adaptive_root, .* got 'fp8'"):
        quantize(jnp.ones(3), "fp8")
    with pytest.raises(ValueError, match="block_size must be an int of at least 1, got 0"):
        quantize(jnp.ones(3), block_size=0)
    with pytest.raises(TypeError, match="block_size must be an int"):
        quantize(jnp.ones(3), block_size=2.5)
    with pytest.raises(ValueError, match="a scalar has no blocks"):
        quantize(jnp.ones(()))
    quantized = quantize(jnp.ones((4, 512)))
    with pytest.raises(ValueError, match=r"have scales of shape \(4, 1\), got \(4, 2\)"):
        dequantize(Quantized(quantized.codes[:, :256], quantized.scales, "int8", 256))
