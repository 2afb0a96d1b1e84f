"""The trainer's command line: ``--config``, its overrides and ``--workdir``."""

import ast
import dataclasses
import difflib
import re
import runpy
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from galore_jax.errors import UserError
from galore_jax.training.config import OWN_MODEL_KEYS, flat_items


@dataclasses.dataclass(frozen=True)
class Arguments:
    """A parsed command line.

    Attributes:
      config: the ConfigDict of ``--config`` with its overrides.
      workdir: ``--workdir``, or ``runs/CONFIG-METHOD-OPTIMIZER``.
    """

    config: Any
    workdir: Path


def parse(
    argv: list[str], *, usage: str, configs: Path, saved: Mapping[str, Any] | None = None
) -> Arguments | None:
    """Parses a command line.

    Args:
      argv: as ``sys.argv``.
      usage: the first part of the help.
      configs: the folder of configs, whose ``sample.py`` is the default.
      saved: the config of a run, from its ``config.json``, to take in place of ``--config``.

    Returns:
      The arguments, or None after printing the help that was asked for.

    Raises:
      UserError: unknown flags, config files, keys or values of the wrong type.
    """
    file = default_file = str(configs / "sample.py")
    workdir, overrides = "", {}
    rest = iter(argv[1:])
    for argument in rest:
        name, given, value = argument.removeprefix("-").removeprefix("-").partition("=")
        if name in ("help", "h", "helpfull", "helpshort"):
            print(help_text(usage, configs))
            return None
        if not argument.startswith("-") or name.split(".")[0] not in ("config", "workdir"):
            raise UserError(
                f"unknown argument {argument!r}; flags are --config, --config.KEY, --workdir"
            )
        if not given:
            value = next(rest, "")
        if name == "config":
            file = value
        elif name == "workdir":
            workdir = value
        else:
            overrides[name.removeprefix("config.")] = value
    if saved is not None:
        if file != default_file:
            raise UserError(f"--config={file} cannot be given for a run, which has its own config")
        config = _from_saved(saved, configs)
    else:
        config = _load(file, configs)
    sizes = {f"model.{key}" for key in set(config.model) - OWN_MODEL_KEYS}
    replaced = [key for key in overrides if key in sizes]
    if replaced and overrides.get("init_from", "None") != "None":
        raise UserError(
            f"--config.{replaced[0]} cannot be given with --config.init_from, whose model has its "
            "own sizes"
        )
    for key, value in overrides.items():
        _override(config, key, value, configs)
    stem, _, arg = file.partition(":")
    rows = [item for item in arg.split(",") if item and "=" not in item]
    name = "-".join([Path(stem).stem, *rows, config.method, config.optimizer.name])
    default = Path("runs") / name
    return Arguments(config, Path(workdir).expanduser() if workdir else default)


def help_text(usage: str, configs: Path) -> str:
    """Returns the text of ``--help``: usage, flags, the configs, and every key with its default."""
    lines = [usage.strip(), "", "flags:"]
    lines += [
        "  --config=FILE[:ROW,method=NAME,optimizer=NAME]   default: configs/sample.py",
        "  --config.KEY=VALUE      any key below, as in --config.galore.rank=64",
        "  --workdir=DIR           default: runs/CONFIG-METHOD-OPTIMIZER",
        "  --help                  this text",
        "",
        "configs:",
    ]
    for path in _files(configs):
        docstring = ast.get_docstring(ast.parse(path.read_text())) or ""
        lines.append(f"  configs/{path.name:<18}{docstring.partition(chr(10))[0]}")
    lines += ["", "config keys, with the defaults of configs/base.py:"]
    lines += [f"  --config.{key}={value}" for key, value in _declared(configs).items()]
    return "\n".join(lines)


def _files(configs: Path) -> list[Path]:
    return sorted(path for path in configs.glob("*.py") if path.stem != "base")


def _declared(configs: Path) -> dict[str, str]:
    """Reads the keys of ``base.py`` with their defaults and comments, as they are written there."""
    declared = {}
    above: list[str] = []
    for line in map(str.strip, (configs / "base.py").read_text().splitlines()):
        key, assigned, value = line.partition(" = ")
        if assigned and key.startswith("config.") and value != "ConfigDict()":
            value = re.sub(r"config_dict\.placeholder\(\w+\)", "None", value)
            value = re.sub(r"config_dict\.FieldReference\((\w+), field_type=object\)", r"\1", value)
            comment = f"  # {' '.join(above)}" if above else ""
            declared.setdefault(key.removeprefix("config."), value + comment)
        above = [*above, line.removeprefix("# ")] if line.startswith("# ") else []
    return declared


def _load(file: str, configs: Path) -> Any:
    """Makes the config of ``FILE`` or ``FILE:ARGUMENTS``, which is found from any folder."""
    name, _, arg = file.partition(":")
    path = next((p for p in (Path(name), configs.parent / name) if p.is_file()), None)
    old_name = re.fullmatch(r"llama_(\w+)", Path(name).stem)
    if path is None and old_name:
        now = ",".join(filter(None, [f"configs/llama.py:{old_name[1]}", arg]))
        raise UserError(f"--config={file} is --config={now} now")
    if path is None:
        known = ", ".join(path.name for path in _files(configs))
        raise UserError(f"--config={file}: there is no such file; configs/ has {known}")
    sys.path.insert(0, str(configs.parent))  # a config imports configs.base
    try:
        return runpy.run_path(str(path))["get_config"](arg)
    except UserError:
        raise
    except Exception as error:  # it is the user's own code
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"--config={file} is not a config that loads: {reason}") from error
    finally:
        sys.path.remove(str(configs.parent))


def _from_saved(saved: Mapping[str, Any], configs: Path) -> Any:
    """Makes the config of a run's ``config.json``, with the types of ``base.py``."""
    config = _load(str(configs / "base.py"), configs)
    known, found = dict(flat_items(config)), dict(flat_items(saved))
    values = {key: found[key] for key in known if key in found}  # older runs lack some
    for key, value in values.items():
        values[key] = tuple(value) if isinstance(value, list) else value
    config.update_from_flattened_dict(values)
    return config


def find_configs() -> Path:
    """Finds the folder of configs: in the current folder, or beside the package in a clone.

    Raises:
      UserError: there is none.
    """
    for folder in (Path.cwd() / "configs", Path(__file__).resolve().parents[2] / "configs"):
        if (folder / "base.py").is_file():
            return folder
    raise UserError("there is no folder configs here: run this in a clone of the repository")


def _override(config: Any, key: str, text: str, configs: Path) -> None:
    """Sets a key to the value that ``text`` spells, of the type of its default."""
    values = dict(flat_items(config))
    if key not in values:
        if any(known.startswith(f"{key}.") for known in values):
            raise UserError(
                f"--config.{key} is a section: set its keys, as in --config.{key}.KEY=VALUE"
            )
        near = [known for known in values if known.split(".")[-1] == key.split(".")[-1]]
        near = near or difflib.get_close_matches(key, values, n=1)
        named = " or ".join(f"--config.{known}" for known in near)
        hint = f"did you mean {named}?" if near else "--help lists the keys"
        raise UserError(f"--config.{key} is no config key; {hint}")
    section = config
    for name in key.split(".")[:-1]:
        section = section[name]
    wanted, default = section.get_type(key.split(".")[-1]), _declared(configs).get(key, "")
    try:
        if text == "None" and default.startswith("None"):
            value = None
        elif wanted is str:
            value = text
        else:
            value = ast.literal_eval(text.capitalize() if wanted is bool else text)
            whole = type(value) is int
            if whole and (wanted is float or (wanted is bool and value in (0, 1))):
                value = wanted(value)
            elif wanted is tuple:
                value = tuple(value) if isinstance(value, list | tuple) else (value,)
            elif isinstance(value, dict):
                value = tuple(value.items())
        # galore.rank: a number, or pairs of patterns and numbers
        allowed = (int, tuple) if wanted is object else (wanted,)
        if value is not None and type(value) not in allowed:
            raise ValueError
    except (ValueError, SyntaxError, TypeError) as error:
        raise UserError(
            f"--config.{key}={text} has a value of another type than the default, "
            f"{default.partition('  #')[0]}"
        ) from error
    config.update_from_flattened_dict({key: value})
