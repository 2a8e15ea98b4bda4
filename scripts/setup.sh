#!/usr/bin/env bash
# Makes .venv with LLaVA, this project and everything that its tests and its demo need. Safe to run again: it does
# nothing when nothing has changed. Needs Python 3.11, git, gcc and pip; g++ (for DeepSpeed's compiled op) comes from apt
# if it is missing.
#
#   scripts/setup.sh              what the demo needs, and all tests but one
#   scripts/setup.sh --browser    also a headless Chromium, from apt, for the test of the web page
#   scripts/setup.sh --lmms-eval  also .venv-lmms-eval: lmms-eval in an environment of its own, over .venv
#   scripts/setup.sh --transformers  also .venv-transformers: this project beside transformers 5, without LLaVA
#   scripts/setup.sh --newer-transformers  also .venv-newer: the newest transformers that LLaVA trains in, over .venv
#   scripts/setup.sh --vllm       also .venv-vllm: this project beside vLLM for the CPU, without LLaVA
#   scripts/setup.sh --next CHECKOUT  also .venv-next: this project beside LLaVA-NeXT, which stays where and as it is
#
# Environment:
#   PYTHON  the interpreter to start from           (default: python3.11, else python3)
#   VENV    where the virtual environment goes      (default: .venv beside this project's setup.cfg; the others have
#                                                    its name with -lmms-eval, -transformers, -vllm or such behind it)
#   TORCH   the torch to install                    (default: the CPU build of scripts/constraints-cpu.txt;
#                                                    on a machine with a GPU: TORCH=torch==2.13.0)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

browser=
lmms_eval=
newer=
apart=()  # environments that know nothing of .venv
next=
while [ $# != 0 ]; do
  case "$1" in
    --browser) browser=yes ;;
    --lmms-eval) lmms_eval=yes ;;
    --transformers | --vllm) apart+=("${1#--}") ;;
    --newer-transformers) newer=yes ;;
    --next)
      [ -f "${2:-}/llava/__init__.py" ] && [ -d "$2/trl" ] ||
        { printf 'setup: --next needs the folder of a LLaVA-NeXT checkout, with llava and trl in it: --next CHECKOUT\n' >&2; exit 2; }
      next=$(cd "$2" && pwd)
      shift ;;
    *)
      printf 'setup: unknown option %s; there are --browser, --lmms-eval, --transformers, --newer-transformers, --vllm,' "$1" >&2
      printf ' and --next CHECKOUT\n' >&2
      exit 2 ;;
  esac
  shift
done

venv=${VENV:-.venv}
constraints=scripts/constraints-cpu.txt
towers=scripts/constraints-towers-cpu.txt
llava=llava-torch==1.2.2.post1
torch=${TORCH:-$(grep '^torch==' "$constraints")}

step() { printf '== %s\n' "$*" >&2; }
die() { printf 'setup: %s\n' "$*" >&2; exit 1; }

python=${PYTHON:-$(command -v python3.11 || command -v python3 || true)}
[ -n "$python" ] || die "no python3.11 found; install it, or name one with PYTHON=/path/to/python3.11"
version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])') || die "$python does not run"
[ "$version" = 3.11 ] || die "$python is Python $version; the constraint set is for 3.11. Name one with PYTHON=/path/to/python3.11"

if command -v flock >/dev/null; then  # the demo and the tests may be started side by side
  exec 9<"$constraints"
  flock 9
fi

as_root() { if [ "$(id -u)" = 0 ]; then "$@"; else sudo -n "$@"; fi; }
apt_install() {
  as_root apt-get update -qq >/dev/null &&
    as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@" >/dev/null
}

if [ -n "$browser" ] && ! command -v chromium-headless-shell chromium google-chrome >/dev/null; then
  step "headless Chromium (apt)"
  apt_install chromium-headless-shell || apt_install chromium ||
    step "no Chromium and no way to install it: the test of the web page will be skipped. If apt has none (Ubuntu)," \
      "$venv/bin/playwright install --with-deps chromium-headless-shell fetches one"
fi

# An environment over .venv: it sees all that is there, and what it has itself comes first. .venv stays as it is, so
# nothing that is installed here can change a test of the others.
#   set_up_over NAME ENVIRONMENT PINS STATEMENTS: the statements have to run in it; importing also compiles.
set_up_over() {
  local name=$1 own=$2 pins=$3 statements=$4 made started=$SECONDS
  made=$(cat "$pins" "$venv/.setup.stamp" scripts/setup.sh | sha256sum | cut -d' ' -f1)
  if [ "$(cat "$own/.setup.stamp" 2>/dev/null)" = "$made" ] && [ -x "$own/bin/python" ]; then return; fi
  step "$name in $own"
  "$venv/bin/python" -m venv --clear --without-pip "$own"
  # addsitedir: a path alone would leave out the .pth files there, by which this project is found.
  printf 'import site; site.addsitedir(%s)\n' "'$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')'" \
    >"$("$own/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/below.pth"
  "$venv/bin/python" -m pip --disable-pip-version-check --python "$own/bin/python" install --no-compile --no-deps \
    -r "$pins" >"$own/.setup.log" 2>&1 || { tail -n 20 "$own/.setup.log" >&2; die "failed: $name"; }
  (cd "$own" && env -u PYTHONDONTWRITEBYTECODE bin/python -c "$statements") >"$own/.setup.log" 2>&1 ||
    { tail -n 5 "$own/.setup.log" >&2; die "$name does not work in $own"; }
  printf '%s' "$made" >"$own/.setup.stamp"
  step "$name is ready in $((SECONDS - started)) s: $own"
}
set_up_lmms_eval() {  # its list of models must hold ours
  set_up_over lmms-eval "$venv-lmms-eval" scripts/constraints-lmms-eval.txt \
    'import lmms_eval.__main__, lmms_eval.models; lmms_eval.models.get_model_manifest("llava_steering")'
}
set_up_newer() {
  set_up_over "the newest transformers that LLaVA trains in" "$venv-newer" scripts/constraints-newer-cpu.txt \
    'import llava.train.train'
}

# An environment that knows nothing of .venv: in it this project must do without LLaVA and its pins. $1: transformers or
# vllm, whose pins are complete.
set_up_apart() {
  local own="$venv-$1" pins="scripts/constraints-$1-cpu.txt" made started=$SECONDS
  made=$(cat "$pins" setup.cfg pyproject.toml scripts/setup.sh | sha256sum | cut -d' ' -f1)-$(pwd)
  if [ "$(cat "$own/.setup.stamp" 2>/dev/null)" = "$made" ] && "$own/bin/python" -c 'import llava_steering_plugin' 2>/dev/null; then
    return
  fi
  step "$1 in $own"
  "$python" -m venv --clear --without-pip "$own"
  into_it() {
    "$venv/bin/python" -m pip --disable-pip-version-check --python "$own/bin/python" install --no-compile --no-deps "$@" \
      >"$own/.setup.log" 2>&1
  }
  grep -v -e '^#' -e '^deepspeed==' "$pins" >"$own/.setup.packages"
  into_it -r "$own/.setup.packages" ||
    into_it --extra-index-url https://download.pytorch.org/whl/cpu -r "$own/.setup.packages" ||
    { tail -n 20 "$own/.setup.log" >&2; die "failed: $1"; }
  if grep -q '^deepspeed==' "$pins"; then
    into_it --no-build-isolation "$(grep '^deepspeed==' "$pins")" || { tail -n 20 "$own/.setup.log" >&2; die "failed: deepspeed"; }
  fi
  into_it --no-build-isolation -e . || { tail -n 20 "$own/.setup.log" >&2; die "failed: this project"; }
  printf '%s' "$made" >"$own/.setup.stamp"
  step "$1 is ready in $((SECONDS - started)) s: $own"
}

# An environment that finds llava and trl in a checkout of LLaVA-NeXT. Nothing is written into the checkout.
set_up_next() {
  local own="$venv-next" pins=scripts/constraints-next-cpu.txt made started=$SECONDS
  made=$(cat "$pins" setup.cfg pyproject.toml scripts/setup.sh | sha256sum | cut -d' ' -f1)-$(pwd)-$next
  if [ "$(cat "$own/.setup.stamp" 2>/dev/null)" = "$made" ] && "$own/bin/python" -c 'import llava_steering_plugin' 2>/dev/null; then
    return
  fi
  step "LLaVA-NeXT's packages in $own"
  "$python" -m venv --clear --without-pip "$own"
  into_next() {
    "$venv/bin/python" -m pip --disable-pip-version-check --python "$own/bin/python" install --no-compile --no-deps "$@" \
      >"$own/.setup.log" 2>&1
  }
  grep -v -e '^#' -e '^deepspeed==' "$pins" >"$own/.setup.packages"
  into_next -r "$own/.setup.packages" ||
    into_next --extra-index-url https://download.pytorch.org/whl/cpu -r "$own/.setup.packages" ||
    { tail -n 20 "$own/.setup.log" >&2; die "failed: LLaVA-NeXT's packages"; }
  into_next --no-build-isolation "$(grep '^deepspeed==' "$pins")" || { tail -n 20 "$own/.setup.log" >&2; die "failed: deepspeed"; }
  into_next --no-build-isolation -e . || { tail -n 20 "$own/.setup.log" >&2; die "failed: this project"; }
  printf '%s\n' "$next" >"$("$own/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/llava-next.pth"
  # On import it asks the hub for a tokenizer of Llama 3, and does without; offline it does not wait for that.
  (cd "$own" && env -u PYTHONDONTWRITEBYTECODE HF_HUB_OFFLINE=1 bin/python -c 'import llava.train.train') >"$own/.setup.log" 2>&1 ||
    { tail -n 5 "$own/.setup.log" >&2; die "llava.train.train of $next cannot be imported"; }
  printf '%s' "$made" >"$own/.setup.stamp"
  step "LLaVA-NeXT is ready in $((SECONDS - started)) s: $own; $own/bin/llava-steering doctor says what works"
}

stamp=$(cat "$constraints" "$towers" setup.cfg pyproject.toml scripts/setup.sh | sha256sum | cut -d' ' -f1)-$torch-$(pwd)
if [ "$(cat "$venv/.setup.stamp" 2>/dev/null)" = "$stamp" ] && "$venv/bin/python" -c 'import llava_steering_plugin' 2>/dev/null; then
  "$venv/bin/llava-steering" patch >/dev/null
  if [ -n "$lmms_eval" ]; then set_up_lmms_eval; fi
  if [ -n "$newer" ]; then set_up_newer; fi
  for each in ${apart[@]+"${apart[@]}"}; do set_up_apart "$each"; done
  if [ -n "$next" ]; then set_up_next; fi
  exit 0
fi
rm -f "$venv/.setup.stamp"
started=$SECONDS

if ! command -v g++ >/dev/null; then
  step "g++ (apt)"
  apt_install g++ ||
    step "no g++ and no way to install it: DeepSpeed on the CPU will not work, everything else will"
fi

if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
  step "virtual environment in $venv"
  # Debian ships Python without ensurepip unless python3-venv is installed; the pip outside can fill the environment too.
  "$python" -m venv --clear "$venv" >/dev/null 2>&1 || {
    "$python" -m venv --clear --without-pip "$venv"
    "$python" -m pip --python "$venv/bin/python" install -q pip
  }
fi
pip_install() {  # two modules of three are never imported: the others are compiled below, by importing them
  "$venv/bin/python" -m pip --disable-pip-version-check install --no-compile "$@" >"$venv/.setup.log" 2>&1
}
shown() { "$@" || { tail -n 20 "$venv/.setup.log" >&2; die "failed: $*"; }; }

step "torch"
if [ -n "${TORCH:-}" ]; then
  # For pip, torch==2.13.0 is there when 2.13.0+cpu is.
  "$venv/bin/python" -c 'import importlib.metadata as m; raise SystemExit("+cpu" not in m.version("torch"))' 2>/dev/null &&
    "$venv/bin/python" -m pip uninstall -q -y torch
  shown pip_install "$torch"  # with its CUDA libraries
else  # the CPU build is where this pip is set up to look, or in PyTorch's own index
  pip_install --no-deps "$torch" ||
    shown pip_install --no-deps --extra-index-url https://download.pytorch.org/whl/cpu "$torch"
fi
step "packages"
# The set is complete, so nothing is resolved: --no-deps is faster, and exact.
grep -v -e '^#' -e '^torch==' -e '^deepspeed==' "$constraints" >"$venv/.setup.packages"
shown pip_install --no-deps -r "$venv/.setup.packages"
step "timm, beside the others"
shown pip_install --no-deps --upgrade --target "$venv/towers" -r "$towers"
step "deepspeed (built here)"
shown pip_install --no-deps --no-build-isolation "$(grep '^deepspeed==' "$constraints")"
step "llava and this project"
shown pip_install --no-deps "$llava"
shown pip_install --no-deps --no-build-isolation -e .
"$venv/bin/llava-steering" patch >&2
step "bytecode of what every program imports"
# PYTHONDONTWRITEBYTECODE, which many container images set, would have every start compile 5,000 files again: it takes three
# times as long. And what cannot be imported is found here.
(cd "$venv" && env -u PYTHONDONTWRITEBYTECODE bin/python -c 'import llava.train.train, gradio, uvicorn') \
  >"$venv/.setup.log" 2>&1 || { tail -n 20 "$venv/.setup.log" >&2; die "llava.train.train cannot be imported"; }
printf '%s' "$stamp" >"$venv/.setup.stamp"
step "ready in $((SECONDS - started)) s: $venv"
if [ -n "$lmms_eval" ]; then set_up_lmms_eval; fi
if [ -n "$newer" ]; then set_up_newer; fi
for each in ${apart[@]+"${apart[@]}"}; do set_up_apart "$each"; done
if [ -n "$next" ]; then set_up_next; fi
