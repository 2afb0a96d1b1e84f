"""Double precision for part of a test, whatever jax calls it: the name changed between versions."""

import contextlib

import jax


@contextlib.contextmanager
def float64_types(wanted=True):
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", wanted)
    try:
        yield
    finally:
        jax.config.update("jax_enable_x64", before)
