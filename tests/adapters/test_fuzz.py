"""Thousands of mutated adapters: each loads and answers in numbers, or is one AdapterError, and the model stays.

Holds for all of `adapters/` and `pool/` that reads. `support/fuzzing.py` says how to run more, and one again.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import fuzzing
import pytest
import torch
from fuzzing import Checked, Fuzzing
from mutations import KINDS
from tiny_llava import TinyLlava
from torch import nn
from training_runs import subprocess_environment

from llava_steering_plugin.errors import AdapterError

SUPPORT = Path(fuzzing.__file__).parent
COUNT, SEED = int(os.environ.get("FUZZ_COUNT", 128 * len(KINDS))), os.environ.get("FUZZ_SEED", "0")
ONLY = [number] if (number := os.environ.get("FUZZ_ONLY")) else []


@pytest.mark.slow
def test_mutated_adapters_load_and_answer_or_are_refused_and_no_model_changes(
    tiny: TinyLlava, patched_llava: Path, tmp_path: Path, record_property: Any
) -> None:
    environment = subprocess_environment(patched_llava)
    environment["PYTHONPATH"] += f"{os.pathsep}{SUPPORT}{os.pathsep}{SUPPORT.parents[1]}"
    words = [str(tiny.llava), str(tmp_path), str(COUNT), SEED, *ONLY]
    done = subprocess.run(
        [sys.executable, SUPPORT / "fuzzing.py", *words], env=environment, capture_output=True, text=True, check=False
    )
    record_property("counts", done.stdout[max(done.stdout.find("| kind"), 0) :])  # libraries print, too
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr[-3000:]}\nAgain: FUZZ_SEED={SEED} FUZZ_ONLY=NUMBER"
    tried = {kind: int(count) for kind, count in re.findall(r"^\| ([\w' ]+) \| +(\d+) \|", done.stdout, re.M)}
    if not ONLY:
        assert tried.keys() == {*KINDS, "all"} and tried["all"] == COUNT
        assert min(tried.values()) >= min(120, COUNT // len(KINDS))
        assert tried["bytes of tensors"] <= COUNT / 4


class Small(nn.Module):
    """Stands for a model in `fuzzing.state_of`."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.lm_head = nn.Embedding(2, 2), nn.Linear(2, 2)
        self.vocab_size, self.config = 2, self

    def to_dict(self) -> dict[str, Any]:
        return {}

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embedding

    def get_added_vocab(self) -> dict[str, int]:
        return {}

    def __len__(self) -> int:
        return 2


def refuse(message: str) -> None:
    raise AdapterError(message)


def wait_for_ever(model: Small) -> None:
    os.read(os.pipe()[0], 1)


WRONG: dict[str, tuple[Any, str]] = {
    "fine": (lambda model: None, "loaded"),
    "refusal": (lambda model: refuse("no"), "refused"),
    "a long refusal": (lambda model: refuse("no" * 20_000), "foreign error"),
    "another error": (lambda model: {}["conversation"], "foreign error"),
    "too much memory": (lambda model: bytearray(2**30), "foreign error"),
    "a value": (lambda model: model.lm_head.bias.data.add_(1), "changed model"),
    "a value, and refused": (lambda model: (model.lm_head.bias.data.add_(1), refuse("no")), "changed model"),
    "a hook": (lambda model: model.register_forward_hook(lambda *given: None), "changed model"),
    "hanging": (wait_for_ever, "killed"),
    "crash": (lambda model: os.kill(os.getpid(), 9), "killed"),
    "numbers": (lambda model: torch.tensor(torch.nan), "not finite"),
}


def test_the_fuzzing_sees_whatever_goes_wrong_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzzing, "PATIENCE", 1.0)
    monkeypatch.setattr(fuzzing, "mutate", lambda source, folder, seed, number: folder.write_text(str(number)))
    model: Any = Small()

    def load(folder: Path) -> Any:
        found = list(WRONG.values())[int(folder.read_text())][0](model)
        return lambda: found if isinstance(found, torch.Tensor) and not found.dim() else torch.zeros(1), lambda: None

    run = Fuzzing([tmp_path], {"door": Checked(model, model, load)}, tmp_path, 0, {}, [])
    run.run(list(range(len(WRONG))))
    seen = {number: result for number, kind in enumerate(KINDS) for _, result in run.counts.get(kind, ())}
    assert [seen[number] for number in range(len(WRONG))] == [expected for _, expected in WRONG.values()]
    assert len(run.failures) == len(WRONG) - 2
    assert "mutation 8 of seed 0" in run.failures[6] and "SIGALRM" in run.failures[6]
