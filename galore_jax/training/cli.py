"""The trainer's command line: ``--config``, its overrides and ``--workdir``."""

import ast
import dataclasses
import difflib
import re
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections.config_flags import config_flags

from galore_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Arguments:
    """What the command line says.

    Attributes:
      config: the ConfigDict of ``--config`` with its overrides.
      workdir: ``--workdir``, or ``runs/CONFIG-METHOD-OPTIMIZER``.
    """

    config: Any
    workdir: Path


def parse(argv: list[str], *, usage: str, configs: Path) -> Arguments | None:
    """Parses a command line.

    Args:
      argv: as ``sys.argv``.
      usage: the first part of the help.
      configs: the folder of configs, whose ``sample.py`` is the default.

    Returns:
      The arguments, or None after printing the help that was asked for.

    Raises:
      UserError: unknown flags, config files, keys or values of the wrong type.
    """
    if {"--help", "-h", "-help", "--helpfull", "--helpshort"} & set(argv[1:]):
        print(help_text(usage, configs))
        return None
    values = flags.FlagValues()
    try:
        argv = _found(argv, configs)
        argv, cleared = _cleared(argv, configs)
        config_flag = config_flags.DEFINE_config_file(
            "config", str(configs / "sample.py"), flag_values=values, sys_argv=argv
        )
        flags.DEFINE_string("workdir", None, "", flag_values=values)
        rest = values(argv)
        config = config_flag.value
        config.update_from_flattened_dict(dict.fromkeys(cleared))
        method, optimizer = config.method, config.optimizer.name
    except (
        flags.Error,
        AttributeError,
        ArithmeticError,
        ImportError,
        LookupError,
        NameError,
        OSError,
        SyntaxError,
        TypeError,
        ValueError,
    ) as error:
        raise UserError(_explain(argv, error, configs)) from error
    if rest[1:]:
        raise UserError(
            f"unknown argument {rest[1]!r}; flags are --config, --config.KEY, --workdir"
        )
    name = Path(config_flags.get_config_filename(values["config"])).stem
    default = Path("runs") / f"{name.split(':')[0]}-{method}-{optimizer}"
    return Arguments(config, Path(values.workdir).expanduser() if values.workdir else default)


def help_text(usage: str, configs: Path) -> str:
    """The text of ``--help``: usage, flags, the configs, and every config key with its default."""
    lines = [usage.strip(), "", "flags:"]
    lines += [
        "  --config=FILE[:method=galore|full,optimizer=NAME]   default: configs/sample.py",
        "  --config.KEY=VALUE      any key below, as in --config.galore.rank=64",
        "  --workdir=DIR           default: runs/CONFIG-METHOD-OPTIMIZER",
        "  --help                  this text",
        "",
        "configs:",
    ]
    files = sorted(configs.glob("*.py"), key=lambda path: path.stem)
    for path in files:
        if path.stem != "base":
            lines.append(f"  configs/{path.name:<18}{_first_line(path)}")
    lines += ["", "config keys, with the defaults of configs/base.py:"]
    for key, value in _declared(configs).items():
        lines.append(f"  --config.{key}={value}")
    return "\n".join(lines)


def _first_line(path: Path) -> str:
    return (ast.get_docstring(ast.parse(path.read_text())) or "").partition("\n")[0]


def _found(argv: list[str], configs: Path) -> list[str]:
    """``--config FILE`` as ``--config=FILE``, and ``configs/...`` found from any folder."""
    found, rest = [], iter(argv)
    for argument in rest:
        if argument in ("--config", "-config"):
            argument = f"--config={next(rest, '')}"
        name, _, value = argument.partition("=")
        path = Path(value.partition(":")[0])
        if name in ("--config", "-config"):
            if not path.is_file() and (configs.parent / path).is_file():
                value = str(configs.parent / value)
            argument = f"--config={value}"
        found.append(argument)
    return found


def _cleared(argv: list[str], configs: Path) -> tuple[list[str], list[str]]:
    """The arguments without those that set a key back to None, which absl cannot parse; and these.

    Only keys whose default is None can be.
    """
    optional = {key for key, value in _declared(configs).items() if value.split()[0] == "None"}
    rest, cleared = [], []
    for argument in argv:
        key, _, value = argument.lstrip("-").partition("=")
        key = key.removeprefix("config.")
        if value == "None" and key in optional and argument.startswith("-"):
            cleared.append(key)
        else:
            rest.append(argument)
    return rest, cleared


def _declared(configs: Path) -> dict[str, str]:
    """The keys of ``base.py`` with their defaults and comments, as they are written there."""
    declared = {}
    above: list[str] = []
    for line in map(str.strip, (configs / "base.py").read_text().splitlines()):
        key, assigned, value = line.partition(" = ")
        if assigned and key.startswith("config.") and value != "ConfigDict()":
            value = re.sub(r"config_dict\.placeholder\(\w+\)", "None", value)
            comment = f"  # {' '.join(above)}" if above else ""
            declared.setdefault(key.removeprefix("config."), value + comment)
        above = [*above, line.removeprefix("# ")] if line.startswith("# ") else []
    return declared


def _explain(argv: list[str], error: Exception, configs: Path) -> str:
    """The one line that a user needs of what absl and ml_collections raise."""
    declared = _declared(configs)
    sections = {key.partition(".")[0] for key in declared if "." in key}
    for argument in argv[1:]:
        key = argument.lstrip("-").partition("=")[0].removeprefix("config.")
        if not argument.lstrip("-").startswith("config."):
            continue
        if isinstance(error, flags.IllegalFlagValueError) and argument.lstrip("-") in str(error):
            if key in sections:
                return f"--config.{key} is a section: set its keys, as in --config.{key}.KEY=VALUE"
            default = declared[key].partition("  #")[0]
            return f"{argument} has a value of another type than the default, {default}"
        if key in {*declared, *sections}:
            continue
        near = difflib.get_close_matches(key, declared, n=1) or [
            known for known in declared if known.rpartition(".")[2] == key.rpartition(".")[2]
        ]
        hint = f"did you mean --config.{near[0]}?" if near else "--help lists the keys"
        return f"--config.{key} is no config key; {hint}"
    for given in (a.removeprefix("--config=") for a in argv if a.startswith("--config=")):
        path = Path(given.partition(":")[0])
        there = ", ".join(sorted(f.name for f in configs.glob("*.py") if f.stem != "base"))
        if not path.is_file():
            return f"--config={given}: there is no such file; configs/ has {there}"
        if not isinstance(error, flags.Error):
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            return f"--config={given} is not a config that loads: {reason}"
    return " ".join(str(error).split())
