"""Which leaves of a tree of params GaLore projects."""

import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp


def leaf_path(key_path: tuple[Any, ...]) -> str:
    """The ``/``-joined name of a leaf, as ``target_modules`` sees it.

    >>> import jax
    >>> [leaf_path(path) for path, _ in jax.tree_util.tree_leaves_with_path({"mlp": {"kernel": 0}})]
    ['mlp/kernel']
    """
    return jax.tree_util.keystr(key_path, simple=True, separator="/")


def is_projected(
    params: Any,
    target_modules: str | Sequence[str] | None = None,
    *,
    must_match: bool = True,
) -> Any:
    """Which leaves GaLore projects.

    Args:
      params: a tree of arrays (or of shapes).
      target_modules: a regular expression, or several, searched for in each leaf's path. A leaf
        that matches and has two axes or more is projected, its last two axes being the matrix and
        the leading ones a stack. None selects every leaf of exactly two axes.
      must_match: whether patterns that select nothing are an error.

    Returns:
      A tree of bools with the params' structure: a mask as Optax takes it.

    Raises:
      TypeError: a ``target_modules`` that is no string and no sequence of strings.
      ValueError: one that is no regular expression, or that selects nothing (paths are listed).

    >>> import jax.numpy as jnp
    >>> params = {"embed": jnp.ones((8, 4)), "mlp": {"kernel": jnp.ones((2, 4, 6))}}
    >>> is_projected(params), is_projected(params, "mlp")
    ({'embed': True, 'mlp': {'kernel': False}}, {'embed': False, 'mlp': {'kernel': True}})
    """
    if target_modules is None:
        return jax.tree.map(lambda leaf: jnp.ndim(leaf) == 2 and 0 not in jnp.shape(leaf), params)
    patterns = compiled_patterns(target_modules)

    def selected(key_path: tuple[Any, ...], leaf: Any) -> bool:
        path = leaf_path(key_path)
        is_matrix = jnp.ndim(leaf) >= 2 and 0 not in jnp.shape(leaf)
        return is_matrix and any(pattern.search(path) for pattern in patterns)

    mask = jax.tree_util.tree_map_with_path(selected, params)
    paths = [leaf_path(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    if must_match and paths and not any(jax.tree.leaves(mask)):
        raise ValueError(
            f"target_modules={target_modules!r} matches no leaf of two axes or more; paths are "
            + ", ".join(paths[:5])
            + (", ..." if len(paths) > 5 else "")
        )
    return mask


def compiled_patterns(
    target_modules: str | Sequence[str], name: str = "target_modules"
) -> list[re.Pattern[str]]:
    """The regular expressions of ``target_modules``, or of an argument of another name.

    Raises:
      TypeError, ValueError: see :func:`is_projected`.

    >>> compiled_patterns("attn")
    [re.compile('attn')]
    """
    patterns = [target_modules] if isinstance(target_modules, str) else target_modules
    if not isinstance(patterns, Sequence) or not all(isinstance(p, str) for p in patterns):
        raise TypeError(
            f"{name} must be a regular expression, a sequence of them or None, "
            f"got {target_modules!r}"
        )
    try:
        return [re.compile(pattern) for pattern in patterns]
    except re.error as error:
        raise ValueError(f"{name}={target_modules!r} is no regular expression: {error}") from error
