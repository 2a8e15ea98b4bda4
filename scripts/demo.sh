#!/usr/bin/env bash
# The demo, from a bare machine: sets up .venv if need be, then runs scripts/experiments/demo with the arguments given here.
#
#   scripts/demo.sh                   the whole demo (docs/demo.md says how long; goes on where it stopped)
#   scripts/demo.sh --quick           every part, too short to learn anything
#   scripts/demo.sh --output DIR      somewhere else than ./demo-output
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
"$here/setup.sh"
venv=${VENV:-.venv}  # as setup.sh takes it: from the project, if it is no whole path
[[ $venv = /* ]] || venv=$here/../$venv
export PATH="$venv/bin:$PATH"
exec "$venv/bin/python" "$here/experiments/demo" "$@"
