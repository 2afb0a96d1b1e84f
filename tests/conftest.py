import jax
import pytest


@pytest.fixture(scope="session", autouse=True)
def sample_cache(tmp_path_factory):
    """The sample corpus, built once a test session, apart from the user's own cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GALORE_JAX_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session", autouse=True)
def compiled_programs(tmp_path_factory):
    """A program that several tests or their processes run is compiled once a session."""
    folder = str(tmp_path_factory.mktemp("programs"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_COMPILATION_CACHE_DIR", folder)
        jax.config.update("jax_compilation_cache_dir", folder)
        yield
        jax.config.update("jax_compilation_cache_dir", None)


# They are programs of their own, and the second needs google-tunix.
collect_ignore = ["core/nnx_on_mesh.py", "examples/tunix_on_mesh.py"]
