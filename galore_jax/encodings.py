r"""Codes for numbers in blocks, whose largest magnitude in each is its scale.

A code stands for a value of its encoding times the scale of its block:

| encoding | codes | values |
|---|---|---|
| adaptive_root | uint8 | $v_k^2$, $0 \le k \le 255$; the scale is that of the root |
| ratio | int8 | $k / 127$, $-127 \le k \le 127$, of the ratio to a root, see ``FirstMoment`` |
| int8 | int8 | $k / 127$, $-127 \le k \le 127$ |
| int4 | int4 | $k / 7$, $-7 \le k \le 7$ |

The adaptive values are $v_0 = 0$ and, from $v_1$ to $v_{255} = 1$, nearly evenly spaced on a
logarithmic scale, as floats of few bits are. Each block has its own step, one of 64, from 64 to 4.1
values for a factor of two: the finest that reaches down to the smallest magnitude of the block. The
finest of all reaches down by a factor of 2**4, the coarsest by 2**61. The last six bits of the
scale say which (a scale is then off by at most 8e-6 of itself). Values are found, and codes
decoded, by arithmetic on the bits of floats: no table is searched or gathered from.

``adaptive_root`` encodes the square root: a second moment enters Adam under a root, so that is
where its precision is wanted. Zero, and zero alone, has its code zero.

Arrays are in the shape of blocks here, see ``galore_jax.blocks.in_blocks``.
"""

from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp

Encoding = Literal["adaptive_root", "ratio", "int8", "int4"]
ENCODINGS: tuple[Encoding, ...] = get_args(Encoding)

_LEVELS = {"ratio": 127, "int8": 127, "int4": 7}
_TOP = 255  # the largest adaptive code
_FINEST = 1 << 17  # the finest adaptive step, in the bits of float32
_TINY = float(jnp.finfo(jnp.float32).tiny)  # smaller scales are zero: dividing by them is not safe
_ONE = 0x3F800000  # the bits of 1.0
_STEPS = 63  # the bits of a scale that say which step


def code_dtype(encoding: Encoding) -> Any:
    """Returns the dtype of an encoding's codes.

    Raises:
      ValueError: no encoding of that name.

    >>> code_dtype("adaptive_root")
    <class 'jax.numpy.uint8'>
    """
    if encoding not in ENCODINGS:
        raise ValueError(f"encoding must be one of {', '.join(ENCODINGS)}, got {encoding!r}")
    return {"adaptive_root": jnp.uint8, "int4": jnp.int4}.get(encoding, jnp.int8)


def block_scales(blocks: jax.Array, encoding: Encoding) -> jax.Array:
    """Returns the scales of an array in the shape of blocks, float32.

    Args:
      blocks: (..., a, rows, b, columns) float32, from ``galore_jax.blocks.in_blocks``.
      encoding: see the top of this module.

    Returns:
      (..., a, b) float32; NaN for a block with a value that is not finite.

    >>> import jax.numpy as jnp
    >>> block_scales(jnp.array([0.0, -8.0, 2.0]).reshape(1, 1, 1, 3), "int8").tolist()
    [[8.0]]
    """
    # Roots of the extremes alone: roots of all would be kept for their several uses.
    is_root = encoding == "adaptive_root"
    blocks = jnp.abs(jnp.where(blocks < 0, jnp.nan, blocks) if is_root else blocks)
    # The bits of magnitudes are ordered as they are, NaN last: XLA's maximum of floats may lose it.
    largest = _floats(_bits(blocks).max(axis=(-3, -1)))
    scales = jnp.sqrt(largest) if is_root else largest
    scales = jnp.where(scales < _TINY, 0, jnp.where(scales < jnp.inf, scales, jnp.nan))
    if encoding in _LEVELS:
        return scales
    smallest = jnp.sqrt(jnp.where(blocks > 0, blocks, jnp.inf).min(axis=(-3, -1)))
    reach = (_ONE - _bits(jnp.clip(smallest / scales, 0, 1))).astype(jnp.float32)
    step = jnp.maximum(reach / ((_TOP - 1) * _FINEST), 1)
    # Floats with four bits after the point have bits in equal steps of 2**19.
    choice = jnp.minimum((_bits(step) - _ONE + (2**19 - 1)) >> 19, _STEPS)
    return jnp.where(scales > 0, _floats((_bits(scales) & ~_STEPS) | choice), scales)


def encode_blocks(
    blocks: jax.Array, encoding: Encoding, scales: jax.Array, noise: jax.Array | None = None
) -> jax.Array:
    """Returns the codes of an array in the shape of blocks, see ``quantize``.

    >>> import jax.numpy as jnp
    >>> blocks = jnp.array([0.0, -8.0, 2.0]).reshape(1, 1, 1, 3)
    >>> encode_blocks(blocks, "int8", block_scales(blocks, "int8")).tolist()
    [[[[0, -127, 32]]]]
    """
    blocks = _coded(blocks, encoding)
    scales = _beside(scales, blocks)
    share = jnp.minimum(jnp.abs(blocks) * (1 / jnp.where(scales == 0, jnp.inf, scales)), 1)
    up = 0.5 if noise is None else noise
    if encoding in _LEVELS:
        level = _LEVELS[encoding]
        number = jnp.minimum(jnp.floor(share * level + up), level)
    else:
        number = jnp.where(blocks > 0, jnp.maximum(_adaptive_number(share, scales, up), 1), 0)
    number = _small_int(number)
    number = jnp.where(blocks < 0, -number, number)
    return number.astype(jnp.int8).astype(code_dtype(encoding))


def _coded(blocks: jax.Array, encoding: Encoding) -> jax.Array:
    """Returns what the codes encode: the numbers themselves, or their roots."""
    return jnp.sqrt(blocks) if encoding == "adaptive_root" else blocks


def decode_blocks(codes: jax.Array, scales: jax.Array, encoding: Encoding) -> jax.Array:
    """Returns the float32 numbers that codes in the shape of blocks stand for.

    >>> import jax.numpy as jnp
    >>> codes = jnp.array([0, -127, 32], jnp.int8).reshape(1, 1, 1, 3)
    >>> decode_blocks(codes, jnp.array([[8.0]]), "int8").round(1).tolist()
    [[[[0.0, -8.0, 2.0]]]]
    """
    if encoding not in _LEVELS:
        roots = decode_roots(codes, scales)
        # Squares must not vanish either.
        return jnp.maximum(roots * roots, jnp.minimum(roots, _TINY))
    return codes.astype(jnp.float32) * (_beside(scales, codes) / _LEVELS[encoding])


def decode_roots(codes: jax.Array, scales: jax.Array) -> jax.Array:
    """Returns the roots of what codes of ``adaptive_root`` stand for, float32.

    >>> import jax.numpy as jnp
    >>> codes = jnp.array([0, 255], jnp.uint8).reshape(1, 1, 1, 2)
    >>> decode_roots(codes, jnp.array([[8.0]])).tolist()
    [[[[0.0, 8.0]]]]
    """
    scales, codes = _beside(scales, codes), codes.astype(jnp.int32)
    return (
        jnp.where(codes == 0, 0, _floats(_ONE - (_TOP - codes) * _adaptive_step(scales))) * scales
    )


def _beside(scales: jax.Array, blocks: jax.Array) -> jax.Array:
    """Returns scales in a shape that broadcasts to blocks."""
    return scales.reshape(*blocks.shape[:-3], 1, blocks.shape[-2], 1)


def _adaptive_step(scales: jax.Array) -> jax.Array:
    """Returns the step between the floats that stand for the values, in their bits, int32."""
    choice = _bits(scales) & _STEPS
    return ((16 + (choice & 15)) << (choice >> 4)) * (_FINEST // 16)


def _adaptive_number(share: jax.Array, scales: jax.Array, up: jax.typing.ArrayLike) -> jax.Array:
    """Returns the whole number k, in float32, of the value of shares in [0, 1]; not above 255."""
    step = _adaptive_step(scales)
    steps_down = jnp.ceil((_ONE - _bits(share)).astype(jnp.float32) / step.astype(jnp.float32))
    steps_down = jnp.minimum(steps_down, _TOP - 1)
    below_bits = _ONE - _small_int(steps_down) * step
    value = _floats(below_bits)
    between = (share - value) / (_floats(below_bits + step) - value)
    return jnp.minimum(_TOP - steps_down + jnp.floor(between + up), _TOP)


def _bits(floats: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(floats, jnp.int32)


def _floats(bits: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def _small_int(whole: jax.Array) -> jax.Array:
    """Returns whole float32 numbers from 0 to 2**22 as int32, faster than the conversion.

    The conversion saturates. Added to 2**23 the numbers are the last bits of the sum.
    """
    return _bits(whole + 2.0**23) & 0x7FFFFF
