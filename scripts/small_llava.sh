#!/usr/bin/env bash
# Make a small LLaVA of parts that come in packages, and train its connector on real pictures (docs/small-llava.md): sets
# up .venv if needed, then runs scripts/experiments/small_llava with the given arguments.
#
#   scripts/small_llava.sh                 the whole run (scripts/README.md says how long); finished stages are used again
#   scripts/small_llava.sh --steps 3       every part, but too short to learn anything
#   scripts/small_llava.sh --output DIR    write to DIR instead of ./small-llava-output
#   scripts/small_llava.sh --stamps DIR    pictures from here; without it apt-get fetches them (161 MB)
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
"$here/setup.sh"
venv=${VENV:-.venv}  # as setup.sh takes it: from the project, if it is no whole path
[[ $venv = /* ]] || venv=$here/../$venv
export PATH="$venv/bin:$PATH"
exec "$venv/bin/python" "$here/experiments/small_llava" "$@"
