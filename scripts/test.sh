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
if [ "${1:-}" = --fast ]; then scripts/setup.sh; else
  scripts/setup.sh --browser --lmms-eval --transformers --newer-transformers --vllm
fi
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
# What needs another transformers than LLaVA's pin, or vLLM, was skipped above; it runs in the environments that have one.
elsewhere() {  # NAME OPTION PYTHON FOLDER
  local started=$SECONDS
  if [ -x "$3" ]; then
    "$3" -m pytest "$4" ${place[@]+"${place[@]}"} || status=$?
    summary+=("$(printf 'tests with %s: %d min %02d s' "$1" $(((SECONDS - started) / 60)) $(((SECONDS - started) % 60)))")
  else
    summary+=("tests with $1: skipped, there is no $3: scripts/setup.sh $2 makes it")
  fi
}
elsewhere "transformers 5" --transformers "${VENV:-.venv}-transformers/bin/python" tests/transformers
elsewhere "the newest transformers that LLaVA trains in" --newer-transformers "${VENV:-.venv}-newer/bin/python" tests/newer
elsewhere vLLM --vllm "${VENV:-.venv}-vllm/bin/python" tests/vllm
printf '== %s\n' "${summary[@]}"
exit "$status"
