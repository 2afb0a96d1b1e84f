import threading

import pytest
from small_c4 import TEXTS, WRITERS

from galore_jax.data import sample
from galore_jax.data.batches import Batches
from galore_jax.data.tokenizer import train_tokenizer


@pytest.fixture(scope="session")
def tokenizer_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "small.model"
    train_tokenizer(iter(TEXTS["train"]), path, vocab_size=320)
    return str(path)


@pytest.fixture(scope="session", params=sorted(WRITERS))
def c4(request, tmp_path_factory):
    """A data_dir, once in each form."""
    return str(WRITERS[request.param](tmp_path_factory.mktemp(request.param)))


@pytest.fixture(scope="session")
def sample_paths(sample_cache):
    return sample.prepare_sample()


@pytest.fixture(autouse=True)
def nothing_left_open():
    """Every test closes its iterators, and a closed one has no thread."""
    yield
    assert not Batches._open
    assert "read-ahead" not in {thread.name for thread in threading.enumerate()}
