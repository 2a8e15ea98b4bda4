#!/usr/bin/env bash
# The multi-task measurement, beside the demo and from its base: sets up .venv if need be, then runs scripts/experiments/multitask.
#
#   scripts/multitask.sh                 the whole of it (goes on where it stopped; makes the demo's base if need be)
#   scripts/multitask.sh --quick         every part, too short to learn anything
#   scripts/multitask.sh --output DIR    the demo's output, if it is not ./demo-output
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
"$here/setup.sh"
venv=${VENV:-.venv}  # as setup.sh takes it: from the project, if it is no whole path
[[ $venv = /* ]] || venv=$here/../$venv
export PATH="$venv/bin:$PATH"
exec "$venv/bin/python" "$here/experiments/multitask" "$@"
