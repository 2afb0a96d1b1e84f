"""Folders that appear when they are complete, or not at all."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from galore_jax.errors import UserError


@contextlib.contextmanager
def complete_or_absent(folder: Path) -> Iterator[Path]:
    """Gives a new folder beside ``folder``, renamed to it once the body has ended without an error.

    Raises:
      UserError: there is something in ``folder`` already, or it cannot be written.

    >>> with tempfile.TemporaryDirectory() as parent:
    ...     with complete_or_absent(Path(parent, "new")) as folder:
    ...         _ = (folder / "file").write_text("whole")
    ...     Path(parent, "new", "file").read_text()
    'whole'
    """
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise UserError(f"{folder} exists already; give a folder that does not exist yet")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.partial-", dir=folder.parent))
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror}") from error
    try:
        yield partial
        mask = os.umask(0)
        os.umask(mask)
        partial.chmod(0o777 & ~mask)  # mkdtemp's folders are the owner's alone
        partial.rename(folder)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
