#!/usr/bin/env bash
# Measure what an adapter costs on a GPU: training and generation on a random LLaVA-1.5-7B that is built on the device
# (nothing is downloaded), in bf16 and in 4 bits. Then run the tests that need CUDA. Writes gpu_check.json, prints tables.
#
#   scripts/gpu_check.sh                  needs a GPU of 40 GiB or more
#   scripts/gpu_check.sh --output DIR     write to DIR instead of ./gpu-check
#   scripts/gpu_check.sh --tiny           the same code on a tiny model, with or without a GPU
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=${PYTHON:-$here/../.venv/bin/python}
[ -x "$(command -v "$python")" ] || { echo "gpu_check: no $python; run scripts/setup.sh, or name one with PYTHON" >&2; exit 2; }
exec "$python" "$here/benchmarks" gpu "$@"
