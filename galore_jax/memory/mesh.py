"""The bytes of one device of a mesh, where weights, gradients and state are sharded over it."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import optax
from jax.sharding import AbstractMesh, AxisType, NamedSharding, use_abstract_mesh
from jax.sharding import PartitionSpec as P

from galore_jax.errors import UserError
from galore_jax.memory.count import STATE_ROWS, Row, count_rows, tree_bytes
from galore_jax.weights import Patterns, leaf_path, path_filter


@dataclasses.dataclass(frozen=True)
class MeshReport:
    """Counted bytes of one device of a mesh, beside those of the whole model.

    Attributes:
      mesh: the sizes of its axes, by name.
      rows: weights, gradients and the parts of the optimizer's state of one device.
      whole: the same rows without a mesh.
      replicated: what a mesh axis could not split, by its path, with the bytes that one device
        has of it: every device along that axis has these.
    """

    mesh: Mapping[str, int]
    rows: tuple[Row, ...]
    whole: tuple[Row, ...]
    replicated: tuple[Row, ...]


def parse_mesh(text: str) -> dict[str, int]:
    """Reads the value of ``--mesh``, such as ``fsdp:8,tp:2``.

    Raises:
      UserError: for all that is not names with sizes of at least 1, each name once.

    >>> parse_mesh("fsdp:8,tp:2")
    {'fsdp': 8, 'tp': 2}
    """
    axes = {}
    for part in text.split(","):
        name, _, size = part.partition(":")
        if not name.isidentifier() or not size.isdecimal() or int(size) < 1 or name in axes:
            raise UserError(f"--mesh={text} must be axes with sizes, such as fsdp:8 or fsdp:8,tp:2")
        axes[name] = int(size)
    return axes


def sharded_shapes(params: Any, mesh: AbstractMesh, stacked_modules: Patterns | None = None) -> Any:
    """Gives each weight a sharding, as FSDP does.

    Every axis of the mesh, in its order, splits the largest axis of the weight that it divides and
    that no other splits; a vector's one axis may be split by several. A weight without such an axis
    is whole along that axis of the mesh.

    Args:
      params: a tree of arrays or shapes.
      mesh: with explicit axes.
      stacked_modules: regular expressions on the paths of leaves whose first axis indexes layers,
        and is never split.

    Returns:
      A tree of shapes with shardings.

    >>> import jax
    >>> mesh = AbstractMesh((8, 2), ("fsdp", "tp"), axis_types=(AxisType.Explicit,) * 2)
    >>> tuple(sharded_shapes(jax.ShapeDtypeStruct((6, 32, 63), "float32"), mesh).sharding.spec)
    ('tp', 'fsdp', None)
    """
    is_stacked = path_filter(stacked_modules, "stacked_modules")

    def sharded(key_path: tuple[Any, ...], leaf: Any) -> jax.ShapeDtypeStruct:
        first = int(is_stacked(leaf_path(key_path)))
        names: list[tuple[str, ...]] = [()] * len(leaf.shape)
        for name, size in mesh.shape.items():
            share = {
                axis: leaf.shape[axis] // math.prod(mesh.shape[other] for other in names[axis])
                for axis in range(first, len(leaf.shape))
                if not names[axis] or len(leaf.shape) - first == 1
            }
            fits = [axis for axis, left in share.items() if left % size == 0]
            if fits:
                axis = max(fits, key=lambda axis: leaf.shape[axis])
                names[axis] = (*names[axis], name)
        spec = P(*((of[0] if len(of) == 1 else of) if of else None for of in names))
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree_util.tree_map_with_path(sharded, params)


def count_on_mesh(
    params: Any,
    optimizer: optax.GradientTransformation,
    axes: Mapping[str, int],
    stacked_modules: Patterns | None = None,
) -> MeshReport:
    """Counts what one device of a mesh keeps: the bytes of ``optimizer.init`` on sharded weights.

    Gradients are full ones, of the weights' dtype, sharded as they are. No device is needed. The
    state is that of a mesh with explicit axes. With automatic ones Optax's Adafactor keeps its
    row and column moments whole, which are small.

    Args:
      params: the weights, or their shapes.
      optimizer: the optimizer.
      axes: the sizes of the mesh's axes, by name.
      stacked_modules: see ``sharded_shapes``.

    >>> import jax, optax
    >>> params = {"kernel": jax.ShapeDtypeStruct((32, 64), "float32")}
    >>> report = count_on_mesh(params, optax.adamw(1e-3), {"fsdp": 8})
    >>> [(row.name, row.bytes) for row in report.rows[:2]], report.whole[0].bytes
    ([('weights', 1024), ('gradients', 1024)], 8192)
    """
    types = (AxisType.Explicit,) * len(axes)
    mesh = AbstractMesh(tuple(axes.values()), tuple(axes), axis_types=types)
    weights = sharded_shapes(params, mesh, stacked_modules)
    with use_abstract_mesh(mesh):
        state = jax.eval_shape(optimizer.init, weights)
    pair = (_of_one_device(weights), _of_one_device(state))
    rows = count_rows(*pair, gradient_bytes=tree_bytes(pair[0]))
    whole = count_rows(weights, state, gradient_bytes=tree_bytes(weights))
    replicated = [
        Row(leaf_path(path), tree_bytes(one))
        for tree, part in zip((weights, state), pair, strict=True)
        for (path, leaf), one in zip(
            jax.tree_util.tree_leaves_with_path(tree), jax.tree.leaves(part), strict=True
        )
        if leaf.size != one.size * mesh.size
    ]
    return MeshReport(dict(axes), tuple(rows), tuple(whole), tuple(replicated))


def mesh_table(report: MeshReport, adamw: MeshReport) -> str:
    """The report beside full-rank AdamW's, and the largest replicated arrays, as lines of text.

    >>> import jax, optax
    >>> params = {"kernel": jax.ShapeDtypeStruct((32, 64), "float32")}
    >>> report = count_on_mesh(params, optax.adamw(1e-3), {"fsdp": 8})
    >>> print(mesh_table(report, report).splitlines()[0])
    memory, counted (MiB), fsdp:8                this run  full AdamW   this run, whole
    """
    peak = sum(row.bytes for row in report.rows)
    unit, unit_bytes = ("GiB", 2**30) if peak >= 2**30 else ("MiB", 2**20)
    title = ",".join(f"{name}:{size}" for name, size in report.mesh.items())
    head = f"memory, counted ({unit}), {title}"
    lines = [f"{head:<40}{'this run':>13}{'full AdamW':>12}{'this run, whole':>18}"]
    columns = [list(rows) for rows in (report.rows, adamw.rows, report.whole)]
    for rows in columns:
        state = sum(row.bytes for row in rows if row.name in STATE_ROWS)
        total = sum(row.bytes for row in rows)
        rows += [Row("= optimizer state", state), Row("= total", total)]
    for row, other, whole in zip(*columns, strict=True):
        sizes = [x.bytes / unit_bytes for x in (row, other, whole)]
        lines.append(f"{row.name:<40}{sizes[0]:>13,.3f}{sizes[1]:>12,.3f}{sizes[2]:>18,.3f}")
    lines.append("the first two columns are of one device; activations are not counted")
    total = sum(row.bytes for row in report.replicated)
    lines.append(
        f"not split by all of the mesh: {len(report.replicated)} arrays, {total / 2**20:,.3f} MiB"
    )
    largest = sorted(report.replicated, key=lambda row: -row.bytes)[:8]
    lines += [f"  {row.name:<60}{row.bytes / 2**20:>12,.3f} MiB" for row in largest]
    return "\n".join(lines)


def _of_one_device(tree: Any) -> Any:
    def part(leaf: Any) -> jax.ShapeDtypeStruct:
        sharding = getattr(leaf, "sharding", None)
        shape = leaf.shape if sharding is None else sharding.shard_shape(leaf.shape)
        return jax.ShapeDtypeStruct(shape, leaf.dtype)

    return jax.tree.map(part, tree)
