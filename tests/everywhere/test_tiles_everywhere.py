"""An adapter of a LLaVA-1.6 answers the same in LLaVA, in its forks, and in transformers' LlavaNext, both ways.

All homes get the same pixels, which LLaVA has made: Pillow 13 shrinks some pictures otherwise than Pillow 10.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import tiled
import torch
from columns import ADAPTERS, COLUMNS, EFFECT, TOLERANCE, of_this_home
from everywhere import TILED_CASES, Home, Tiles, read_tiles, run, write_tiles
from tiny_llava import TinyLlava
from torch import Tensor

from llava_steering_plugin.export.exporting import export
from llava_steering_plugin.export.verification import picture
from llava_steering_plugin.inference.context import PromptTokens

# Of a photograph: they become 4, 3 and 5 tiles, the whole picture among them.
SIZES = [(256, 60), (87, 255), (256, 256)]
Trained = tuple[Mapping[str, str], Mapping[str, Tensor]]


@pytest.fixture(scope="module")
def base(tiny: TinyLlava, patched_llava: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiled.build(tiny, tmp_path_factory.mktemp("base") / "llava-v1.6-tiny")


@pytest.fixture(scope="module")
def exported(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(str(base), tmp_path_factory.mktemp("exported") / "hf", logits=False).folder


@pytest.fixture(scope="module")
def tiles(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of the pictures, cut by LLaVA."""
    from llava.mm_utils import process_images

    model = Home(base).model
    counted, processor = PromptTokens.of_model(model), model.get_vision_tower().image_processor
    photograph, _ = picture(None)
    made = []
    for size in SIZES:
        (pixels,) = process_images([photograph.crop((0, 0, *size))], processor, model.config)
        made.append(Tiles(pixels, size, counted.of_image(size)))
    file = tmp_path_factory.mktemp("tiles") / "tiles.safetensors"
    write_tiles(made, file)
    return file


@pytest.fixture(scope="module")
def home(base: Path, tiles: Path) -> Home:
    return Home(base, tiles=read_tiles(tiles))


@pytest.fixture(scope="module")
def made_here(home: Home, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder = tmp_path_factory.mktemp("here")
    folders = {name: str(folder / name.replace(" ", "-")) for name in ADAPTERS}
    return folders, run(home, {}, folders)


@pytest.fixture(scope="module", params=COLUMNS)
def column(
    request: pytest.FixtureRequest,
    base: Path,
    exported: Path,
    tiles: Path,
    made_here: Trained,
    tmp_path_factory: pytest.TempPathFactory,
) -> Trained:
    """The adapters that the other home has trained, its answers with them, and with those of the installed LLaVA."""
    there = COLUMNS[request.param]
    if there.missing:
        pytest.skip(there.missing)
    folder = tmp_path_factory.mktemp(request.param)
    trained = {name: str(folder / name.replace(" ", "-")) for name in ADAPTERS}
    job = {"ask": made_here[0], "train": trained, "tiles": str(tiles)}
    return trained, there.run(exported if there.exported else base, job, folder)


def compare(one: Mapping[str, Tensor], other: Mapping[str, Tensor], name: str) -> None:
    """Compare two answers of one adapter in every case; those of the first have its effect beside them."""
    for case in TILED_CASES:
        logits, again = (each[f"{name}|{case}|logits"] for each in (one, other))
        assert logits.shape == again.shape, (name, case)
        largest = float(logits.abs().max())
        assert float((logits - again).abs().max()) <= TOLERANCE * largest, (name, case)
        assert torch.equal(one[f"{name}|{case}|tokens"], other[f"{name}|{case}|tokens"]), (name, case)
        if case != "text":
            plain = one[f"none|{case}|logits"]
            assert float((logits - plain).abs().max()) >= EFFECT * TOLERANCE * largest, (name, case)


def test_pictures_are_of_several_tiles_and_not_all_of_the_same_number(tiles: Path) -> None:
    found = read_tiles(tiles)
    assert [len(each.pixels) for each in found] == [4, 3, 5]
    assert len({each.tokens for each in found}) == 3


@pytest.mark.slow
@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_of_llava_answers_the_same_there(name: str, made_here: Trained, column: Trained) -> None:
    compare(of_this_home(made_here[1]), column[1], name)


@pytest.mark.slow
@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_trained_there_answers_the_same_in_llava(name: str, home: Home, column: Trained) -> None:
    compare(of_this_home(column[1]), home.answers("none") | home.ask(name, Path(column[0][name])), name)
