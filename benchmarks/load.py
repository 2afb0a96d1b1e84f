"""Peak of resident memory while a model is loaded from a Hugging Face folder.

  PYTHONPATH=. python benchmarks/load.py --preset=llama_1b --dtype=bfloat16
  PYTHONPATH=. python benchmarks/load.py --folder=models/smollm2

A preset with random weights is saved to a temporary folder first. A process of its own then loads
the folder and prints the most memory that it ever had, all of Python and JAX included, beside the
size of the files. For Linux.
"""

import argparse
import dataclasses
import functools
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax

from galore_jax.models import huggingface
from galore_jax.models.llama import init_params
from galore_jax.models.presets import PRESETS


def resident(key: str) -> int:
    """The bytes that /proc tells under ``VmRSS``, now, or ``VmHWM``, at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(key)).split()[1])


def measure(folder: Path) -> None:
    jax.devices()
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    before, begun = resident("VmRSS"), time.perf_counter()
    params = huggingface.load(folder)
    seconds, peak = time.perf_counter() - begun, resident("VmHWM")
    del params
    print(
        f"files {size / 1e9:.3f} GB; peak {peak / 1e9:.3f} GB, {peak / size:.3f} of the files, of "
        f"which {before / 1e9:.3f} GB were there before; {seconds:.1f} s; "
        f"{jax.devices()[0].device_kind}, jax {jax.__version__}"
    )


def main() -> None:
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("--preset", default="llama_1b", choices=PRESETS)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--folder", type=Path, help="in the preset's place")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure is not None:
        measure(given.measure)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.folder
        if folder is None:
            folder = Path(temporary) / "model"
            config = dataclasses.replace(
                PRESETS[given.preset], dtype=given.dtype, param_dtype=given.dtype
            )
            _, params = jax.jit(functools.partial(init_params, config))(jax.random.key(0))
            huggingface.save(folder, config, params)
            del params
        subprocess.run([sys.executable, __file__, f"--measure={folder}"], check=True)


if __name__ == "__main__":
    main()
