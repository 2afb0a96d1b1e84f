r"""Orthogonalised momentum in the low-rank subspace: one moment a matrix where Adam has two.

For each projected matrix, with low-rank gradient R (r x n or m x r), the momentum M stays in the
subspace, and the update is the nearest matrix with orthonormal rows (or columns), brought back:

$$M \leftarrow \beta M + (1 - \beta) R, \qquad
\Delta W = -\eta \, c \, P \, \mathrm{orth}(\beta M + (1 - \beta) R), \qquad
\mathrm{orth}(U S V^\top) = U V^\top$$

All directions of the subspace then move alike. As the columns of P are orthonormal,
$P \, \mathrm{orth}(M) = \mathrm{orth}(P M)$: this is the update of Muon for a momentum of rank r.
The decomposition is not computed: products with the r x r Gram matrix of the small side lead to it.

$c = \sqrt{\max(1, n / m)}$, of the whole m x n kernel (in, out), is Muon's factor for shapes. It
does not depend on r: the largest change that an update makes to a layer's output is the same for
every rank, and for every width of the model, so that one learning rate serves them all.

References:
  Jordan et al., Muon, 2024, https://kellerjordan.github.io/posts/muon/
  Bernstein and Newhouse, Old Optimizer, New Norm: An Anthology, 2024,
  https://arxiv.org/abs/2409.20325
  Refael et al., SUMO: Subspace-Aware Moment-Orthogonalization, 2025,
  https://arxiv.org/abs/2505.24749
  Ahn et al., Dion: Distributed Orthonormalized Updates, 2025, https://arxiv.org/abs/2504.05295
"""

import math
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from galore_jax.adam8bit import scale_by_adam8bit
from galore_jax.norm_growth import clip_by_norm_growth
from galore_jax.projection import MatrixSpec, in_float32, scaled
from galore_jax.quantization import Quantized, dequantize, quantize, quantized_zeros
from galore_jax.rounding import dithering

# Jordan et al.: of the quintics a x + b x^3 + c x^5 one that is steep at zero. Five rounds take
# singular values from 0.0015 to 1 to between 0.68 and 1.21.
QUINTIC = (3.4445, -4.7750, 2.0315)
_MIN_8BIT_SIZE = 4096


class OrthogonalMomentumState(NamedTuple):
    """State of ``scale_by_orthogonal_momentum``.

    Attributes:
      count: updates so far, () int32.
      mu: the momentum, of the updates' shapes and dtypes, or a ``Quantized`` in their place.
    """

    count: jax.typing.ArrayLike  # pyright: ignore[reportIncompatibleMethodOverride]
    mu: Any


def scale_by_orthogonal_momentum(
    beta: float | jax.Array = 0.95, rounds: int = 5, *, bits: Literal[8] | None = None
) -> optax.GradientTransformation:
    """Replaces each gradient, a (..., m, n) matrix, by its orthogonalised Nesterov momentum.

    Args:
      beta: decay of the momentum, at least 0 and less than 1.
      rounds: of ``orthogonalize``.
      bits: 8 to keep the momentum as block-wise integers, rounded stochastically
        (``galore_jax.rounding.dithering``); matrices of less than 4,096 values stay as they are.

    Returns:
      A transformation with an ``OrthogonalMomentumState``.

    >>> import jax.numpy as jnp
    >>> tx = scale_by_orthogonal_momentum()
    >>> gradient = {"w": jnp.diag(jnp.array([1.0, 1e-2]))}
    >>> updates, _ = tx.update(gradient, tx.init(gradient))
    >>> bool((jnp.abs(jnp.diag(updates["w"]) - 1) < 0.35).all())
    True
    """

    def init(params: optax.Params) -> OrthogonalMomentumState:
        def zeros(leaf: jax.Array) -> Any:
            if bits is None or leaf.size < _MIN_8BIT_SIZE:
                return jnp.zeros_like(leaf)
            return quantized_zeros(leaf, range(leaf.ndim), leaf.shape, "int8")

        return OrthogonalMomentumState(jnp.zeros([], jnp.int32), jax.tree.map(zeros, params))

    def update(
        updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.OptState]:
        del params
        assert isinstance(state, OrthogonalMomentumState)

        def update_leaf(gradient: jax.Array, old: Any) -> tuple[jax.Array, Any]:
            g, is_coded = in_float32(gradient), isinstance(old, Quantized)
            mu = beta * (dequantize(old) if is_coded else in_float32(old)) + (1 - beta) * g
            step = orthogonalize(beta * mu + (1 - beta) * g, rounds).astype(gradient.dtype)
            if is_coded:
                noise = dithering(gradient.shape, state.count)
                return step, quantize(mu, "int8", block_size=old.block_size, noise=noise)
            return step, mu.astype(old.dtype)

        leaves, treedef = jax.tree.flatten(updates)
        pairs = zip(leaves, treedef.flatten_up_to(state.mu), strict=True)
        new = [update_leaf(*pair) for pair in pairs]
        steps, mu = (treedef.unflatten([pair[i] for pair in new]) for i in range(2))
        return steps, OrthogonalMomentumState(optax.safe_increment(state.count), mu)

    return optax.GradientTransformation(init, update)


def orthogonalize(matrix: jax.Array, rounds: int = 5) -> jax.Array:
    r"""Moves all singular values of a matrix near 1, by a Newton-Schulz iteration.

    With $X_0$ the matrix over its Frobenius norm, and $A = X X^\top$ on the smaller side,
    $X \leftarrow a X + (b A + c A^2) X$ changes singular values by a polynomial, and no vector.

    Args:
      matrix: (..., m, n).
      rounds: at least 1. After five, singular values above 0.0015 of the Frobenius norm lie between
        0.68 and 1.21; smaller ones are some 480 times larger than they were.

    Returns:
      (..., m, n) float32 (float64 for float64); zeros for zeros.

    References:
      Jordan et al., Muon, 2024, https://kellerjordan.github.io/posts/muon/

    >>> import jax, jax.numpy as jnp
    >>> values = jnp.linalg.svd(orthogonalize(jax.random.normal(jax.random.key(0), (8, 32))))[1]
    >>> bool((values > 0.65).all() & (values < 1.25).all())
    True
    """
    a, b, c = QUINTIC
    is_tall = matrix.shape[-2] > matrix.shape[-1]
    x = scaled(jnp.matrix_transpose(matrix) if is_tall else matrix)
    norm = jnp.sqrt(jnp.sum(x * x, axis=(-2, -1), keepdims=True))
    x = x / jnp.where(norm == 0, 1, norm)
    for _ in range(rounds):
        gram = x @ jnp.matrix_transpose(x)
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return jnp.matrix_transpose(x) if is_tall else x


def low_rank_muon(
    specs: Mapping[Any, MatrixSpec],
    learning_rate: optax.ScalarOrSchedule,
    adam_learning_rate: optax.ScalarOrSchedule,
    *,
    beta: float | jax.Array,
    rounds: int,
    b1: float | jax.Array,
    b2: float | jax.Array,
    eps: float | jax.Array,
    weight_decay: float | jax.Array,
    mask: Any,
    bits: Literal[8] | None,
    most_growth: float | None,
) -> optax.GradientTransformation:
    """Makes the optimizer inside ``galore_jax.galore_muon``, which tells what the arguments are.

    Args:
      specs: the projected leaves by their key paths; all others go to Adam.
    """

    def labels(params: optax.Params) -> Any:
        label = lambda path, _: "matrices" if path in specs else "rest"  # noqa: E731
        return jax.tree_util.tree_map_with_path(label, params)

    def by_shape(updates: optax.Updates, params: optax.Params | None) -> optax.Updates:
        del params
        scale = lambda path, x: shape_factor(specs[path]) * x  # noqa: E731
        return jax.tree_util.tree_map_with_path(scale, updates)

    momentum = scale_by_orthogonal_momentum(beta, rounds, bits=bits)
    make_adam = optax.scale_by_adam if bits is None else scale_by_adam8bit
    adam = make_adam(b1, b2, eps, nesterov=True)
    matrices = optax.chain(momentum, optax.stateless(by_shape))
    rates = {"matrices": learning_rate, "rest": adam_learning_rate}
    limiter = [] if most_growth is None else [clip_by_norm_growth(most_growth)]
    return optax.chain(
        *limiter,
        optax.partition({"matrices": matrices, "rest": adam}, labels),
        optax.add_decayed_weights(weight_decay, mask),
        optax.partition(
            {k: optax.scale_by_learning_rate(rate) for k, rate in rates.items()}, labels
        ),
    )


def shape_factor(spec: MatrixSpec) -> float:
    r"""Computes $\sqrt{\max(1, n / m)}$ for an m x n matrix, whose rows are inputs.

    >>> shape_factor(MatrixSpec.of_kernel((64, 256), 8)), shape_factor(
    ...     MatrixSpec.of_kernel((256, 64), 8)
    ... )
    (2.0, 1.0)
    """
    *_, m, n = spec.matrix_shape
    return math.sqrt(max(1.0, n / m))
