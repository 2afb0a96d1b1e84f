"""Folders that TFDS has prepared, and folders written as if it had."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter

from galore_jax.errors import UserError


def check_tfds() -> None:
    """Raises a UserError where tensorflow_datasets failed to import whole, which can be silent."""
    if not hasattr(tfds, "data_source"):
        raise UserError(
            "tensorflow_datasets did not import whole, as with protobuf 5 beside a newer "
            "tensorflow-metadata; pip install -U protobuf tensorflow-metadata"
        )


def newest_version(folder: Path) -> Path | None:
    """Returns the subfolder of the newest version that TFDS has prepared, None if there is none."""
    folders = (path.parent for path in folder.glob("*/dataset_info.json"))
    prepared = (path for path in folders if re.fullmatch(r"\d+\.\d+\.\d+", path.name))
    numbers = lambda path: [int(number) for number in path.name.split(".")]  # noqa: E731
    return max(prepared, key=numbers, default=None)


def write_tfds(
    folder: Path,
    examples: Mapping[str, Sequence[Mapping[str, Any]]],
    *,
    features: Any,
    module: str,
    description: str,
) -> None:
    """Writes array_record shards and TFDS's description of them, without TensorFlow.

    Args:
      folder: ``.../NAME/CONFIG/VERSION``, which must not exist yet.
      examples: of each split.
      features: a TFDS ``FeaturesDict``.
      module: the name of TFDS's module that the data set would be of.
      description: what it is.
    """
    # Here and not above: they fail where tensorflow_datasets did not import whole.
    from tensorflow_datasets.core import dataset_info
    from tensorflow_datasets.core import splits as splits_lib

    folder.mkdir(parents=True)
    name, config, version = folder.parts[-3:]
    identity = dataset_info.DatasetIdentity(
        name, tfds.core.Version(version), str(folder), module, config_name=config
    )
    info = tfds.core.DatasetInfo(builder=identity, features=features, description=description)
    info.set_file_format("array_record")
    splits = []
    for split, rows in examples.items():
        template = tfds.core.ShardedFileTemplate(
            cast(Any, folder), dataset_name=name, split=split, filetype_suffix="array_record"
        )
        path = template.sharded_filepath(shard_index=0, num_shards=1)
        writer = ArrayRecordWriter(str(path), "group_size:1")
        written = 0
        for row in rows:
            record = features.serialize_example(features.encode_example(row))
            writer.write(record)
            written += len(record)
        writer.close()
        splits.append(tfds.core.SplitInfo(split, [len(rows)], written, template))
    info.set_splits(splits_lib.SplitDict(splits))
    info.write_to_directory(folder)
