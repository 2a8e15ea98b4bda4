#!/usr/bin/env bash
# Answer and score the papers' benchmarks whose data is there, and print the papers' tables beside ours.
#
#   scripts/eval_papers.sh BASE --data /data --output results --adapter mores=./checkpoints/my-adapter
#   scripts/eval_papers.sh ... --dry-run     what would run, and where to get what is not there
#   scripts/eval_papers.sh --help            all options
#
# With the Python of the active environment; else of .venv, which scripts/setup.sh makes.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
venv=${VENV:-.venv}  # as setup.sh takes it: from the project, if it is no whole path
[[ $venv = /* ]] || venv=$here/../$venv
if [[ -z ${VIRTUAL_ENV:-}${CONDA_PREFIX:-} && -x $venv/bin/python ]]; then
  export PATH="$venv/bin:$PATH"
fi
exec python "$here/papers" "$@"
