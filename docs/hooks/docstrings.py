"""Griffe extension: docstrings as Markdown has them, with doctests as code and names as links."""

import re
from typing import Any

import griffe

_DOCTEST = re.compile(r"^(?P<indent> *)>>> .*(?:\n(?P=indent)\S.*)*", re.MULTILINE)
_SPHINX = re.compile(r":[a-z]+:`|^ *\.\. \w+::|^ *=+(?: +=+)+ *$", re.MULTILINE)
_SEVERAL_ARGUMENTS = re.compile(r"^( +(?:\w+, )+\w+,)\n +(?=(?:\w+, )*\w+: )", re.MULTILINE)
_NAME = re.compile(r"``([A-Za-z_][\w.]*)``")


class Docstrings(griffe.Extension):
    """Rewrites every docstring of a package before it is rendered."""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        """Visits all objects of the package."""
        self._visit(pkg, pkg)

    def _visit(self, package: griffe.Module, item: griffe.Object) -> None:
        if item.docstring:
            text = _SEVERAL_ARGUMENTS.sub(r"\1 ", item.docstring.value)
            if sphinx := _SPHINX.search(text):
                griffe.logger.warning(f"{item.path}: {sphinx[0]!r} is not Markdown")
            text = _NAME.sub(lambda found: _link(package, item, found), text)
            item.docstring.value = _DOCTEST.sub(_fence, text)
        for member in item.members.values():
            if not member.is_alias:
                self._visit(package, member)


def _fence(found: re.Match[str]) -> str:
    """A doctest, up to the next empty line, as a block of code."""
    indent = found["indent"]
    return f"{indent}```pycon\n{found[0]}\n{indent}```"


def _link(package: griffe.Module, item: griffe.Object, found: re.Match[str]) -> str:
    """A name in double backticks as a link, if it is of something public with a page."""
    name = found[1]
    try:
        path = name if name.startswith(f"{package.path}.") else item.resolve(name)
        if path == item.path or not path.startswith(f"{package.path}."):
            return found[0]
        target = package[path.removeprefix(f"{package.path}.")]
        if target.is_alias:
            target = target.final_target
    except (KeyError, griffe.NameResolutionError, griffe.AliasResolutionError):
        return found[0]
    a_word = target.is_module and "." not in name
    if a_word or not target.has_docstring or re.search(r"(^|\.)_", target.path):
        return found[0]
    return f"[`{name}`][{target.path}]"
