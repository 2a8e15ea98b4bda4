#!/usr/bin/env bash
# Try every language model with every vision tower, connector and tuning method, on tiny random models: set up .venv if
# needed, then run scripts/experiments/combinations.
#
#   scripts/all_combinations.sh                    all, or those that an earlier run has left; prints their table
#   scripts/all_combinations.sh --pairs            at most 40, in which every pair of parts occurs
#   scripts/all_combinations.sh --only qwen2+mof   those with this in their name
#   scripts/all_combinations.sh --help             all options
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
"$here/setup.sh"
venv=${VENV:-.venv}  # as setup.sh takes it: from the project, if it is no whole path
[[ $venv = /* ]] || venv=$here/../$venv
export PATH="$venv/bin:$PATH"
export OMP_NUM_THREADS=1 PYTHONHASHSEED=0  # the same numbers in every run
exec "$venv/bin/python" "$here/experiments/combinations" "$@"
