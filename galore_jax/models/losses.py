"""Cross-entropy of a language model's head, without the logits of the whole batch."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from galore_jax.int8_kernels import Int8Kernel, is_int8
from galore_jax.kernels import detached, linear

Head = Any  # The head's kernel, (D, V): an array, or a pytree node that stands in for one.


def cross_entropy(
    hidden: jax.Array, head: Head, targets: jax.Array, *, chunk_tokens: int
) -> tuple[jax.Array, jax.Array]:
    r"""Sums the negative log-likelihood of ``targets``, a chunk of tokens at a time.

    With logits $z_t = h_t W$ of position t and target $y_t$,

    $$\sum_{t: y_t \ge 0} \Big( \log \sum_v e^{z_{tv}} - z_{t y_t} \Big),
    \qquad \frac{\partial}{\partial z_{tv}} = \operatorname{softmax}(z_t)_v - [v = y_t].$$

    The gradient of a sum of softmax cross-entropies is known as soon as the logits are, so
    under differentiation the forward pass also computes it, chunk by chunk. Three matrix
    products with the head per token are then enough; recomputing the logits in the backward
    pass would take four. Only ``chunk_tokens`` rows of logits exist at a time, in either pass. The
    gradient of the head is accumulated in float32, whatever its own dtype: over the chunks, or
    where all tokens' gradients of the logits in the dtype of ``hidden`` are smaller than these
    sums, from all at once, inside one matrix product.

    Args:
      hidden: ``(..., D)``, floating: the positions' last hidden states.
      head: the kernel ``(D, V)``; every array in it must be floating, or it is
        an ``Int8Kernel``.
      targets: ``(...)``, int32: the token each position must predict; negative to ignore.
      chunk_tokens: rows of logits to compute at a time. The number of positions need not be
        a multiple of it.

    Returns:
      The sum, a float32 scalar in nats, and the number of targets not ignored, int32.

    >>> import jax.numpy as jnp
    >>> hidden, head = jnp.zeros((3, 4)), jnp.ones((4, 10))  # All ten tokens equally likely.
    >>> nll, count = cross_entropy(hidden, head, jnp.array([7, 2, -1]), chunk_tokens=2)
    >>> print(f"{nll / count:.4f} = log(10), over {count} tokens")
    2.3026 = log(10), over 2 tokens
    """
    tokens = targets.size
    chunk_tokens = min(chunk_tokens, max(tokens, 1))
    num_chunks = -(-tokens // chunk_tokens)
    padding = num_chunks * chunk_tokens - tokens
    hidden = jnp.pad(hidden.reshape(tokens, -1), ((0, padding), (0, 0)))
    labels = jnp.pad(targets.reshape(tokens), (0, padding), constant_values=-1)
    codes = None
    if is_int8(head):
        head, codes = head.variable, dataclasses.replace(head, variable=None)
    nll: Any = _chunked_nll(
        hidden.reshape(num_chunks, chunk_tokens, -1),
        detached(head),
        codes,
        labels.reshape(num_chunks, chunk_tokens),
    )
    return nll, jnp.sum(targets >= 0, dtype=jnp.int32)


def _nll(logits: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The summed loss of ``(C, V)`` float32 logits, their log-partition, and the one-hot labels."""
    log_z = jax.nn.logsumexp(logits, axis=-1)
    # A comparison fuses into the reduction; gathering would make a scatter of the backward pass.
    hit = labels[:, None] == jax.lax.broadcasted_iota(labels.dtype, logits.shape, 1)
    target_logit = jnp.sum(jnp.where(hit, logits, 0.0), axis=-1)
    return jnp.sum(jnp.where(labels >= 0, log_z - target_logit, 0.0)), log_z, hit


@jax.custom_vjp
def _chunked_nll(
    hidden: jax.Array, head: Head, codes: Int8Kernel | None, labels: jax.Array
) -> jax.Array:
    """The loss of ``hidden`` (n, C, D) against ``labels`` (n, C), summed.

    With ``codes`` of integers, ``head`` is their variable.
    """

    def add_chunk(total, chunk):
        x, y = chunk
        nll, _, _ = _nll(linear(x, _kernel(head, codes), out_dtype=jnp.float32), y)
        return total + nll, None

    return jax.lax.scan(add_chunk, jnp.float32(0.0), (hidden, labels))[0]


def _kernel(head: Head, codes: Int8Kernel | None) -> Any:
    return head if codes is None else dataclasses.replace(codes, variable=head)


def _chunked_nll_fwd(hidden, head, codes, labels):
    def product(x, head, out_dtype=None):
        return linear(x, _kernel(head, codes), out_dtype)

    at_once = _is_smaller_than_sums(hidden, head)

    def add_chunk(carry, chunk):
        total, head_grad = carry
        x, y = chunk
        logits = product(x, head, out_dtype=jnp.float32)
        nll, log_z, hit = _nll(logits, y)
        logits_grad = jnp.exp(logits - log_z[:, None]) - hit
        logits_grad = jnp.where(y[:, None] >= 0, logits_grad, 0.0).astype(x.dtype)
        _, pull_back = jax.vjp(product, x, head)
        x_grad, chunk_head_grad = pull_back(logits_grad)
        if at_once:
            return (total + nll, head_grad), (x_grad, logits_grad)
        head_grad = jax.tree.map(lambda total, g: total + g, head_grad, chunk_head_grad)
        return (total + nll, head_grad), (x_grad, None)

    # Zeros that XLA does not know for zeros: those it would share with, and keep for, later ones.
    zero = jax.lax.optimization_barrier(jnp.float32(0.0))
    zeros = None if at_once else jax.tree.map(lambda leaf: jnp.full(leaf.shape, zero), head)
    (total, head_grad), (hidden_grad, logits_grads) = jax.lax.scan(
        add_chunk, (jnp.float32(0.0), zeros), (hidden, labels)
    )
    if at_once:
        rows = lambda x: x.reshape(-1, x.shape[-1])  # noqa: E731
        _, pull_back = jax.vjp(lambda head: product(rows(hidden), head), head)
        (head_grad,) = pull_back(rows(logits_grads))
    head_grad = jax.tree.map(lambda g, leaf: g.astype(leaf.dtype), head_grad, head)
    return total, (hidden_grad, head_grad)


def _is_smaller_than_sums(hidden: jax.Array, head: Head) -> bool:
    """Whether the gradients of all logits take less memory than the head's float32 sums do.

    From both the head's gradient is made in its dtype, unless the sums are that already.
    """
    if all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(head)):
        return False
    chunks, chunk_tokens, features = hidden.shape
    return chunks * chunk_tokens * hidden.dtype.itemsize < features * 4


def _chunked_nll_bwd(gradients, cotangent):
    hidden_grad, head_grad = jax.tree.map(lambda g: (cotangent * g).astype(g.dtype), gradients)
    return hidden_grad, head_grad, None, None


_chunked_nll.defvjp(_chunked_nll_fwd, _chunked_nll_bwd)
