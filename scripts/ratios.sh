#!/usr/bin/env bash
# Compare fixed shares of steered tokens with those that layers choose: set up .venv if needed, then run
# scripts/experiments/ratios on the demo's base.
#
#   scripts/ratios.sh                 the whole comparison; finished stages, such as the demo's base, are used again
#   scripts/ratios.sh --quick         every part, but too short to learn anything
#   scripts/ratios.sh --output DIR    the demo's output folder, if it is not ./demo-output
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
"$here/setup.sh"
venv=${VENV:-.venv}  # as setup.sh takes it: from the project, if it is no whole path
[[ $venv = /* ]] || venv=$here/../$venv
export PATH="$venv/bin:$PATH"
exec "$venv/bin/python" "$here/experiments/ratios" "$@"
