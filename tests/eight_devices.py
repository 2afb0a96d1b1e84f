"""Programs on eight virtual devices of the CPU: each is a process, as their number is fixed."""

import os
import subprocess
import sys
from pathlib import Path

ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "OPENBLAS_NUM_THREADS": "1",  # else every virtual device's SVD has threads of its own
    # On a busy machine with fewer cores than devices, some arrive late where others wait.
    "XLA_FLAGS": "--xla_force_host_platform_device_count=8 "
    "--xla_cpu_collective_call_terminate_timeout_seconds=300",
    "PYTHONPATH": str(Path(__file__).parents[1]),
}


def run_on_eight_devices(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Runs a Python program with its arguments."""
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        env={**os.environ, **ENVIRONMENT},
        capture_output=True,
        text=True,
        timeout=590,
        check=False,
    )
