r"""Pre-trains a LLaMA, with GaLore or the full gradients, on one device.

  python train.py
      the offline sample: real English, a small model, a few minutes on a laptop
  python train.py --config=configs/llama.py:60m --config.data.data_dir=DIR \
      --config.data.tokenizer=SPIECE_MODEL --workdir=runs/60m
      the paper's 60M run on C4
  python train.py --config=configs/sample.py:method=full,optimizer=lion
      full gradients instead of GaLore, another optimizer

The same command again resumes the run in its workdir, or says that it is complete.
"""

import os
import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent
# XLA runs decompositions side by side; OpenBLAS's threads in each would only wait for a core.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


def main() -> int:
    """Parses the flags and trains; returns 0, 2 after a one-line error, or 130 if interrupted."""
    try:
        # Run by its path, for ``import galore_jax`` imports jax.
        with runpy.run_path(str(ROOT / "galore_jax" / "quiet_cuda.py"))["quiet_cuda"]():
            import jax

            jax.devices()
        from galore_jax.errors import UserError
        from galore_jax.training.cli import parse

        try:
            arguments = parse(sys.argv, usage=__doc__ or "", configs=ROOT / "configs")
            if arguments is not None:
                from galore_jax.training.loop import train

                train(arguments.config, arguments.workdir)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
    except KeyboardInterrupt:
        print("interrupted; run the same command again to go on", file=sys.stderr)
        return 130
    except BrokenPipeError:  # as in `python train.py | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    return 0


if __name__ == "__main__":
    sys.exit(main())
