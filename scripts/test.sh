#!/usr/bin/env bash
# Sets up .venv if need be, then lints, checks types and runs the tests.
#
#   scripts/test.sh            everything, also the slow tests
#   scripts/test.sh --fast     without the slow ones
#   scripts/test.sh ARGUMENTS  handed on to pytest, for example: tests/upstream -k patch
#
# Without arguments the tests run in TEST_PROCESSES (2) processes side by side.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [ "${1:-}" = --fast ]; then scripts/setup.sh; else scripts/setup.sh --browser; fi
bin=$(cd "${VENV:-.venv}/bin" && pwd)
export PATH="$bin:$PATH"  # for what tests start: deepspeed, ninja, llava-steering

select=()
if [ "${1:-}" = --fast ]; then
  shift
  select=(-m "not slow")
fi
if [ $# = 0 ]; then  # all of them: in two processes, which share nothing, with a core each
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
  select+=(-n "${TEST_PROCESSES:-2}" --dist loadfile --no-loadscope-reorder --durations 30)
fi
ruff check .
mypy
pytest "${select[@]}" "$@"
