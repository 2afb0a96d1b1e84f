"""MkDocs hook: one page of the API reference for each module, and a list of all of them."""

import ast
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

PACKAGE = "galore_jax"
GROUPS = {"": "The transformation", "memory": "Memory report", "models": "Models"}
GROUPS |= {"data": "Data", "training": "Training"}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages and their entries of the navigation."""
    root = Path(config.config_file_path).parent
    groups: dict[str, list[Path]] = {}
    for path in sorted((root / PACKAGE).rglob("*.py")):
        module = path.relative_to(root)
        if not module.stem.startswith("__"):
            groups.setdefault("/".join(module.parent.parts[1:]), []).append(module)
    index, navigation = [_introduction(root / PACKAGE / "__init__.py")], ["api/index.md"]
    for group in sorted(groups, key=lambda name: [*GROUPS, name].index(name)):
        title = GROUPS.get(group, group)
        index.append(f"\n## {title}\n\n| module | |\n|---|---|\n")
        pages = []
        for module in groups[group]:
            name = ".".join(module.with_suffix("").parts)
            page = f"api/{name.removeprefix(PACKAGE + '.')}.md"
            files.append(File.generated(config, page, content=f"::: {name}\n"))
            summary = (_docstring(root / module) or [""])[0]
            index.append(f"| [`{name}`]({page.removeprefix('api/')}) | {summary} |\n")
            pages.append({name.removeprefix(PACKAGE + "."): page})
        navigation.append({title: pages})
    files.append(File.generated(config, "api/index.md", content="".join(index)))
    config.nav = [*(config.nav or []), {"API reference": navigation}]
    return files


def _docstring(path: Path) -> list[str]:
    return (ast.get_docstring(ast.parse(path.read_text())) or "").splitlines()


def _introduction(path: Path) -> str:
    """The names that the package exports, each a link to where it is defined."""
    lines = ["# API reference\n\n`import galore_jax` has these names:\n\n"]
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom):
            lines += [f"- [`{x.name}`][{node.module}.{x.name}]\n" for x in node.names]
    return "".join(lines)
