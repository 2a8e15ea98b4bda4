"""`python -m llava_steering_plugin.launch`: what its command line means, what it runs and what it refuses."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from launching import launch

from llava_steering_plugin.launch import LaunchRequest, UsageError, main_block, read_request

PROGRAMS = (
    "train/train train/train_mem eval/model_vqa eval/model_vqa_loader eval/model_vqa_science eval/model_vqa_mmbench "
    "eval/model_qa eval/run_llava serve/cli serve/model_worker serve/controller serve/gradio_web_server"
).split()


class TestCommandLine:
    @pytest.mark.parametrize(
        ("words", "request_"),
        [
            (["a.b"], LaunchRequest("a.b", [])),
            (["a.b", "--x", "1", "--cpu"], LaunchRequest("a.b", ["--x", "1", "--cpu"])),
            (["--cpu", "a.b", "--x"], LaunchRequest("a.b", ["--x"], cpu=True)),
            (["--local_rank=1", "a.b", "--x"], LaunchRequest("a.b", ["--local_rank=1", "--x"])),
            (["--local-rank=1", "--cpu", "a.b"], LaunchRequest("a.b", ["--local-rank=1"], cpu=True)),
            (["--seed", "7", "a.b", "--seed", "8"], LaunchRequest("a.b", ["--seed", "8"], seed=7)),
            (["--cpu", "--seed=0", "a.b"], LaunchRequest("a.b", [], cpu=True, seed=0)),
            (["--same-order", "a.b"], LaunchRequest("a.b", [], same_order=True)),
            (["--measure", "m.json", "a.b"], LaunchRequest("a.b", [], measure="m.json")),
            (["a.b", "--same-order"], LaunchRequest("a.b", ["--same-order"])),
            (["a.b", "--help"], LaunchRequest("a.b", ["--help"])),
            (["a.b", "--", "-x", "--local_rank=1"], LaunchRequest("a.b", ["--", "-x", "--local_rank=1"])),
            (["--help", "a.b"], None),
            (["-h"], None),
        ],
    )
    def test_what_comes_after_the_module_is_the_modules_own_business(self, words: list[str], request_) -> None:
        assert read_request(words) == request_

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            ([], "no MODULE"),
            (["--gpu", "a.b"], "unknown option --gpu before MODULE"),
            (["--se", "1", "a.b"], "unknown option --se before MODULE"),
            (["-x", "a.b"], "unknown option -x before MODULE"),
            (["--cpu"], "no MODULE"),
            (["--seed"], "--seed"),
            (["--seed=x", "a"], "'x'"),
            (["--seed", str(2**64), "a"], "2\\*\\*64 - 1"),
        ],
    )
    def test_wrong_options_are_usage_errors(self, words: list[str], message: str) -> None:
        with pytest.raises(UsageError, match=message):
            read_request(words)

    def test_a_usage_error_prints_the_usage_and_has_status_2(self, tmp_path: Path) -> None:
        done = launch(llava=tmp_path, cwd=tmp_path)
        assert done.returncode == 2
        assert "no MODULE given" in done.stderr and "usage:" in done.stderr and "Traceback" not in done.stderr
        helped = launch("--help", llava=tmp_path, cwd=tmp_path)
        assert helped.returncode == 0 and helped.stdout.startswith("usage:") and "--seed" in helped.stdout


class TestModules:
    """On a llava with nothing in it: what launch runs and refuses does not depend on what the program does."""

    @pytest.fixture
    def llava(self, tmp_path: Path) -> Path:
        package = tmp_path / "llava"
        (package / "eval").mkdir(parents=True)
        (package / "__init__.py").touch()
        (package / "eval" / "ask.py").write_text(
            "import sys\n"
            "def ask():\n"
            "    print(args, __name__, sys.argv)\n"
            'if __name__ == "__main__":\n'
            "    args = sys.argv[1:]\n"
            "    ask()\n"
        )
        (package / "eval" / "library.py").write_text("names = []\n")
        (package / "eval" / "needy.py").write_text(
            "import a_package_that_is_not_there\nif __name__ == '__main__':\n    pass\n"
        )
        return tmp_path

    def test_the_main_block_runs_in_the_module_which_keeps_its_name(self, llava: Path) -> None:
        done = launch("llava.eval.ask", "--x", "1", llava=llava, cwd=llava)
        file = str(llava / "llava" / "eval" / "ask.py")
        assert done.stdout == f"['--x', '1'] llava.eval.ask {[file, '--x', '1']}\n", done.stderr

    @pytest.mark.parametrize("words", [[], ["--same-order"]], ids=["without", "with"])
    def test_the_program_runs_with_same_order_where_that_is_asked_for(self, llava: Path, words: list[str]) -> None:
        (llava / "llava" / "eval" / "ordered.py").write_text(
            "from llava_steering_plugin.training.data.samples import SAME_ORDER\n"
            'if __name__ == "__main__":\n'
            "    print(SAME_ORDER.get())\n"
        )
        done = launch(*words, "llava.eval.ordered", llava=llava, cwd=llava)
        assert done.stdout == f"{bool(words)}\n", done.stderr

    @pytest.mark.parametrize(
        ("module", "message"),
        [
            ("llava.eval.aks", r"no module llava\.eval\.aks .*Did you mean llava\.eval\.ask\?"),
            ("llava.evil.ask", r"no module llava\.evil\.ask"),
            ("llava.eval.library", r'has no `if __name__ == "__main__":` block'),
            ("llava/eval/ask.py", r"is a path.*: llava\.eval\.ask$"),
            ("checkouts/LLaVA/llava/eval/ask.py", r"is a path.*: llava\.eval\.ask$"),
        ],
    )
    def test_what_cannot_run_is_one_clear_message(self, llava: Path, module: str, message: str) -> None:
        done = launch(module, llava=llava, cwd=llava)
        assert done.returncode == 1
        assert "Traceback" not in done.stderr
        assert re.search(message, done.stderr.strip()), done.stderr

    def test_without_any_llava_it_says_how_to_get_one(self, tmp_path: Path) -> None:
        code = (
            "import sys\n"
            "import llava_steering_plugin.launch as launch\n"
            "sys.meta_path = [finder for finder in sys.meta_path if 'Path' not in str(finder)]\n"
            "sys.argv[1:] = ['llava.train.train']\n"
            "launch.main()\n"
        )
        done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, text=True, capture_output=True)
        assert done.returncode == 1
        assert "there is no llava to run" in done.stderr and "Traceback" not in done.stderr

    def test_a_dependency_that_the_program_lacks_keeps_its_traceback(self, llava: Path) -> None:
        done = launch("llava.eval.needy", llava=llava, cwd=llava)
        assert done.returncode == 1
        assert "Traceback" in done.stderr and "a_package_that_is_not_there" in done.stderr


def test_every_program_of_upstream_has_a_main_block_that_launch_finds(pristine_llava: Path) -> None:
    missing = []
    for program in PROGRAMS:
        source = pristine_llava / "llava" / f"{program}.py"
        if source.exists() and main_block(source) is None:
            missing.append(program)
    assert missing == []
