#!/usr/bin/env bash
# Runs all notebooks, in their fast mode, with the versions that Colab has today.
#   notebooks/run_on_colab_pins.sh [PYTHON3.13]
set -euo pipefail
cd "$(dirname "$0")/.."
venv=$(mktemp -d)
trap 'rm -rf "$venv"' EXIT
"${1:-python3.13}" -m venv "$venv"
source "$venv/bin/activate"
pins=(jax==0.7.2 jaxlib==0.7.2 flax==0.11.2 optax==0.2.8)
pip install -q -e '.[test]' "${pins[@]}" jax-cuda12-plugin==0.7.2 jax-cuda12-pjrt==0.7.2
pip list 2>/dev/null | grep -E '^(jax|jaxlib|flax|optax|numpy|orbax-checkpoint) '
pytest -q tests/notebooks
