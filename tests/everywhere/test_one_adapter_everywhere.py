"""One adapter answers the same in LLaVA, in its forks, and in transformers' own class, wherever it was trained.

Every column runs `everywhere.py` in an environment of its own, over the same weights: LLaVA's folder, or what
`llava-steering export` makes of it.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from columns import ADAPTERS, COLUMNS, EFFECT, ROOT, TOLERANCE, of_this_home, template
from everywhere import CASES, Home, Sight, run
from safetensors.torch import load_file, save_file
from tiny_llava import TinyLlava
from torch import Tensor

from llava_steering_plugin.export.exporting import export
from llava_steering_plugin.export.verification import DIALOGUES, messages_of, picture, prompt_of

# Pillow 13 shrinks pictures that are more than twice as high as wide otherwise than Pillow 10: of 255, in CLIP's scale.
LEVELS, DEVIATION = 2, 0.26130258
RECORDED = ROOT / "tests/golden/everywhere"
CUTS = ("pad", "square")  # LLaVA's names: padded to a square, and cropped to one


@pytest.fixture(scope="module")
def exported(tiny: TinyLlava, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(str(tiny.llava), tmp_path_factory.mktemp("exported") / "hf", logits=False).folder


@pytest.fixture(scope="module")
def sight(tiny: TinyLlava, exported: Path, tmp_path_factory: pytest.TempPathFactory) -> Sight:
    """A small square picture, and parts of a photograph: wide, high, and very high."""
    import easy_vqa
    from llava.conversation import conv_templates

    folder = tmp_path_factory.mktemp("pictures")
    photograph, _ = picture(None)
    width, height = photograph.size
    files = {"a drawing": easy_vqa.get_test_image_paths()[0]}
    for name, size in (("wide", (1, 1 / 3)), ("high", (0.7, 1)), ("narrow", (0.4, 1))):
        photograph.crop((0, 0, int(width * size[0]), int(height * size[1]))).save(folder / f"{name}.png")
        files[name] = str(folder / f"{name}.png")
    cropping = Path(shutil.copytree(tiny.llava, folder / "llava-v1.5-square"))
    described = json.loads((cropping / "config.json").read_text()) | {"image_aspect_ratio": "square"}
    (cropping / "config.json").write_text(json.dumps(described))
    processors = {"pad": exported, "square": export(str(cropping), folder / "hf", logits=False).folder}
    dialogue = DIALOGUES["one turn"]
    prompt = prompt_of(conv_templates["vicuna_v1"], dialogue, "<image>")
    return Sight(files, {cut: str(processors[cut]) for cut in CUTS}, prompt, messages_of(dialogue), template())


@pytest.fixture(scope="module")
def home(tiny: TinyLlava, sight: Sight) -> Home:
    """The LLaVA that is installed."""
    return Home(tiny.llava, sight)


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
    sight: Sight,
    made_here: tuple[Mapping[str, str], Mapping[str, Tensor]],
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Mapping[str, str], Mapping[str, Tensor]]:
    """The adapters that the other home has trained, its answers with them, and with those of the installed LLaVA."""
    there = COLUMNS[request.param]
    if there.missing:
        pytest.skip(there.missing)
    folder = tmp_path_factory.mktemp(request.param)
    trained = {name: str(folder / name.replace(" ", "-")) for name in ADAPTERS}
    messages = {name: messages_of(dialogue) for name, dialogue in DIALOGUES.items()}
    described = {"ask": made_here[0], "train": trained, "template": template(), "messages": messages}
    described["sight"] = asdict(sight)
    return trained, there.run(exported if there.exported else tiny.llava, described, folder)


def compare(one: Mapping[str, Tensor], other: Mapping[str, Tensor], name: str) -> None:
    """Compare two answers of one adapter, in every case; those of the first have its effect beside them.

    A case whose picture a home has shrunk otherwise is compared by `differing_pictures` alone.
    """
    cases = [key.split("|")[1] for key in one if key.startswith(f"{name}|") and key.endswith("|logits")]
    other_pixels = differing_pictures(one, other)
    assert len(cases) == len(CASES) + 4 * len(CUTS)
    for case in set(cases) - other_pixels:
        logits, again = (each[f"{name}|{case}|logits"] for each in (one, other))
        assert logits.shape == again.shape
        largest = float(logits.abs().max())
        assert float((logits - again).abs().max()) <= TOLERANCE * largest, (name, case)
        assert torch.equal(one[f"{name}|{case}|tokens"], other[f"{name}|{case}|tokens"]), (name, case)
        if case != "text":
            plain = one[f"none|{case}|logits"]
            assert float((logits - plain).abs().max()) >= EFFECT * TOLERANCE * largest, (name, case)


def differing_pictures(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> set[str]:
    """Return the cases whose pixels are not the same to the bit; only those of narrow pictures may be so, by little."""
    found = set()
    for key in one:
        if key.startswith("pixels|") and not torch.equal(one[key], other[key]):
            levels = float((one[key] - other[key]).abs().max()) * 255 * DEVIATION
            assert key == "pixels|narrow, square" and levels < LEVELS + 0.1, (key, levels)
            found.add(key.partition("|")[2])
    return found


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
    here = home.answers("none") | home.pixels() | home.ask(name, Path(column[0][name]))
    compare(of_this_home(column[1]), here, name)


@pytest.mark.slow
def test_a_picture_is_the_same_to_the_bit_behind_every_homes_own_processing(
    made_here: tuple[Mapping[str, str], Mapping[str, Tensor]],
    column: tuple[Mapping[str, str], Mapping[str, Tensor]],
) -> None:
    assert differing_pictures(made_here[1], column[1]) <= {"narrow, square"}
    for name in ("wide", "high", "narrow"):  # these tell padding from cropping
        assert not torch.equal(*(made_here[1][f"pixels|{name}, {cut}"] for cut in CUTS))


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
