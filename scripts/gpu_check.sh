#!/usr/bin/env bash
# What an adapter costs on a GPU: trains and generates on a random LLaVA-1.5-7B that is built on the device (nothing is
# downloaded), in bf16 and in 4 bits, then runs the tests that need CUDA. Writes one JSON and prints the tables.
#
#   scripts/gpu_check.sh                  needs a GPU of 40 GiB or more
#   scripts/gpu_check.sh --output DIR     somewhere else than ./gpu-check
#   scripts/gpu_check.sh --tiny           the same code on a tiny model, also without a GPU
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=${PYTHON:-$here/../.venv/bin/python}
[ -x "$(command -v "$python")" ] || { echo "gpu_check: no $python; run scripts/setup.sh, or name one with PYTHON" >&2; exit 2; }
exec "$python" "$here/benchmarks" gpu "$@"
