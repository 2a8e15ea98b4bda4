#!/usr/bin/env bash
# Run the demo on a bare machine: set up .venv if needed, then run scripts/experiments/demo with the given arguments.
#
#   scripts/demo.sh                   the whole demo (scripts/README.md says how long); finished stages are used again
#   scripts/demo.sh --quick           every part, but too short to learn anything
#   scripts/demo.sh --output DIR      write to DIR instead of ./demo-output
#   scripts/demo.sh --vllm            also ask vLLM, in .venv-vllm, and compare every text
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
with=()
for word; do [ "$word" != --vllm ] || with=(--vllm); done
"$here/setup.sh" ${with[@]+"${with[@]}"}
venv=${VENV:-.venv}  # as setup.sh takes it: from the project, if it is no whole path
[[ $venv = /* ]] || venv=$here/../$venv
export PATH="$venv/bin:$PATH"
exec "$venv/bin/python" "$here/experiments/demo" "$@"
