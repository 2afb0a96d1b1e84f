"""The shape, dtype and checksum of saved arrays, as JSON values."""

import json
import zlib
from typing import Any

import numpy as np


def index_array(array: np.ndarray) -> dict[str, Any]:
    """Returns an array's shape, dtype and CRC-32 as JSON values."""
    crc32 = zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return {"shape": list(array.shape), "dtype": array.dtype.name, "crc32": crc32}


def placeholder(entry: dict[str, Any]) -> np.ndarray:
    """Makes an array of the shape and dtype of an entry of the index, without memory."""
    return np.broadcast_to(np.zeros((), np.dtype(entry["dtype"])), entry["shape"])


def json_crc32(value: Any) -> int:
    """Returns the CRC-32 of a value as JSON."""
    as_read_back = json.loads(json.dumps(value))  # keys are strings, tuples are lists
    return zlib.crc32(json.dumps(as_read_back, sort_keys=True).encode())


def describe(shape: Any, dtype: Any, crc32: int = 0) -> str:
    """Names an array's type, such as ``bfloat16[8,512,512]``."""
    return f"{np.dtype(dtype).name}[{','.join(str(n) for n in shape)}]"
