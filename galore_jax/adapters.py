r"""Kernels of which a low-rank part alone is trained: LoRA, ReLoRA, and low-rank factors.

For a kernel W, (m, n), $A \in \mathbb{R}^{m \times r}$ and $B \in \mathbb{R}^{r \times n}$:

| | the model multiplies by | trained |
|---|---|---|
| ``LoRAKernel`` | $W + \frac{\alpha}{r} A B$ | A, B; W is frozen |
| ``LowRankKernel`` | $A B$ | A, B |

LoRA: Hu et al. 2021, arXiv:2106.09685. ReLoRA merges A B into W from time to time and begins anew
(Lialin et al. 2023, arXiv:2307.05695). These are the baselines of Zhao et al. 2024, Table 2.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from galore_jax.int8_kernels import is_int8
from galore_jax.kernels import Frozen
from galore_jax.weights import Patterns, leaf_path, path_filter, projection_mask


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["kernel", "a", "b", "dropout_key"],
    meta_fields=["scale", "dropout"],
)
@dataclasses.dataclass(frozen=True)
class LoRAKernel:
    """A frozen kernel with a low-rank part that is trained.

    Attributes:
      kernel: W, (..., m, n); ``optax.MaskedNode()`` where only what is trained is wanted.
      a: A, (..., m, r).
      b: B, (..., r, n).
      dropout_key: a PRNG key, with the leading axes of the others, to drop inputs of A by; None
        drops none.
      scale: factor on A B, alpha / r.
      dropout: the part of the inputs of A that is dropped, at least 0 and less than 1.
    """

    kernel: Any
    a: Any
    b: Any
    dropout_key: Any = None
    scale: float = 1.0
    dropout: float = 0.0

    def matmul(self, x: jax.Array, out_dtype: jax.typing.DTypeLike | None) -> jax.Array:
        """Multiplies ``(T, m)`` by the (m, n) kernel, see ``galore_jax.linear``."""
        inputs = x
        if self.dropout_key is not None and self.dropout > 0:
            kept = jax.random.bernoulli(self.dropout_key, 1 - self.dropout, x.shape)
            inputs = jnp.where(kept, x / (1 - self.dropout), 0).astype(x.dtype)
        low_rank = jnp.dot(inputs, self.a.astype(x.dtype)) * jnp.asarray(self.scale, x.dtype)
        frozen = jax.lax.stop_gradient(self.kernel).astype(x.dtype)
        return jnp.dot(x, frozen, preferred_element_type=out_dtype) + jnp.dot(
            low_rank, self.b.astype(x.dtype), preferred_element_type=out_dtype
        )


@functools.partial(jax.tree_util.register_dataclass, data_fields=["a", "b"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class LowRankKernel:
    """A kernel that is the product of two factors.

    Attributes:
      a: A, (..., m, r).
      b: B, (..., r, n).
    """

    a: Any
    b: Any

    def matmul(self, x: jax.Array, out_dtype: jax.typing.DTypeLike | None) -> jax.Array:
        """Multiplies ``(T, m)`` by the (m, n) kernel, see ``galore_jax.linear``."""
        low_rank = jnp.dot(x, self.a.astype(x.dtype))
        return jnp.dot(low_rank, self.b.astype(x.dtype), preferred_element_type=out_dtype)


def is_adapter(node: Any) -> bool:
    """Tells whether a node of a tree is one of the kernels of this module, for ``is_leaf``.

    >>> is_adapter(LowRankKernel(1, 2)), is_adapter({})
    (True, False)
    """
    return isinstance(node, LoRAKernel | LowRankKernel)


def add_lora(
    params: Any,
    key: jax.Array,
    *,
    rank: int,
    alpha: float = 32.0,
    dropout: float = 0.0,
    target_modules: Patterns | None = None,
    stacked_modules: Patterns | None = None,
) -> Any:
    """Adds a low-rank part to kernels; the function that the model computes is the same.

    Args:
      params: a tree of arrays.
      key: a PRNG key. A is uniform between plus and minus ``1 / sqrt(m)``, B is zero.
      rank: r, at least 1; a smaller kernel takes ``min(r, m, n)``.
      alpha: the part is multiplied by ``alpha / r``; greater than 0.
      dropout: of the inputs of A in training; at least 0 and less than 1.
      target_modules: regular expressions on the paths of the kernels; None for every matrix.
      stacked_modules: regular expressions on the paths of leaves stacked by layer.

    Returns:
      The tree with a ``LoRAKernel`` for each of these kernels, A and B in its dtype.

    Raises:
      ValueError: a number out of its range, or patterns that match no matrix.

    >>> params = add_lora({"kernel": jnp.ones((4, 6))}, jax.random.key(0), rank=2)
    >>> params["kernel"].a.shape, params["kernel"].b.shape, params["kernel"].scale
    ((4, 2), (2, 6), 16.0)
    """
    for name, value, is_allowed, allowed in (
        ("rank", rank, rank >= 1, "at least 1"),
        ("alpha", alpha, alpha > 0, "greater than 0"),
        ("dropout", dropout, 0 <= dropout < 1, "at least 0 and less than 1"),
    ):
        if not is_allowed:
            raise ValueError(f"{name} must be {allowed}, got {value!r}")

    def node(kernel: jax.Array, key: jax.Array) -> LoRAKernel:
        *stack, m, n = kernel.shape
        r = min(rank, m, n)
        a = _draw_a(key, (*stack, m, r), kernel.dtype)
        b = jnp.zeros((*stack, r, n), kernel.dtype)
        return LoRAKernel(kernel, a, b, scale=alpha / rank, dropout=dropout)

    return _map_kernels(node, params, key, target_modules, stacked_modules)


def factorize(
    params: Any,
    key: jax.Array,
    *,
    rank: int,
    target_modules: Patterns | None = None,
    stacked_modules: Patterns | None = None,
) -> Any:
    """Puts factors of random numbers in the place of kernels, of about the kernels' variance.

    Args and errors are those of ``add_lora``.

    >>> params = factorize({"kernel": jnp.ones((4, 6))}, jax.random.key(0), rank=2)
    >>> params["kernel"].a.shape, params["kernel"].b.shape
    ((4, 2), (2, 6))
    """
    if rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank!r}")

    def node(kernel: jax.Array, key: jax.Array) -> LowRankKernel:
        *stack, m, n = kernel.shape
        r = min(rank, m, n)
        # Entries of A B have the variance r std_a^2 std_b^2.
        std = (jnp.std(kernel.astype(jnp.float32)) / jnp.sqrt(r)) ** 0.5
        keys = jax.random.split(key)
        a, b = (
            (std * jax.random.normal(k, (*stack, *shape), jnp.float32)).astype(kernel.dtype)
            for k, shape in zip(keys, ((m, r), (r, n)), strict=True)
        )
        return LowRankKernel(a, b)

    return _map_kernels(node, params, key, target_modules, stacked_modules)


def freeze_rest(params: Any, patterns: Patterns) -> Any:
    """Freezes all arrays but those whose paths match, and the low-rank parts of kernels.

    Args:
      params: a tree that ``add_lora`` gave.
      patterns: regular expressions on the paths of what is trained whole.

    >>> params = freeze_rest({"embed": jnp.ones(3), "head": jnp.ones(2)}, "head")
    >>> len(jax.tree.leaves(trainable(params)))
    1
    """
    is_trained = path_filter(patterns)
    return jax.tree_util.tree_map_with_path(
        lambda path, x: x if is_adapter(x) or is_trained(leaf_path(path)) else Frozen(x),
        params,
        is_leaf=is_adapter,
    )


def merge(params: Any) -> Any:
    """Makes plain kernels of all adapters, in the dtypes of their parts.

    >>> node = LowRankKernel(jnp.ones((4, 2)), jnp.ones((2, 6)))
    >>> merge({"kernel": node})["kernel"].tolist()[0]
    [2.0, 2.0, 2.0, 2.0, 2.0, 2.0]
    """

    def plain(node: Any) -> Any:
        if isinstance(node, Frozen):
            return node.array
        if not is_adapter(node):
            return node
        a, b = node.a.astype(jnp.float32), node.b.astype(jnp.float32)
        product = jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
        if isinstance(node, LowRankKernel):
            return product.astype(node.a.dtype)
        return (node.kernel.astype(jnp.float32) + node.scale * product).astype(node.kernel.dtype)

    return jax.tree.map(plain, params, is_leaf=_is_node)


def restart(params: Any, key: jax.Array) -> Any:
    """Merges every ``LoRAKernel``'s low-rank part and gives it a new one, as ReLoRA does.

    The function that the model computes changes by the rounding of W alone.

    >>> node = LoRAKernel(jnp.zeros((2, 2)), jnp.ones((2, 1)), jnp.ones((1, 2)), scale=2.0)
    >>> node = restart({"kernel": node}, jax.random.key(0))["kernel"]
    >>> node.kernel.tolist(), node.b.tolist()
    ([[2.0, 2.0], [2.0, 2.0]], [[0.0, 0.0]])
    """
    leaves, treedef = jax.tree.flatten(params, is_leaf=is_adapter)

    def again(node: Any, key: jax.Array) -> Any:
        if not isinstance(node, LoRAKernel):
            return node
        a = _draw_a(key, node.a.shape, node.a.dtype)
        return dataclasses.replace(node, kernel=merge(node), a=a, b=jnp.zeros_like(node.b))

    keys = jax.random.split(key, len(leaves))
    return treedef.unflatten(map(again, leaves, keys))


def trainable(params: Any) -> Any:
    """Returns the params without what is frozen, to differentiate by and to optimise.

    >>> params = add_lora({"kernel": jnp.ones((4, 6))}, jax.random.key(0), rank=2)
    >>> len(jax.tree.leaves(trainable(params)))
    2
    """

    def without_frozen(node: Any) -> Any:
        if isinstance(node, LoRAKernel):
            return dataclasses.replace(node, kernel=optax.MaskedNode())
        return Frozen(optax.MaskedNode()) if isinstance(node, Frozen) else node

    return jax.tree.map(without_frozen, params, is_leaf=_is_node)


def with_trainable(params: Any, trained: Any, dropout_key: jax.Array | None = None) -> Any:
    """Puts what ``trainable`` gave, updated, back among the params.

    Args:
      params: the tree that has the frozen kernels.
      trained: of the structure of ``trainable(params)``.
      dropout_key: a PRNG key for the dropout of one pass; None drops nothing.

    >>> params = add_lora({"kernel": jnp.ones((4, 6))}, jax.random.key(0), rank=2)
    >>> with_trainable(params, trainable(params))["kernel"].kernel.shape
    (4, 6)
    """
    leaves, treedef = jax.tree.flatten(params, is_leaf=lambda x: _is_node(x) or is_int8(x))
    nodes = []
    for i, (leaf, new) in enumerate(zip(leaves, treedef.flatten_up_to(trained), strict=True)):
        node = leaf if isinstance(leaf, Frozen) else new
        if isinstance(leaf, LoRAKernel):
            node = dataclasses.replace(new, kernel=leaf.kernel)
        if dropout_key is not None and isinstance(node, LoRAKernel) and node.dropout > 0:
            key = jax.random.fold_in(dropout_key, i)
            stack = node.a.shape[:-2]
            node = dataclasses.replace(
                node, dropout_key=jax.random.split(key, stack) if stack else key
            )
        nodes.append(node)
    return treedef.unflatten(nodes)


def _is_node(node: Any) -> bool:
    return is_adapter(node) or isinstance(node, Frozen)


def _draw_a(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    bound = shape[-2] ** -0.5
    return jax.random.uniform(key, shape, jnp.float32, -bound, bound).astype(dtype)


def _map_kernels(
    node: Any,
    params: Any,
    key: jax.Array,
    target_modules: Patterns | None,
    stacked_modules: Patterns | None,
) -> Any:
    mask = projection_mask(params, target_modules, stacked_modules=stacked_modules)
    leaves, treedef = jax.tree.flatten(params)
    keys = jax.random.split(key, len(leaves))
    chosen = treedef.flatten_up_to(mask)
    made = [
        node(leaf, key) if is_kernel else leaf
        for leaf, key, is_kernel in zip(leaves, keys, chosen, strict=True)
    ]
    return treedef.unflatten(made)
