"""Which module may import which: no circle, downwards alone, and little in the core."""

import ast
import graphlib
import sys
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "galore_jax"
MODULES = {
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in PACKAGE.rglob("*.py")
}
# The modules of the report that compile the trainer's steps lie above the trainer's.
REPORT = {f"galore_jax.memory.{name}" for name in ("fit", "report", "compare", "plot", "__main__")}
FOLDERS = {"models", "data", "memory", "training"}
# `python -m galore_jax.NAME`: above all else, imported by nothing.
COMMANDS = {
    name
    for name, path in MODULES.items()
    if path.parent == PACKAGE and 'if __name__ == "__main__":' in path.read_text()
}


def imported(name):
    """Every name that a module imports, inside functions too; relative imports have no place."""
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} has a relative import"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full in MODULES else node.module


IMPORTS = {name: set(imported(name)) for name in MODULES}


def folder(name):
    """The folder of a module of the package, or "core" or "commands"."""
    if name in COMMANDS:
        return "commands"
    parts = name.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in FOLDERS else "core"


def test_every_folder_is_known():
    found = {path.parent.name for path in PACKAGE.glob("*/*.py")}
    assert found == FOLDERS


def test_no_circle():
    graph = {name: imports & MODULES.keys() for name, imports in IMPORTS.items()}
    list(graphlib.TopologicalSorter(graph).static_order())  # a circle is a CycleError that names it


def test_imports_point_down():
    below = {
        "core": {"core"},
        "models": {"core", "models"},
        "data": {"core", "data"},
        "memory": {"core", "memory"},
        "training": {"core", "models", "data", "memory", "training"},
        "commands": {"core", "models", "data", "memory", "training"},
    }
    for name, imports in IMPORTS.items():
        allowed = below["training"] if name in REPORT else below[folder(name)]
        for other in imports & MODULES.keys():
            assert folder(other) in allowed, f"{name} imports {other}"
            above = name in REPORT or folder(name) in ("training", "commands")
            assert above or other not in REPORT


def test_the_core_and_the_counting_import_jax_numpy_and_optax_alone():
    allowed = {"galore_jax", "jax", "jaxlib", "numpy", "optax", *sys.stdlib_module_names}
    for name, imports in IMPORTS.items():
        if folder(name) == "core" or (folder(name) == "memory" and name not in REPORT):
            # for_nnx.py asks for Flax where it is called, see test_for_nnx.py.
            lazy = {"flax"} if name == "galore_jax.for_nnx" else set()
            for other in imports - lazy:
                assert other.split(".")[0] in allowed, f"{name} imports {other}"
