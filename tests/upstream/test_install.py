"""What `import llava` triggers, and the programs of LLaVA that hooks cannot reach (`upstream/startup.py`)."""

from __future__ import annotations

from pathlib import Path

import pytest
from forks import Forks
from small_checkout import make_checkout, run_python
from training_runs import subprocess_environment

from llava_steering_plugin.checkout.find import find_llava
from llava_steering_plugin.checkout.patch import patch
from llava_steering_plugin.upstream import startup

pytest_plugins = ["fork_fixtures"]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    root = make_checkout(tmp_path / "LLaVA")
    patch(find_llava(root))
    return root


def test_installing_imports_neither_torch_nor_llava_and_twice_is_once(tmp_path: Path) -> None:
    code = (
        "import sys, wrapt.importer\n"
        "from llava_steering_plugin.upstream.install import HOOKS, install\n"
        "install(); install()\n"
        "registered = wrapt.importer._post_import_hooks\n"
        "print({name: len(registered[name]) for name in HOOKS})\n"
        "print(sorted({'torch', 'transformers', 'llava'} & set(sys.modules)))\n"
    )
    done = run_python("-c", code, path=[], cwd=tmp_path)
    hooks, imported = done.stdout.splitlines()
    names = "conversation", "model.llava_arch", "train.train", "model.builder", "mm_utils"
    expected = dict.fromkeys([*(f"llava.{name}" for name in names), "transformers.trainer"], 1)
    assert hooks == str(expected), done.stderr
    assert imported == "[]"


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("python train.py --a 1", ("train.py", False, ("--a", "1"))),
        ("python -u -m llava.train.train --a 1", ("llava.train.train", True, ("--a", "1"))),
        ("python -um llava.train.train -m x", ("llava.train.train", True, ("-m", "x"))),
        ("python -mllava.train.train", ("llava.train.train", True, ())),
        ("python -X dev -W error -Wignore -OO train.py", ("train.py", False, ())),
        ("python --check-hash-based-pycs always train.py", ("train.py", False, ())),
        ("python -c code train.py", None),
        ("python -", None),
        ("python -i", None),
        ("python", None),
    ],
)
def test_the_program_is_found_past_the_interpreters_own_options(command: str, expected: tuple | None) -> None:
    start = startup.read_start(command.split())
    assert (start and (start.program, start.is_module, start.arguments)) == expected


STARTS = {
    "a script": ["llava/train/train.py"],
    "a module": ["-m", "llava.train.train"],
    "under a launcher": ["-u", "llava/train/train.py", "--local_rank=0"],
}


@pytest.mark.parametrize("start", STARTS.values(), ids=STARTS)
@pytest.mark.parametrize(
    "flag",
    [["--tuning_mode", "mores"], ["--tuning_mode=mores"], ["--adapter_path", "pets"]],
    ids=["apart", "joined", "an adapter"],
)
def test_train_py_as_the_main_program_stops_with_the_command_that_works(
    checkout: Path, start: list[str], flag: list[str]
) -> None:
    flags = ["--output_dir", "my runs/pets", *flag]
    done = run_python(*start, *flags, path=[checkout], cwd=checkout)
    assert done.returncode == 1
    assert "ran" not in done.stdout and "Traceback" not in done.stderr
    assert done.stderr.startswith(f"{flag[0].partition('=')[0]} has no effect here")
    command = f"python -m llava_steering_plugin.launch llava.train.train --output_dir 'my runs/pets' {' '.join(flag)}"
    assert command in done.stderr


def test_train_py_run_from_its_own_folder_is_recognised(checkout: Path) -> None:
    folder = checkout / "llava" / "train"
    done = run_python("train.py", "--tuning_mode", "mores", path=[checkout], cwd=folder)
    assert done.returncode == 1
    assert "llava_steering_plugin.launch" in done.stderr


@pytest.mark.parametrize("start", STARTS.values(), ids=STARTS)
def test_train_py_as_the_main_program_without_a_mode_runs_as_ever(checkout: Path, start: list[str]) -> None:
    done = run_python(*start, "--lora_enable", "True", path=[checkout], cwd=checkout)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("ran __main__")


def test_upstreams_own_train_py_as_a_script_stops_too(
    library_forks: Forks, patched_llava: Path, tmp_path: Path
) -> None:
    environment = subprocess_environment(patched_llava)
    script = str(patched_llava / "llava" / "train" / "train.py")
    done = library_forks.run(script, "--tuning_mode", "mores", cwd=tmp_path, env=environment)
    assert done.returncode == 1
    assert "python -m llava_steering_plugin.launch llava.train.train --tuning_mode mores" in done.stderr


@pytest.mark.parametrize(
    "arguments",
    [["--model-path", "MODEL"], ["--model-path=MODEL"], []],
    ids=["apart", "joined", "no model path"],
)
def test_a_model_worker_of_something_else_than_an_adapter_keeps_its_arguments(
    checkout: Path, tmp_path: Path, arguments: list[str]
) -> None:
    (tmp_path / "model").mkdir()
    arguments = [word.replace("MODEL", str(tmp_path / "model")) for word in arguments]
    done = run_python("-m", "llava.serve.model_worker", *arguments, path=[checkout], cwd=tmp_path)
    assert done.stdout == f"ran __main__ {arguments}\n", done.stderr


def test_a_damaged_adapter_stops_the_model_worker_without_a_traceback(checkout: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "pets"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"peft_type": "LLAVA_MORES"}')
    (adapter / "adapter_model.safetensors").write_bytes(b"cut short")
    done = run_python("-m", "llava.serve.model_worker", "--model-path", str(adapter), path=[checkout], cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("AdapterError: ") and "Traceback" not in done.stderr


def test_a_name_given_by_the_user_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    argv = ["worker", "--model-path", "anything", "--model-name", "mine"]
    startup.append_model_name(argv)
    assert argv == ["worker", "--model-path", "anything", "--model-name", "mine"]


def test_a_broken_hook_surfaces_as_itself_and_not_as_a_puzzle_of_llavas_own_making(
    library_forks: Forks, patched_llava: Path, tmp_path: Path
) -> None:
    # llava/model/__init__.py has a bare `except: pass`; a hook that ran below it would vanish there.
    code = (
        "import sys, llava_steering_plugin.upstream.install as ours\n"
        "ours.HOOKS = {'llava.mm_utils': 'no_such_plugin_module:hook'}\n"
        "import llava\n"
    )
    done = library_forks.run("-c", code, cwd=tmp_path, env=subprocess_environment(patched_llava))
    assert done.returncode != 0
    assert "llava plugin 'steering'" in done.stderr and "no_such_plugin_module" in done.stderr
