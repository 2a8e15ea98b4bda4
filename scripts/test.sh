#!/usr/bin/env bash
# Sets up .venv if need be, then lints, checks types and runs the tests.
#
#   scripts/test.sh            everything: the fast tests, then the slow ones, and the time of both
#   scripts/test.sh --fast     without the slow ones
#   scripts/test.sh ARGUMENTS  handed on to pytest, for example: tests/upstream -k patch
#
# Without ARGUMENTS the tests run in TEST_PROCESSES (2) processes side by side.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [ "${1:-}" = --fast ]; then scripts/setup.sh; else scripts/setup.sh --browser --lmms-eval --transformers; fi
bin=$(cd "${VENV:-.venv}/bin" && pwd)
export PATH="$bin:$PATH"  # for what tests start: deepspeed, ninja, llava-steering
unset PYTHONDONTWRITEBYTECODE  # tests start hundreds of processes: none of them compiles a module again

ruff check .
mypy

kinds=(fast slow)
if [ "${1:-}" = --fast ]; then
  shift
  kinds=(fast)
  if [ $# != 0 ]; then exec pytest -m "not slow" "$@"; fi
fi
if [ $# != 0 ]; then exec pytest "$@"; fi

# Every save is flushed to the disk, and the tests save thousands of times: their files lie in memory where there is
# room for them and programs may be run from there.
place=()
if [ -w /dev/shm ] && [ "$(df -Pk /dev/shm | awk 'END { print $4 }')" -gt $((4 << 20)) ]; then
  scratch=$(mktemp -d /dev/shm/steering-tests.XXXXXX)
  trap 'rm -rf "$scratch"' EXIT
  cp "$(type -P true)" "$scratch/" && "$scratch/true" 2>/dev/null && place=(--basetemp "$scratch/pytest")
fi

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}  # the processes share nothing, and have a core each
status=0
summary=()
for kind in "${kinds[@]}"; do
  started=$SECONDS
  [ "$kind" = slow ] && select=slow || select="not slow"
  pytest -m "$select" ${place[@]+"${place[@]}"} -n "${TEST_PROCESSES:-2}" --dist loadfile --no-loadscope-reorder --durations 30 || status=$?
  taken=$((SECONDS - started))
  summary+=("$(printf '%s tests: %d min %02d s' "$kind" $((taken / 60)) $((taken % 60)))")
done
# What needs a newer transformers than LLaVA's pin was skipped above; it runs in the environment that has one.
newer="${VENV:-.venv}-transformers/bin/python"
if [ -x "$newer" ]; then
  started=$SECONDS
  "$newer" -m pytest tests/transformers ${place[@]+"${place[@]}"} || status=$?
  summary+=("$(printf 'tests with transformers 5: %d min %02d s' $(((SECONDS - started) / 60)) $(((SECONDS - started) % 60)))")
else
  summary+=("tests with transformers 5: skipped, there is no $newer: scripts/setup.sh --transformers makes it")
fi
printf '== %s\n' "${summary[@]}"
exit "$status"
