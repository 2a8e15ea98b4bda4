"""What every test shares: which llava, the tiny LLaVA, and the same numbers on every run.

Tests never touch the llava they are given. They work on two copies of its package, one as it is and one with the block
that `llava-steering patch` adds; the patched copy is what `import llava` finds in this process.
"""

from __future__ import annotations

import functools
import gc
import importlib.util
import os
import random
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from tiny_llava import TinyLlava, build

from llava_steering_plugin.checkout.find import find_llava
from llava_steering_plugin.checkout.patch import patch, unpatch
from llava_steering_plugin.errors import UpstreamError
from llava_steering_plugin.lazy_imports import defer_compilation
from llava_steering_plugin.serving.proxies import bypassing

if TYPE_CHECKING:
    from asking import Asker

OFFLINE_AND_REPRODUCIBLE = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "WANDB_DISABLED": "true",
    "OMP_NUM_THREADS": "1",  # also what makes sums come out the same from run to run
}
# Minutes each; of the others most take seconds.
LONGEST = {
    "test_benchmark_mixlora.py",
    "test_all_combinations.py",
    "test_crashes.py",
    "test_deepspeed.py",
    "test_mixlora_learning.py",
    "test_quick_experiments.py",
    "test_soak.py",
    "test_unchanged.py",
}
# Here rather than in a hook: a folder's own conftest may import torch before any hook runs.
os.environ.update(OFFLINE_AND_REPRODUCIBLE | bypassing(os.environ))  # the tests' own clients call servers here


@dataclass(frozen=True)
class LlavaCopies:
    """Folders that each hold a llava package; put one first on the path to import it."""

    source: Path
    pristine: Path
    patched: Path


LLAVA = pytest.StashKey[LlavaCopies]()
SCRATCH = pytest.StashKey[Path]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--llava-path",
        metavar="DIR",
        help="the LLaVA checkout to test against, any fork or version (default: the installed llava)",
    )


def pytest_configure(config: pytest.Config) -> None:
    defer_compilation()  # as this package's own programs do: the compiler takes seconds to import
    try:
        source = _llava_to_test(config.getoption("--llava-path"))
        if source is None:
            return
        scratch = config.stash[SCRATCH] = Path(tempfile.mkdtemp(prefix="llava-copies-"))
        copies = LlavaCopies(source, scratch / "pristine", scratch / "patched")
        for folder in (copies.pristine, copies.patched):
            _copy_package(source, folder / "llava")
            unpatch(find_llava(folder))  # the source may be in use, and patched
        patch(find_llava(copies.patched))
    except UpstreamError as error:
        raise pytest.UsageError(str(error)) from error
    config.stash[LLAVA] = copies
    sys.path.insert(0, str(copies.patched))


def pytest_unconfigure(config: pytest.Config) -> None:
    if (scratch := config.stash.get(SCRATCH, None)) is not None:
        shutil.rmtree(scratch, ignore_errors=True)


def pytest_report_header(config: pytest.Config) -> str:
    copies = config.stash.get(LLAVA, None)
    return f"llava: copies of {copies.source}" if copies else "llava: none installed and no --llava-path"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print what tests have counted, also in xdist's processes: they `record_property("counts", TEXT)`."""
    for report in (*terminalreporter.getreports("passed"), *terminalreporter.getreports("failed")):
        for name, text in getattr(report, "user_properties", ()):
            if name == "counts":
                terminalreporter.write_line(f"{report.nodeid}\n{text}")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if hasattr(config, "workerinput"):  # one of xdist's processes: the longest files first, or one waits for the other
        slow = {item.path for item in items if item.get_closest_marker("slow")}
        items.sort(key=lambda item: (item.path not in slow, item.path.name not in LONGEST))
    gpu_tests = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_tests:
        return
    import torch

    if not torch.cuda.is_available():
        for item in gpu_tests:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def _llava_to_test(checkout: str | None) -> Path | None:
    if checkout is None and importlib.util.find_spec("llava") is None:
        return None
    return find_llava(Path(checkout).resolve() if checkout is not None else None).package


def _copy_package(source: Path, target: Path) -> None:
    for file in source.rglob("*"):
        if file.is_file() and "__pycache__" not in file.parts:
            copy = target / file.relative_to(source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, copy)  # without its mode: the source may be read-only


@pytest.fixture(scope="session")
def llava_copies(pytestconfig: pytest.Config) -> LlavaCopies:
    copies = pytestconfig.stash.get(LLAVA, None)
    if copies is None:
        pytest.skip("no llava is installed and --llava-path is not given")
    return copies


@pytest.fixture(scope="session")
def pristine_llava(llava_copies: LlavaCopies) -> Path:
    """A folder with an unpatched copy of the llava package, for the path of a child process."""
    return llava_copies.pristine


@pytest.fixture(scope="session")
def patched_llava(llava_copies: LlavaCopies) -> Path:
    """A folder with a patched copy of the llava package; the one that `import llava` finds here, too."""
    return llava_copies.patched


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyLlava:
    """The tiny LLaVA on disk, shared by all tests: read it, never write to it."""
    return build(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def ask(tiny: TinyLlava, patched_llava: Path) -> Asker:
    """The Python API in this process, which says what every program has to answer."""
    from asking import Asker

    return Asker(tiny.images)


@pytest.fixture(scope="module", autouse=True)
def no_garbage_is_looked_for_in_what_stays() -> None:
    """Take modules and shared models out of the garbage collector's sight.

    accelerate collects at the start of every training: half of what a tiny one took went through imported modules.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def gpus_stay_visible() -> Iterator[None]:
    """Programs that run in this process with --device cpu hide them; later tests may need them."""
    before = os.environ.get("CUDA_VISIBLE_DEVICES")
    yield
    os.environ.pop("CUDA_VISIBLE_DEVICES", None)
    if before is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = before


@pytest.fixture(autouse=True)
def same_random_numbers() -> None:
    """Every test starts from the same seeds; torch is not imported for it."""
    random.seed(0)
    if "torch" in sys.modules:
        import torch

        torch.manual_seed(0)
    if "numpy" in sys.modules:
        import numpy

        numpy.random.seed(0)


@functools.cache
def initialisers() -> dict[type, Callable[..., None]]:
    """Return how torch gives layers their first values; what is asked for first is kept."""
    from torch import nn

    return {layer: layer.reset_parameters for layer in (nn.Linear, nn.LayerNorm)}


@pytest.fixture(autouse=True)
def layers_get_their_first_values() -> Iterator[None]:
    """LLaVA's programs switch that off for the whole process: layers of later tests would hold what lies in memory."""
    if "torch" in sys.modules:
        initialisers()
    yield
    if "torch" in sys.modules:
        for layer, reset in initialisers().items():
            layer.reset_parameters = reset


@pytest.fixture(autouse=True)
def no_state_stays() -> Iterator[None]:
    """No test leaves this process without gradients, or with the DeepSpeed config of a training that was refused."""
    yield
    if deepspeed := sys.modules.get("transformers.integrations.deepspeed"):
        deepspeed.unset_hf_deepspeed_config()
    if "torch" in sys.modules:
        import torch

        left = torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_default_dtype()
        torch.set_grad_enabled(True)
        torch.set_default_dtype(torch.float32)
        assert left == (True, False, torch.float32), "gradients, inference mode, default dtype"
