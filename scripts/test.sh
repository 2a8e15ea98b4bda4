#!/usr/bin/env bash
# Sets up .venv if need be, then lints, checks types and runs the tests.
#
#   scripts/test.sh            everything: the fast tests, then the slow ones, and the time of both
#   scripts/test.sh --fast     without the slow ones
#   scripts/test.sh ARGUMENTS  handed on to pytest, for example: tests/upstream -k patch
#
# Without ARGUMENTS the tests run in TEST_PROCESSES (2) processes side by side. Forks are tested where they lie on disk:
#
#   LLAVA_NEXT  a checkout of LLaVA-NeXT: the tests in tests/next, in .venv-next, which is made for it
#   LLAVA_MAIN  a checkout of LLaVA's main branch: the fast tests in tests/upstream once more, against it
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [ "${1:-}" = --fast ]; then
  scripts/setup.sh
else
  scripts/setup.sh --browser --lmms-eval --transformers --newer-transformers --vllm ${LLAVA_NEXT:+--next "$LLAVA_NEXT"}
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
scratch= with_vllm=
summary=$(mktemp)  # a line for each run
said=$(mktemp)     # by the run that goes on in the background
trap 'rm -rf "$scratch" "$summary" "$said"; [ -z "$with_vllm" ] || kill "$with_vllm" 2>/dev/null' EXIT
if [ -w /dev/shm ] && [ "$(df -Pk /dev/shm | awk 'END { print $4 }')" -gt $((4 << 20)) ]; then
  scratch=$(mktemp -d /dev/shm/steering-tests.XXXXXX)
  cp "$(type -P true)" "$scratch/" && "$scratch/true" 2>/dev/null && place=(--basetemp "$scratch/pytest")
fi

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}  # the processes share nothing, and have a core each
status=0
note() { printf '%s\n' "$*" >>"$summary"; }
took() { printf '%d min %02d s' $(((SECONDS - $1) / 60)) $(((SECONDS - $1) % 60)); }  # SINCE
for kind in "${kinds[@]}"; do
  started=$SECONDS
  [ "$kind" = slow ] && select=slow || select="not slow"
  pytest -m "$select" ${place[@]+"${place[@]}"} -n "${TEST_PROCESSES:-2}" --dist loadfile --no-loadscope-reorder --durations 30 || status=$?
  note "$kind tests: $(took "$started")"
done
# What needs another transformers than LLaVA's pin, or vLLM, was skipped above; it runs in the environments that have one,
# those of vLLM beside the others.
elsewhere() {  # NAME OPTION PYTHON FOLDER
  local started=$SECONDS status=0 own=()
  if [ -x "$3" ]; then
    if [ "${#place[@]}" != 0 ]; then own=(--basetemp "$scratch/${4##*/}"); fi
    "$3" -m pytest "$4" ${own[@]+"${own[@]}"} || status=$?
    note "tests with $1: $(took "$started")"
  else
    note "tests with $1: skipped, there is no $3: scripts/setup.sh $2 makes it"
  fi
  return "$status"
}
elsewhere vLLM --vllm "${VENV:-.venv}-vllm/bin/python" tests/vllm >"$said" 2>&1 &
with_vllm=$!
elsewhere "transformers 5" --transformers "${VENV:-.venv}-transformers/bin/python" tests/transformers || status=$?
elsewhere "the newest transformers that LLaVA trains in" --newer-transformers "${VENV:-.venv}-newer/bin/python" tests/newer || status=$?
wait "$with_vllm" || status=$?
with_vllm=
cat "$said"
if [ "${kinds[*]}" = fast ]; then
  note "tests with LLaVA-NeXT and LLaVA's main branch: skipped with --fast"
else
  next="${VENV:-.venv}-next/bin/python"
  if [ -n "${LLAVA_NEXT:-}" ]; then
    started=$SECONDS
    "$next" -m pytest tests/next ${place[@]+"${place[@]}"} || status=$?
    note "tests with LLaVA-NeXT: $(took "$started")"
  else
    note "tests with LLaVA-NeXT: skipped, LLAVA_NEXT names no checkout of it"
  fi
  if [ -n "${LLAVA_MAIN:-}" ]; then
    started=$SECONDS
    pytest tests/upstream -m "not slow" --llava-path "$LLAVA_MAIN" ${place[@]+"${place[@]}"} || status=$?
    note "tests with LLaVA's main branch: $(took "$started")"
  else
    note "tests with LLaVA's main branch: skipped, LLAVA_MAIN names no checkout of it"
  fi
fi
sed 's/^/== /' "$summary"
exit "$status"
