"""Imports that are put off or left out: torch's compiler until an operator of bitsandbytes is called, scikit-learn."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from training_runs import subprocess_environment

from llava_steering_plugin.lazy_imports import compiled_on_first_call, without_glue_metrics

pytest.importorskip("bitsandbytes")


def in_a_fresh_python(code: str, folder: Path) -> Any:
    """Return what the code assigns to `said`, through JSON."""
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport json; print('SAID', json.dumps(said))"],
        cwd=folder,
        env=subprocess_environment(folder),
        text=True,
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.split("SAID")[1])


def test_bitsandbytes_loads_no_compiler_and_leaves_torch_compile_as_it_was(tmp_path: Path) -> None:
    said = in_a_fresh_python(
        """
from llava_steering_plugin.lazy_imports import defer_compilation
import sys
defer_compilation()
defer_compilation()
lazy = sorted({"torch", "bitsandbytes"} & set(sys.modules))
import torch
before = torch.compile
import bitsandbytes
said = [lazy, sorted({"torch._dynamo", "torch._inductor.compile_fx"} & set(sys.modules)), torch.compile is before,
        bitsandbytes.__file__ == bitsandbytes.__spec__.origin]
""",
        tmp_path,
    )

    assert said == [[], [], True, True]


def test_its_operators_are_compiled_when_they_are_first_called_and_give_the_same_numbers(tmp_path: Path) -> None:
    said = in_a_fresh_python(
        """
from llava_steering_plugin.lazy_imports import defer_compilation
defer_compilation()
import torch
from bitsandbytes.backends.default import ops
from bitsandbytes.backends.utils import _get_4bit_code

graphs = []
# In place of Inductor, which would call a C++ compiler: Dynamo traces as ever, and the graph runs as it is.
torch.compiler.set_default_backend(lambda graph, inputs: graphs.append(graph) or graph.forward)

def compiled_and_plain(operator, *inputs):
    before = len(graphs)
    outputs = [operator(*inputs).tolist() for _ in range(2)]
    return [*outputs, operator.__wrapped__(*inputs).tolist(), len(graphs) - before]

bytes_ = torch.randint(0, 256, (4800,), dtype=torch.uint8)
packed, absmax = torch.ops.bitsandbytes.quantize_4bit(torch.randn(96, 50), 64, "nf4", torch.uint8)
nf4 = _get_4bit_code("nf4", "cpu")
before = len(graphs)
said = [
    before,
    compiled_and_plain(
        ops._dequantize_blockwise_compute, bytes_, torch.rand(75), torch.linspace(-1, 1, 256), 64, torch.float32
    ),
    compiled_and_plain(ops._dequantize_4bit_compute, packed.reshape(-1), absmax, nf4, 64, (96, 50), torch.float32),
]
""",
        tmp_path,
    )

    before, *operators = said
    assert before == 0
    for first, second, plain, graphs in operators:
        assert first == second == plain
        assert graphs == 1


def test_a_failed_import_leaves_torch_compile_as_it_was() -> None:
    before = torch.compile

    with pytest.raises(ImportError), compiled_on_first_call("somewhere"):
        assert torch.compile is not before
        raise ImportError

    assert torch.compile is before


def test_functions_of_the_package_are_compiled_once_by_their_first_call(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[tuple[Any, dict[str, Any]]] = []

    def compile(model: Any, **options: Any) -> Any:
        compiled.append((model, options))
        return model

    monkeypatch.setattr(torch, "compile", compile)

    def double(x: int) -> int:
        """Twice x."""
        return 2 * x

    def treble(x: int) -> int:
        return 3 * x

    with compiled_on_first_call(__name__):
        bare, with_options = torch.compile(double), torch.compile(dynamic=False)(treble)

    assert compiled == []
    assert [bare(1), bare(2), with_options(1), with_options(2)] == [2, 4, 3, 6]
    assert compiled == [(double, {}), (treble, {"dynamic": False})]
    assert (bare.__name__, bare.__doc__, bare.__wrapped__) == ("double", "Twice x.", double)


def test_what_others_compile_meanwhile_is_compiled_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[Any] = []
    monkeypatch.setattr(torch, "compile", lambda model, **options: compiled.append(model) or model)

    def theirs() -> None:
        pass

    module = torch.nn.Linear(1, 1)
    with compiled_on_first_call("torch"):
        torch.compile(theirs)
        torch.compile(module)

    assert compiled == [theirs, module]


@pytest.fixture
def nothing_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] in ("sklearn", "transformers")]:
        monkeypatch.delitem(sys.modules, name)


def test_scikit_learn_is_hidden_inside_the_block_only(nothing_imported: None) -> None:
    assert importlib.util.find_spec("sklearn") is not None
    with without_glue_metrics():
        assert importlib.util.find_spec("sklearn") is None
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module("sklearn")
    assert importlib.util.find_spec("sklearn") is not None


@pytest.mark.parametrize("name", ["sklearn", "transformers"])
def test_a_scikit_learn_that_somebody_counts_on_stays(
    nothing_imported: None, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    there = ModuleType(name)
    monkeypatch.setitem(sys.modules, name, there)

    with without_glue_metrics():
        assert importlib.import_module(name) is there
        assert name == "sklearn" or importlib.util.find_spec("sklearn") is not None
    assert sys.modules[name] is there


def test_llavas_training_is_imported_after_transformers_too(patched_llava: Path) -> None:
    said = in_a_fresh_python(
        """
import sys, transformers
from llava_steering_plugin.lazy_imports import without_glue_metrics
with without_glue_metrics():
    import llava.train.train
said = "sklearn.metrics" in sys.modules
""",
        patched_llava,
    )

    assert said
