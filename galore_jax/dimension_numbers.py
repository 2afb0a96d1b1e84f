"""Which axes of a kernel are its matrix, found from its path by simple rules."""

import re
from collections.abc import Sequence
from typing import Any

import jax
import optax

from galore_jax.weights import leaf_path

RULES: tuple[tuple[str, str | None], ...] = (
    (r"embed|lm_head|norm|router|lora", None),
    (r"(^|[/_])(bias|scale)$", None),
    (r"(^|/)(o_proj|attn_vec_einsum)/w$|(^|/)attn\w*/out/kernel$|attention\w*/out/kernel$", "mmn"),
    (r"(^|/)[qkv]_proj/w$|(^|/)(query|key|value)/kernel$", "mnn"),
    (r"(^|/)(q|k|v|kv|qkv)_einsum/w$", "nmn"),
    (r"", "mn"),
)
"""The rules of ``dimension_numbers``, in their order.

Embeddings, heads, norms, routers, LoRA factors, biases and scales are left alone. The output
kernels of attention in Tunix and Flax are (N, H, D), their query, key and value kernels (D, N, H),
and Gemma's (N, D, H), for D features and N heads of width H. The rest are matrices, or stacks.
"""


def dimension_numbers(
    params: Any, *, rules: Sequence[tuple[str, str | None]] = (), default: bool = True
) -> Any:
    """Finds the ``weight_dimension_numbers`` of a model's kernels, by rules on their paths.

    A rule is a pair of a regular expression, searched for in a leaf's path, and of letters that
    say what its last axes are: ``m`` rows, ``n`` columns, ``l`` a stack. Axes of one letter are
    joined. Axes before them index a stack. None in the letters' place leaves the leaf alone. The
    first rule whose pattern is found, and whose letters are no more than the leaf's axes, holds.

    | kernel | letters |
    |---|---|
    | (m, n), or a stack (L, m, n) | ``mn`` |
    | (D, N, H), from D features to N heads of width H | ``mnn`` |
    | (N, H, D), from the heads to the features | ``mmn`` |
    | (N, D, H), as Gemma has it | ``nmn`` |
    | (D, L, N, H), stacked along its second axis, as in MaxText | ``mlnn`` |

    Args:
      params: a tree of arrays or shapes.
      rules: rules of your own, tried before the others.
      default: whether ``galore_jax.dimension_numbers.RULES`` follow. Without them a leaf that no
        rule names is left alone.

    Returns:
      A tree of the params' structure: ``optax.contrib.GaLoreDimensionNumbers``, or None for leaves
      that are left alone, those of fewer than two axes among them. Print it to see what is found.
      ``galore_jax.galore`` takes the function itself, and calls it where it knows the params::

          galore(optimizer, weight_dimension_numbers=galore_jax.dimension_numbers)
          galore(optimizer, weight_dimension_numbers=functools.partial(
              galore_jax.dimension_numbers, rules=[("gate", None)]))

    Raises:
      TypeError, ValueError: a rule that is no such pair, or that no leaf follows (paths are
        listed).

    >>> import jax.numpy as jnp
    >>> from galore_jax import dimension_numbers
    >>> attn = {"q_proj": {"w": jnp.ones((32, 4, 8))}, "o_proj": {"w": jnp.ones((4, 8, 32))}}
    >>> params = {"attn": attn, "mlp": {"kernel": jnp.ones((3, 32, 64))}, "norm": jnp.ones((3, 32))}
    >>> found = dimension_numbers(params)
    >>> found["attn"]["q_proj"]["w"]
    GaLoreDimensionNumbers(reduction_axis=(0,), output_axis=(1, 2))
    >>> found["attn"]["o_proj"]["w"]
    GaLoreDimensionNumbers(reduction_axis=(0, 1), output_axis=(2,))
    >>> found["mlp"]["kernel"], found["norm"]
    (GaLoreDimensionNumbers(reduction_axis=(1,), output_axis=(2,)), None)
    >>> dimension_numbers(params, rules=[("mlp", "lmn"), ("attn", None)])["attn"]["q_proj"]["w"]
    """
    own = [_checked(rule) for rule in rules]
    known = [*own, *(map(_checked, RULES) if default else ())]
    followed = set()

    def numbers(key_path: tuple[Any, ...], leaf: Any) -> Any:
        path, ndim = leaf_path(key_path), len(getattr(leaf, "shape", ()))
        for index, (pattern, letters) in enumerate(known):
            if not pattern.search(path) or len(letters or "") > ndim:
                continue
            followed.add(index)
            if letters is None:
                return None
            before = ndim - len(letters)
            axes = {x: tuple(before + i for i, y in enumerate(letters) if y == x) for x in "mn"}
            return optax.contrib.GaLoreDimensionNumbers(axes["m"], axes["n"])
        return None

    found = jax.tree_util.tree_map_with_path(numbers, params)
    for index, (pattern, letters) in enumerate(own):
        if index not in followed:
            paths = [leaf_path(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
            raise ValueError(
                f"no leaf follows the rule {(pattern.pattern, letters)}: an earlier one holds, or "
                "its pattern is not found, or it has more letters than axes; paths are "
                + ", ".join(paths[:5] + ["..."] * (len(paths) > 5))
            )
    return found


def _checked(rule: Any) -> tuple[re.Pattern[str], str | None]:
    allowed = (
        "a rule of dimension_numbers is a regular expression and letters, such as "
        f'("q_proj", "mnn"), or None in their place; got {rule!r}'
    )
    if not isinstance(rule, tuple | list) or len(rule) != 2 or not isinstance(rule[0], str):
        raise TypeError(allowed)
    pattern, letters = rule
    if letters is not None and (
        not isinstance(letters, str) or not {"m", "n"} <= set(letters) <= {"l", "m", "n"}
    ):
        raise ValueError(f"{allowed}; the letters are m and n, both, and l")
    try:
        return re.compile(pattern), letters
    except re.error as error:
        raise ValueError(f"{pattern!r} is no regular expression: {error}") from error
