import pytest


@pytest.fixture(scope="session", autouse=True)
def sample_cache(tmp_path_factory):
    """The sample corpus, built once a test session, apart from the user's own cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GALORE_JAX_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield
