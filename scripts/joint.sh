#!/usr/bin/env bash
# Compare MoReS with LoRA or MixLoRA at once with each of them alone: set up .venv if needed, then run
# scripts/experiments/joint on the demo's base.
#
#   scripts/joint.sh                 the whole comparison; finished stages, such as the demo's base, are used again
#   scripts/joint.sh --quick         every part, but too short to learn anything
#   scripts/joint.sh --output DIR    the demo's output folder, if it is not ./demo-output
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
"$here/setup.sh"
venv=${VENV:-.venv}  # as setup.sh takes it: from the project, if it is no whole path
[[ $venv = /* ]] || venv=$here/../$venv
export PATH="$venv/bin:$PATH"
exec "$venv/bin/python" "$here/experiments/joint" "$@"
