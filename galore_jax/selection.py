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


def is_projected(params: Any, target_modules: str | Sequence[str] | None = None) -> Any:
    """Which leaves GaLore projects.

    Args:
      params: a tree of arrays (or of shapes).
      target_modules: a regular expression, or several, searched for in each leaf's path. A leaf
        that matches and has two axes or more is projected, its last two axes being the matrix and
        the leading ones a stack. None selects every leaf of exactly two axes.

    Returns:
      A tree of bools with the params' structure: a mask as Optax takes it.

    Raises:
      ValueError: a ``target_modules`` that selects nothing; some of the paths are listed.

    >>> import jax.numpy as jnp
    >>> params = {"embed": jnp.ones((8, 4)), "mlp": {"kernel": jnp.ones((2, 4, 6))}}
    >>> is_projected(params), is_projected(params, "mlp")
    ({'embed': True, 'mlp': {'kernel': False}}, {'embed': False, 'mlp': {'kernel': True}})
    """
    if target_modules is None:
        return jax.tree.map(lambda leaf: jnp.ndim(leaf) == 2, params)
    patterns = [target_modules] if isinstance(target_modules, str) else list(target_modules)

    def selected(key_path: tuple[Any, ...], leaf: Any) -> bool:
        path = leaf_path(key_path)
        return jnp.ndim(leaf) >= 2 and any(re.search(pattern, path) for pattern in patterns)

    mask = jax.tree_util.tree_map_with_path(selected, params)
    paths = [leaf_path(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    if paths and not any(jax.tree.leaves(mask)):
        raise ValueError(
            f"target_modules={target_modules!r} matches no leaf of two axes or more; paths are "
            + ", ".join(paths[:5])
            + (", ..." if len(paths) > 5 else "")
        )
    return mask
