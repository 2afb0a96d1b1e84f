"""The README and the pages of docs/: what they name exists, and the README stays short."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FOLDERS = "benchmarks|configs|docs|galore_jax|notebooks|tests"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_names_only_files_that_exist(page):
    text = page.read_text()
    named = set(re.findall(rf"(?<![\w/-])((?:{FOLDERS})/[\w/.-]+\.(?:py|md|toml|sh|png))\b", text))
    assert not [name for name in named if not (ROOT / name).exists()]
    links = re.findall(r"\]\((?!https?:)([^)#]+)", text)
    assert not [link for link in links if not (page.parent / link).exists()]


def test_readme_is_short_and_has_the_commands_that_ci_runs():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 120
    commands = [line.split("  #")[0].strip() for line in lines if line.startswith("    pip")][:2]
    assert commands == [
        "pip install -e '.[train,sample]' && python train.py",
        "pip install -e '.[test]' && pytest",
    ]
    assert commands[1] in (ROOT / ".ci/run").read_text()


def test_code_map_has_every_module_of_the_core():
    text = (ROOT / "docs/code_map.md").read_text()
    modules = [path.name for path in (ROOT / "galore_jax").glob("[!_]*.py")]
    assert not [name for name in modules if f"  {name} " not in text]
