r"""Kernels whose weights are integers of 8 bits, and their updates by stochastic rounding.

A weight is a code times the scale of its column: $W_{ij} = c_{ij} s_j$ with
$-127 \le c_{ij} \le 127$, so that for ``y = x W``

$$y = (x\, c) \operatorname{diag}(s), \qquad dx = (dy \operatorname{diag}(s))\, c^\top .$$

Scales never enter the inner sums: a compiler may read the codes where they are. A table whose rows
are looked up has a scale for each row instead. Blocks of 256 values would need a decoded copy of
the matrix, and a byte for every 64 weights (docs/int8.md compares).

An update is added in units of the scale and rounded to a neighbouring code, up in proportion to
nearness, so that weights move by their updates on average, however small these are. No copy in
floats is kept. Weights in integers with stochastic rounding are those of Q-GaLore (Zhang et al.
2024, arXiv:2407.08296), section 3.3.
"""

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp

Per = Literal["column", "row"]

_TOP = 127  # the largest code
_HEADROOM = 1.125  # by which a new scale exceeds what its weights need: they often grow
_SLACK = 0.5  # a scale stays until its weights need less than this part of it
_TINY = float(jnp.finfo(jnp.float32).tiny)  # the smallest scale


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["codes", "scales", "variable"],
    meta_fields=["per", "dtype"],
)
@dataclasses.dataclass(frozen=True)
class Int8Kernel:
    """A kernel in integers, which stands in a float array's place among the params.

    Attributes:
      codes: int8 (..., m, n), from -127 to 127.
      scales: float32, (..., n) for columns, (..., m) for rows; greater than 0.
      variable: None, or (..., m, n) zeros by which to differentiate: the gradient with respect to
        them is that with respect to the weights.
      per: whether a column or a row shares a scale.
      dtype: of the array that it stands for, and of its gradients.
    """

    codes: Any
    scales: Any
    variable: Any = None
    per: Per = "column"
    dtype: Any = jnp.float32

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the array that it stands for."""
        return self.codes.shape

    @property
    def ndim(self) -> int:
        """The number of its axes."""
        return len(self.codes.shape)

    @property
    def T(self) -> "Int8Kernel":  # as of arrays
        """The transposed matrix."""
        variable = None if self.variable is None else jnp.matrix_transpose(self.variable)
        per: Per = "row" if self.per == "column" else "column"
        codes = jnp.matrix_transpose(self.codes)
        return dataclasses.replace(self, codes=codes, variable=variable, per=per)

    def __getitem__(self, index: Any) -> "Int8Kernel":
        """One matrix of a stack."""
        return jax.tree.map(lambda leaf: leaf[index], self)

    def astype(self, dtype: jax.typing.DTypeLike) -> "Int8Kernel":
        """The same integers, which stand for an array of another dtype."""
        return dataclasses.replace(self, dtype=jnp.dtype(dtype))

    def decode(self) -> jax.Array:
        """Returns the array that it stands for."""
        array = self.codes.astype(jnp.float32) * self._beside(self.scales)
        return array.astype(self.dtype)

    def matmul(self, x: jax.Array, out_dtype: jax.typing.DTypeLike | None) -> jax.Array:
        """Multiplies ``(T, m)`` by the (m, n) kernel, see ``galore_jax.linear``."""
        constant = dataclasses.replace(self, variable=None)
        return _differentiable_product(out_dtype, x, constant, self.variable)

    def product(self, x: jax.Array, out_dtype: jax.typing.DTypeLike | None = None) -> jax.Array:
        """Multiplies ``(T, m)`` by the (m, n) kernel; the sums are in float32."""
        if self.per == "row":
            x = (x.astype(jnp.float32) * self.scales).astype(x.dtype)
        sums = jnp.dot(x, self.codes.astype(x.dtype), preferred_element_type=jnp.float32)
        y = sums * self.scales if self.per == "column" else sums
        return y.astype(x.dtype if out_dtype is None else out_dtype)

    def rows(self, index: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
        """Decodes rows of a (V, D) table; those outside it are NaN."""
        of_rows = self.scales if self.per == "row" else jnp.ones(len(self.codes))
        rows = jnp.take(self.codes, index, axis=0, mode="fill").astype(jnp.float32)
        rows *= jnp.take(of_rows, index, axis=0, mode="fill")[..., None]  # NaN outside
        return (rows if self.per == "row" else rows * self.scales).astype(dtype)

    def _beside(self, scales: jax.Array) -> jax.Array:
        return scales[..., None, :] if self.per == "column" else scales[..., None]


def is_int8(node: Any) -> bool:
    """Tells whether a node of a tree is an ``Int8Kernel``, for ``is_leaf``.

    >>> is_int8({})
    False
    """
    return isinstance(node, Int8Kernel)


def encode(
    array: jax.Array,
    per: Per = "column",
    *,
    dtype: jax.typing.DTypeLike | None = None,
    noise: jax.Array | None = None,
) -> Int8Kernel:
    """Encodes a (..., m, n) array of floats.

    Args:
      array: finite.
      per: what shares a scale.
      dtype: of the array that the kernel stands for; None for that of ``array``.
      noise: of the array's shape, uniform in [0, 1), to round up by; None rounds to nearest.

    >>> kernel = encode(jnp.array([[1.0, -8.0], [0.5, 4.0]]))
    >>> kernel.codes.tolist(), kernel.decode().round(1).tolist()
    ([[113, -113], [56, 56]], [[1.0, -8.0], [0.5, 4.0]])
    """
    *stack, m, n = array.shape
    zeros = Int8Kernel(
        jnp.zeros(array.shape, jnp.int8),
        jnp.full((*stack, n if per == "column" else m), _TINY, jnp.float32),
        per=per,
        dtype=jnp.dtype(dtype or array.dtype),
    )
    return add(zeros, array, noise)


def add(kernel: Int8Kernel, update: jax.Array, noise: jax.Array | None = None) -> Int8Kernel:
    """Adds an update to a kernel; a matrix whose update is not finite stays as it was.

    The scale of a column stays while its weights need from half to all of the codes; otherwise it
    becomes 9/8 of what they need, and the column's codes are rounded anew with the same noise. A
    column whose update is zero stays as it is, bit for bit.

    Args:
      kernel: (..., m, n).
      update: of its shape.
      noise: of its shape, uniform in [0, 1): the mean of the new weights is then that of the sums.
        None rounds to nearest, and loses all updates below half a code.

    >>> kernel = encode(jnp.array([[1.0], [0.5]]))
    >>> add(kernel, jnp.array([[0.0], [0.25]])).codes.tolist()
    [[113], [84]]
    """
    axis = -2 if kernel.per == "column" else -1
    update, old = update.astype(jnp.float32), kernel.scales
    total = kernel.codes.astype(jnp.float32) * kernel._beside(old) + update
    largest = jnp.max(jnp.abs(total), axis=axis)
    needed = largest / _TOP
    stays = (needed <= old) & (needed >= _SLACK * old) | (update == 0).all(axis)
    scales = jnp.where(stays, old, jnp.maximum(_HEADROOM * needed, _TINY))
    is_usable = jnp.isfinite(update).all((-2, -1)) & jnp.isfinite(scales).all(-1)

    # The whole part of the old code apart: next to it small updates would be lost in float32.
    ratio = kernel._beside(jnp.where(stays, 1, old / scales))
    rescaled = kernel.codes.astype(jnp.float32) * ratio
    whole = jnp.floor(rescaled)
    rest = rescaled - whole + update / kernel._beside(scales)
    rounded = whole + jnp.floor(rest + (0.5 if noise is None else noise))
    codes = jnp.clip(rounded, -_TOP, _TOP).astype(jnp.int8)
    return dataclasses.replace(
        kernel,
        codes=jnp.where(is_usable[..., None, None], codes, kernel.codes),
        scales=jnp.where(is_usable[..., None], scales, old),
    )


def decoded(tree: Any) -> Any:
    """Decodes the kernels of a tree; only what is read of the result is computed under ``jit``.

    >>> decoded({"kernel": encode(jnp.ones((2, 3)))})["kernel"].shape
    (2, 3)
    """
    return jax.tree.map(lambda x: x.decode() if is_int8(x) else x, tree, is_leaf=is_int8)


def float_variables(tree: Any) -> Any:
    """Puts zeros in the place of kernels: what to differentiate by.

    >>> float_variables({"kernel": encode(jnp.ones((2, 3)))})["kernel"].tolist()
    [[0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]
    """
    return jax.tree.map(
        lambda x: jnp.zeros(x.shape, x.dtype) if is_int8(x) else x, tree, is_leaf=is_int8
    )


def with_float_variables(tree: Any, variables: Any) -> Any:
    """Puts variables of ``float_variables`` to where a model looks for its params.

    >>> params = {"kernel": encode(jnp.ones((2, 3)))}
    >>> with_float_variables(params, float_variables(params))["kernel"].variable.shape
    (2, 3)
    """
    return jax.tree.map(
        lambda x, z: dataclasses.replace(x, variable=z) if is_int8(x) else z,
        tree,
        variables,
        is_leaf=is_int8,
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _differentiable_product(
    out_dtype: Any, x: jax.Array, kernel: Int8Kernel, variable: jax.Array | None
) -> jax.Array:
    del variable
    return kernel.product(x, out_dtype)


def _forward(out_dtype, x, kernel, variable):
    like = None if variable is None else jnp.zeros((0,), variable.dtype)
    return kernel.product(x, out_dtype), (x, kernel, like)


def _backward(out_dtype, saved, dy):
    del out_dtype
    x, kernel, like = saved
    dy = dy.astype(x.dtype)
    gradient = None if like is None else jnp.dot(x.T, dy).astype(like.dtype)
    return kernel.T.product(dy), None, gradient


_differentiable_product.defvjp(_forward, _backward)
