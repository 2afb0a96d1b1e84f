"""What a device could do at most, to say how much of that a step does."""

import re
from typing import NamedTuple

from galore_jax.memory.targets import known_targets


class Peak(NamedTuple):
    """The makers' figures of a device.

    Attributes:
      flops: floating-point operations a second in dense matrix products of bfloat16.
      bandwidth: bytes a second from or to its memory.
    """

    flops: float
    bandwidth: float


def find_peak(device_kind: str) -> Peak | None:
    """Finds a device in ``targets.toml`` by JAX's name for it; None if it is not there.

    >>> find_peak("NVIDIA H100 80GB HBM3").flops
    989400000000000.0
    >>> find_peak("cpu") is None
    True
    """
    for facts in known_targets().values():
        kind = facts.get("device_kind")
        if kind is not None and re.search(kind, device_kind):
            return Peak(float(facts["flops"]), float(facts["bandwidth"]))
    return None
