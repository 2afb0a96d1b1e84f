"""The maps against another implementation, rounding, blocks and slices of quantised arrays."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from galore_jax.quantization import (
    ENCODINGS,
    Quantized,
    block_shape,
    dequantize,
    dithering,
    quantize,
    scales_shape,
)

SIGNED = ("dynamic", "int8", "int4")


def paper_map(signed):
    """The 256 values, built as the paper describes them: decades cut into bins, whose middles."""
    values = [0.0, 1.0]
    for i in range(7):
        edges = np.linspace(0.1, 1, 2**i + 1 if signed else 2 ** (i + 1) + 1)
        middles = (edges[1:] + edges[:-1]) / 2 * 10.0 ** (i - 6)
        values += [*middles, *(-middles if signed else [])]
    return np.array(sorted(values))


def values_of(encoding):
    if encoding in ("int8", "int4"):
        levels = {"int8": 127, "int4": 7}[encoding]
        return np.arange(-levels, levels + 1) / levels
    values = paper_map(encoding == "dynamic")
    return values**2 if encoding == "dynamic_root" else values


def there_and_back(array, encoding, **options):
    return np.asarray(dequantize(quantize(jnp.asarray(array, jnp.float32), encoding, **options)))


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_values_of_the_map_are_fixed_points_with_codes_of_their_own(encoding):
    values = values_of(encoding)
    quantized = quantize(jnp.asarray(values, jnp.float32), encoding)
    assert len(set(np.asarray(quantized.codes).tolist())) == len(values)
    np.testing.assert_allclose(dequantize(quantized), values, rtol=3e-7)
    again = quantize(dequantize(quantized), encoding)
    np.testing.assert_array_equal(again.codes, quantized.codes)


@pytest.mark.parametrize("encoding", ["dynamic", "dynamic_unsigned"])
def test_rounding_is_to_the_nearest_value(encoding):
    # At a border between decades the nearest value is not the nearest bin's.
    values = paper_map(encoding == "dynamic")
    middles = (values[1:] + values[:-1]) / 2
    for nudge, expected in ((1e-5, (values[1:], values[:-1])), (-1e-5, (values[:-1], values[1:]))):
        given = np.append(middles * (1 + nudge), 1.0)
        away = np.append(np.where(middles > 0, *expected), 1.0)
        np.testing.assert_allclose(
            there_and_back(given, encoding, block_size=512), away, rtol=3e-7, atol=1e-12
        )


@pytest.mark.parametrize("encoding", ["dynamic", "dynamic_unsigned", "dynamic_root"])
def test_relative_error_over_seven_decades(encoding):
    # Half a bin over the least value of its decade: 0.45 / 2**i at its lower end, times ten; where
    # two decades meet, half of the gap. Twice that for the square of the root.
    rng = np.random.default_rng(0)
    for decade in range(7):
        low = 10.0 ** (-decade - 1)
        share = rng.uniform(low * 1.0001, low * 10, 5000)
        given = np.append(share, 1.0)
        root = encoding == "dynamic_root"
        found = there_and_back(given**2 if root else given, encoding, block_size=5001)
        error = np.abs(found / (given**2 if root else given) - 1)[:-1].max()
        bins = 2 ** (6 - decade) * (1 if encoding == "dynamic" else 2)
        bound = 4.5 / bins
        assert error <= ((1 + bound) ** 2 - 1 if root else bound) + 1e-6


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
def test_stochastic_rounding_is_right_on_average(encoding):
    # Noise that sweeps evenly: after 400 counts a mean is off by a bin over 400, and a bin is at
    # most as large as the value it is next to. Unsigned shares below the least value are left out.
    share = np.append(np.logspace(-5.5, -0.01, 300), 1.0)
    given = share**2 if encoding == "dynamic_root" else share
    found = [
        there_and_back(given, encoding, block_size=301, noise=dithering((301,), t))
        for t in range(400)
    ]
    found = np.sqrt(found) if encoding == "dynamic_root" else np.array(found)
    if encoding in ("int8", "int4"):
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
    with pytest.raises(ValueError, match=r"encoding must be one of dynamic, .* got 'fp8'"):
        quantize(jnp.ones(3), "fp8")
    with pytest.raises(ValueError, match="block_size must be an int of at least 1, got 0"):
        quantize(jnp.ones(3), block_size=0)
    with pytest.raises(TypeError, match="block_size must be an int"):
        quantize(jnp.ones(3), block_size=2.5)
    with pytest.raises(ValueError, match="a scalar has no blocks"):
        quantize(jnp.ones(()))
    quantized = quantize(jnp.ones((4, 512)))
    with pytest.raises(ValueError, match=r"have scales of shape \(4, 1\), got \(4, 2\)"):
        dequantize(Quantized(quantized.codes[:, :256], quantized.scales, "dynamic", 256))
