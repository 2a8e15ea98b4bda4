"""One adapter answers the same in LLaVA, in its forks, and in transformers' own class, wherever it was trained.

Every column runs `everywhere.py` in an environment of its own, over the same weights: LLaVA's folder, or what
`llava-steering export` makes of it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from everywhere import CASES, MODES, Home, run
from safetensors.torch import load_file, save_file
from tiny_llava import TinyLlava
from torch import Tensor

from llava_steering_plugin.components.chat_template import chat_template
from llava_steering_plugin.export.exporting import export
from llava_steering_plugin.export.verification import DIALOGUES, messages_of, prompt_of

TOLERANCE = 1e-5  # of the largest logit, in float32
EFFECT = 100  # times that is what an adapter changes at least
ROOT = Path(__file__).parents[2]
RECORDED = ROOT / "tests/golden/everywhere"
ADAPTERS = [f"{mode}{rest}" for mode in MODES for rest in ("", " with projector")]
WITH_IMAGES = [case for case in CASES if case != "text"]


@dataclass(frozen=True)
class Column:
    """Another home of the same model.

    Attributes:
        python: the interpreter of its environment.
        missing: why it cannot run here; empty if it can.
        path: what comes first on its PYTHONPATH, if anything.
        exported: whether it takes the model as transformers' own class does.
    """

    python: Path
    missing: str
    path: tuple[Path, ...] = ()
    exported: bool = False


def _environment(name: str, option: str, exported: bool = False) -> Column:
    python = Path(f"{os.environ.get('VENV', ROOT / '.venv')}-{name}/bin/python")
    missing = "" if python.is_file() else f"there is no {python}: scripts/setup.sh {option} makes it"
    return Column(python, missing, exported=exported)


def _main() -> Column:
    """LLaVA's main branch, which runs in the environment of the installed LLaVA."""
    named = os.environ.get("LLAVA_MAIN", "")
    missing = "" if named and (Path(named) / "llava").is_dir() else "LLAVA_MAIN names no checkout of it"
    return Column(Path(sys.executable), missing, (Path(named),))


COLUMNS = {
    "transformers": _environment("transformers", "--transformers", exported=True),
    "main": _main(),
    "next": _environment("next", "--next CHECKOUT"),  # which finds the checkout by itself
}


@pytest.fixture(scope="module")
def exported(tiny: TinyLlava, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(str(tiny.llava), tmp_path_factory.mktemp("exported") / "hf", logits=False).folder


@pytest.fixture(scope="module")
def home(tiny: TinyLlava) -> Home:
    """The LLaVA that is installed."""
    return Home(tiny.llava)


@pytest.fixture(scope="module")
def made_here(home: Home, tmp_path_factory: pytest.TempPathFactory) -> tuple[Mapping[str, str], Mapping[str, Tensor]]:
    """The adapters that the installed LLaVA has trained, and its answers with them."""
    folder = tmp_path_factory.mktemp("here")
    folders = {name: str(folder / name.replace(" ", "-")) for name in ADAPTERS}
    return folders, run(home, {}, folders)


@pytest.fixture(scope="module", params=COLUMNS)
def column(
    request: pytest.FixtureRequest,
    tiny: TinyLlava,
    exported: Path,
    made_here: tuple[Mapping[str, str], Mapping[str, Tensor]],
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Mapping[str, str], Mapping[str, Tensor]]:
    """The adapters that the other home has trained, its answers with them, and with those of the installed LLaVA."""
    there = COLUMNS[request.param]
    if there.missing:
        pytest.skip(there.missing)
    folder = tmp_path_factory.mktemp(request.param)
    trained = {name: str(folder / name.replace(" ", "-")) for name in ADAPTERS}
    job, out = folder / "job.json", folder / "answers.safetensors"
    messages = {name: messages_of(dialogue) for name, dialogue in DIALOGUES.items()}
    described = {"ask": made_here[0], "train": trained, "template": template(), "messages": messages}
    job.write_text(json.dumps(described))
    path = [str(each) for each in (*there.path, ROOT, ROOT / "tests/support")]
    model = exported if there.exported else tiny.llava
    done = subprocess.run(
        [there.python, ROOT / "tests/support/everywhere.py", model, job, out],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(path)},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    return trained, load_file(out)


def template() -> str:
    from llava.conversation import conv_templates

    return chat_template(conv_templates["vicuna_v1"])


def compare(one: Mapping[str, Tensor], other: Mapping[str, Tensor], name: str) -> None:
    """Compare two answers of one adapter, in every case; those of the first have its effect beside them."""
    for case in CASES:
        logits, again = (each[f"{name}|{case}|logits"] for each in (one, other))
        assert logits.shape == again.shape
        largest = float(logits.abs().max())
        assert float((logits - again).abs().max()) <= TOLERANCE * largest, (name, case)
        assert torch.equal(one[f"{name}|{case}|tokens"], other[f"{name}|{case}|tokens"]), (name, case)
        if case in WITH_IMAGES:
            plain = one[f"none|{case}|logits"]
            assert float((logits - plain).abs().max()) >= EFFECT * TOLERANCE * largest, (name, case)


def of_this_home(found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the answers with the adapters that a home has trained, and without any."""
    trained = {key.removeprefix("here: "): value for key, value in found.items() if key.startswith("here: ")}
    return trained | {key: value for key, value in found.items() if key.startswith("none|")}


@pytest.mark.slow
@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_of_llava_answers_the_same_there(
    name: str,
    made_here: tuple[Mapping[str, str], Mapping[str, Tensor]],
    column: tuple[Mapping[str, str], Mapping[str, Tensor]],
) -> None:
    compare(of_this_home(made_here[1]), column[1], name)


@pytest.mark.slow
@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_trained_there_answers_the_same_in_llava(
    name: str, home: Home, column: tuple[Mapping[str, str], Mapping[str, Tensor]]
) -> None:
    here = home.answers("none") | home.ask(name, Path(column[0][name]))
    compare(of_this_home(column[1]), here, name)


@pytest.mark.slow
@pytest.mark.parametrize("dialogue", DIALOGUES)
def test_the_chat_template_of_an_adapter_gives_llavas_tokens(
    dialogue: str, tiny: TinyLlava, column: tuple[Mapping[str, str], Mapping[str, Tensor]]
) -> None:
    from llava.conversation import conv_templates
    from llava.mm_utils import tokenizer_image_token
    from transformers import AutoTokenizer

    if (found := column[1].get(f"prompt|{dialogue}")) is None:
        pytest.skip("that is a LLaVA, which takes no chat template")
    tokenizer = AutoTokenizer.from_pretrained(tiny.llava, use_fast=False)
    prompt = prompt_of(conv_templates["vicuna_v1"], DIALOGUES[dialogue], "<image>")
    assert found.tolist() == tokenizer_image_token(prompt, tokenizer)


def test_what_was_recorded_of_the_others_is_what_llava_answers(home: Home) -> None:
    """Logits of each column with adapters that are the same everywhere, also where the column itself is not here."""
    here = home.fixed()
    if record := os.environ.get("RECORD_EVERYWHERE"):  # the answers of a column, as everywhere.py writes them
        found = {key: value for key, value in load_file(record).items() if key in here}
        save_file(found, RECORDED / f"{Path(record).stem}.safetensors")
    recorded = sorted(RECORDED.glob("*.safetensors"))
    assert recorded
    for file in recorded:
        for key, logits in load_file(file).items():
            difference = float((logits - here[key]).abs().max() / logits.abs().max())
            assert difference <= TOLERANCE, (file.stem, key, difference)
