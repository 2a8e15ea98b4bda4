"""The model card says what an adapter is, and the hub takes it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from llava_steering_plugin.adapters.stored.card import model_card
from llava_steering_plugin.adapters.stored.config import AdapterConfig, BaseModel

CONFIG = AdapterConfig(
    "mixlora",
    {"rank": 4, "targets": "q_proj|v_proj"},
    BaseModel("lmsys/vicuna-7b-v1.5", "llama", 4096, 32, 32000),
    "v1",
    trained_on={"bits": 4},
)


def test_the_card_names_base_mode_settings_and_what_else_is_saved() -> None:
    text = model_card(CONFIG, 12345, ["model.image_newline"])
    assert "# mixlora adapter for lmsys/vicuna-7b-v1.5\n" in text
    assert "12,345 parameters" in text and "32 layers of width 4096" in text
    assert "1 tensors of the model itself" in text and "`model.image_newline`" in text
    table = [line for line in text.splitlines() if line.startswith("| ")][2:]
    assert table == [
        "| rank | `4` |",
        "| targets | `q_proj\\|v_proj` |",
        "| bits | `4` |",
        "| conversation template | `v1` |",
    ]
    assert "of the model itself" not in model_card(CONFIG, 12345, [])


@pytest.mark.parametrize("name", ["/models/vicuna", "./vicuna", "~/vicuna", "models/llm/vicuna", "models/vicuna"])
def test_a_base_in_a_local_folder_is_not_in_the_metadata_because_the_hub_refuses_such_a_card(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "vicuna").mkdir(parents=True)
    assert ModelCard(model_card(CONFIG, 1, [])).data.base_model == "lmsys/vicuna-7b-v1.5"
    data = ModelCard(model_card(replace(CONFIG, base=replace(CONFIG.base, name_or_path=name)), 1, [])).data
    assert (data.base_model, data.tags, data.library_name) == (None, ["llava", "mixlora"], "llava-steering-plugin")
