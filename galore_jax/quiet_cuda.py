"""Silence about a CUDA that is installed to compile for GPUs, on a machine without one.

Imports nothing of this package, nor jax: its commands enter ``quiet_cuda`` before those.
"""

import contextlib
import glob
import importlib.util
import os
import tempfile
from collections.abc import Iterator


@contextlib.contextmanager
def quiet_cuda() -> Iterator[None]:
    """Drops what is written to stderr while jax, or its CUDA plugin, is loaded in the block.

    Nothing is dropped if the block raises, nor where a GPU is there or asked for in
    ``JAX_PLATFORMS``. No setting of the process changes: JAX finds the devices that it would find.
    """
    wanted = {"cuda", "gpu"} & set(os.environ.get("JAX_PLATFORMS", "").split(","))
    installed = map(importlib.util.find_spec, ("jax_cuda12_plugin", "jax_cuda13_plugin"))
    if wanted or not any(installed) or glob.glob("/dev/nvidia*"):
        yield
        return
    with tempfile.TemporaryFile() as written:
        stderr = os.dup(2)  # CUDA's libraries write to the descriptor, not to sys.stderr
        os.dup2(written.fileno(), 2)
        try:
            yield
        except BaseException:
            written.seek(0)
            os.write(stderr, written.read())
            raise
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
