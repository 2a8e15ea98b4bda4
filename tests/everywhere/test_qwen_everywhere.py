"""An adapter over a Qwen answers the same in LLaVA, as a component's llava_qwen2, and as LLaVA-NeXT's llava_qwen.

Covers `components/model_types.py`, `upstream/model/language_models.py` and `upstream/model/image_layouts.py`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_language_models
import torch
from adapter_files import change_llava_config
from columns import ADAPTERS, COLUMNS, EFFECT, TOLERANCE, of_this_home
from everywhere import CASES, MODES, ROWS, Home, run
from safetensors.torch import load_file, save_file
from tiny_llava import TinyLlava
from torch import Tensor

from llava_steering_plugin.errors import BaseMismatch
from llava_steering_plugin.upstream.model.image_layouts import unknown_layout

HERE, IN_NEXT = "llava_qwen2", "llava_qwen"
# Settings of a LLaVA beside those of its language model.
SEEING = ("mm_", "image_", "tokenizer_", "tune_mm", "freeze_mm", "use_mm")


@pytest.fixture(scope="module")
def qwen(tiny: TinyLlava, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain Qwen2, with the special tokens of LLaVA-NeXT's prompts."""
    family = next(each for each in tiny_language_models.FAMILIES if each.name == "qwen2")
    folder = tmp_path_factory.mktemp("qwen") / "qwen"
    further = ("<|im_start|>", "<|im_end|>")
    # Rows for all ids of the prompts.
    return tiny_language_models.build(replace(family, further=further, spare=300), tiny, folder)


@pytest.fixture(scope="module")
def llavas(tiny: TinyLlava, qwen: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same LLaVA over the Qwen, by the model type that its config.json has."""
    found = {}
    described = json.loads((tiny.llava / "config.json").read_text())
    seeing = {key: value for key, value in described.items() if key.startswith(SEEING)}
    classes = {HERE: "LlavaQwen2ForCausalLM", IN_NEXT: "LlavaQwenForCausalLM"}
    for model_type, name in classes.items():
        folder = found[model_type] = tmp_path_factory.mktemp("bases") / model_type.replace("_", "-")
        shutil.copytree(qwen, folder)
        config = json.loads((qwen / "config.json").read_text()) | seeing
        (folder / "config.json").write_text(json.dumps(config | {"model_type": model_type, "architectures": [name]}))
        projector = torch.load(tiny.projector, weights_only=True)
        save_file(load_file(qwen / "model.safetensors") | projector, folder / "model.safetensors", {"format": "pt"})
    return found


@pytest.fixture(scope="module")
def home(llavas: dict[str, Path]) -> Home:
    return Home(llavas[HERE])


Trained = tuple[Mapping[str, str], Mapping[str, Tensor]]


@pytest.fixture(scope="module")
def made_here(home: Home, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folders = {name: str(tmp_path_factory.mktemp("here") / "adapter") for name in ADAPTERS}
    return folders, run(home, {}, folders)


@pytest.fixture(scope="module")
def in_next(llavas: dict[str, Path], made_here: Trained, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """What LLaVA-NeXT's llava_qwen has trained, and its answers with that and with what was trained here."""
    there = COLUMNS["next"]
    if there.missing:
        pytest.skip(there.missing)
    folder = tmp_path_factory.mktemp("next")
    trained = {name: str(folder / name.replace(" ", "-")) for name in ADAPTERS}
    job = {"ask": made_here[0], "train": trained}
    return trained, there.run(llavas[IN_NEXT], job, folder)


def compare(one: Mapping[str, Tensor], other: Mapping[str, Tensor], name: str) -> None:
    for case in CASES:
        logits, again = (each[f"{name}|{case}|logits"] for each in (one, other))
        largest = float(logits.abs().max())
        assert float((logits - again).abs().max()) <= TOLERANCE * largest, (name, case)
        assert torch.equal(one[f"{name}|{case}|tokens"], other[f"{name}|{case}|tokens"]), (name, case)
        if case != "text":
            plain = one[f"none|{case}|logits"]
            assert float((logits - plain).abs().max()) >= EFFECT * TOLERANCE * largest, (name, case)


@pytest.mark.slow
@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_over_llava_qwen2_answers_the_same_over_llava_qwen(
    name: str, made_here: Trained, in_next: Trained
) -> None:
    compare(of_this_home(made_here[1]), in_next[1], name)


@pytest.mark.slow
@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_over_llava_qwen_answers_the_same_over_llava_qwen2(name: str, home: Home, in_next: Trained) -> None:
    compare(of_this_home(in_next[1]), home.answers("none") | home.ask(name, Path(in_next[0][name])), name)


def loaded(adapter: Path, base: Path | None = None) -> tuple[Any, Any]:
    from llava.mm_utils import get_model_name_from_path
    from llava.model.builder import load_pretrained_model

    name = get_model_name_from_path(str(adapter))
    found = load_pretrained_model(str(adapter), base and str(base), name, device="cpu", device_map="cpu")
    model = found[1].float().eval()
    model.get_vision_tower().float()
    return found[0], model


def answers(model: Any, home: Home) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(**home.call(CASES["one image"])).logits[0, :, :ROWS]
    return logits


@pytest.mark.parametrize("base", [HERE, IN_NEXT])
def test_llavas_loader_takes_a_base_of_either_type(
    base: str, llavas: dict[str, Path], home: Home, made_here: Trained
) -> None:
    from llava_steering_plugin.upstream.install import install

    install()
    name = ADAPTERS[0]
    _, model = loaded(Path(made_here[0][name]), llavas[base])
    assert model.config.model_type == base
    expected = made_here[1][f"here: {name}|one image|logits"]
    # The loader makes the vision tower's weights half as precise.
    assert float((answers(model, home) - expected).abs().max()) < 0.02 * float(expected.abs().max())


def test_an_adapter_of_llava_next_over_a_plain_qwen_is_loaded_with_its_template(
    qwen: Path, tiny: TinyLlava, llavas: dict[str, Path], home: Home, made_here: Trained, tmp_path: Path
) -> None:
    """As LLaVA-NeXT writes them: config.json has its model type, the template is `qwen_1_5`."""
    from llava.conversation import conv_templates

    from llava_steering_plugin.upstream.install import install

    install()
    name = f"{next(iter(MODES))} with projector"
    folder = change_llava_config(
        Path(shutil.copytree(made_here[0][name], tmp_path / "adapter")), model_type=IN_NEXT, architectures=None
    )
    _, model = loaded(folder, qwen)
    assert model.config.model_type == IN_NEXT
    expected = made_here[1][f"here: {name}|one image|logits"]
    assert float((answers(model, home) - expected).abs().max()) < 0.02 * float(expected.abs().max())
    chat = conv_templates["qwen_1_5"].copy()
    chat.append_message(chat.roles[0], "<image>\nWhat?")
    chat.append_message(chat.roles[1], None)
    assert chat.get_prompt() == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<image>\nWhat?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_pictures_that_this_llava_would_cut_otherwise_are_refused(
    llavas: dict[str, Path], made_here: Trained, tmp_path: Path
) -> None:
    adapter = Path(shutil.copytree(made_here[0][ADAPTERS[0]], tmp_path / "adapter"))
    change_llava_config(adapter, image_aspect_ratio="anyres_max_9", mm_patch_merge_type="spatial_unpad")
    with pytest.raises(BaseMismatch, match=r"'anyres_max_9', and the LLaVA .* does not know .*; LLaVA-NeXT does"):
        loaded(adapter, llavas[HERE])
    for known in (None, "square", "pad", "anyres"):
        assert unknown_layout({"image_aspect_ratio": known}) == ""
