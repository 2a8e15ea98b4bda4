"""LLaVAs of other language models are trained by LLaVA's own train(), loaded by its loader, and answer.

Covers `upstream/model/language_models.py` and `upstream/train/trained_base.py`, from the command line to the answer.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from quantising import quantising_on_cpu
from safetensors.torch import load_file
from small_checkout import add_distribution
from steered import generate, pictures
from tiny_language_models import FAMILIES, Family
from tiny_llava import HIDDEN, TinyLlava
from trained_families import (
    MIXLORA,
    MORES,
    NAMED,
    Trainings,
    check_planned,
    check_resumed,
    check_rows,
    check_trained_and_answers,
    load,
    prompt_of,
)
from training_runs import LORA

from llava_steering_plugin import attachment_of

# The two with an architecture of their own are quick to see; those of Llama's are trained with the slow tests.
by_family = pytest.mark.parametrize(
    "family",
    [
        pytest.param(family, id=family.name, marks=[pytest.mark.slow] if family.name in NAMED else [])
        for family in FAMILIES
    ],
)


@pytest.fixture(scope="module")
def train(
    tiny: TinyLlava, patched_llava: Path, language_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Trainings:
    return Trainings(tiny, language_models, tmp_path_factory.mktemp)


@by_family
@pytest.mark.parametrize("flags", [MORES, MIXLORA], ids=lambda flags: str(flags["tuning_mode"]))
def test_a_mode_is_trained_loaded_and_answers_as_it_was_trained(
    family: Family, flags: Mapping[str, object], train: Trainings
) -> None:
    check_trained_and_answers(family, train(family, flags), str(flags["tuning_mode"]))


@by_family
def test_a_lora_of_llavas_own_is_trained_and_loaded(
    family: Family, train: Trainings, language_models: dict[str, Path]
) -> None:
    folder = train(family, LORA)
    model, tokenizer = load(folder, language_models[family.name])
    assert model.config.model_type == f"llava_{family.name}"
    named = json.loads((folder / "adapter_config.json").read_text())["target_modules"]
    assert ({"dense", "fc1", "fc2"} if family.name == "phi" else {"o_proj", "down_proj"}) <= set(named)
    assert generate(model, prompt_of(family, tokenizer), pictures(1))


@by_family
def test_a_resumed_training_ends_bit_equal(family: Family, train: Trainings, tmp_path: Path) -> None:
    check_resumed(train, family, MORES, tmp_path / "part")


@pytest.mark.parametrize("family", FAMILIES[:2], ids=lambda family: family.name)
def test_gradient_checkpointing_changes_nothing(family: Family, train: Trainings) -> None:
    with_it = load_file(train(family, MIXLORA) / "adapter_model.safetensors")
    without = load_file(train(family, {**MIXLORA, "gradient_checkpointing": False}) / "adapter_model.safetensors")
    assert all(torch.allclose(with_it[name].float(), without[name].float(), rtol=1e-3, atol=1e-5) for name in with_it)


@pytest.mark.parametrize("family", [FAMILIES[0]], ids=["phi"])
def test_features_without_a_connector_come_in_the_dtype_of_the_words(family: Family, train: Trainings) -> None:
    """A layer norm in bfloat16 takes no float32 on the CPU, and Phi begins with one."""
    folder = train(family, {**MORES, "mm_projector_type": "identity"})
    assert attachment_of(load(folder)[0]) is not None


@pytest.mark.parametrize("family", [FAMILIES[1]], ids=["qwen2"])
def test_a_whole_checkpoint_is_trained_loaded_and_goes_on_by_its_type_alone(
    family: Family, train: Trainings, tmp_path: Path
) -> None:
    folder = train(family, {})
    misleading = tmp_path / "mistral-lora-plain-v1"  # each of which LLaVA's loader or chat looks for
    shutil.copytree(folder, misleading, ignore=shutil.ignore_patterns("checkpoint-*"))
    model, tokenizer = load(misleading, name=misleading.name)
    assert type(model).__name__ == "LlavaQwen2ForCausalLM"
    stored = load_file(folder / "model.safetensors")
    assert torch.equal(model.model.embed_tokens.weight.bfloat16(), stored["model.embed_tokens.weight"].bfloat16())
    assert generate(model, prompt_of(family, tokenizer), pictures(1))
    again = train(family, {**MORES, "model_name_or_path": misleading}, output=tmp_path / "again")
    assert json.loads((again / "llava_steering_config.json").read_text())["base"]["model_type"] == "llava_qwen2"
    assert attachment_of(load(again)[0]) is not None


@pytest.mark.parametrize("family", [FAMILIES[0]], ids=["phi"])
def test_stage_1_trains_the_projector_alone_and_stage_2_takes_it(
    family: Family, train: Trainings, tiny: TinyLlava, tmp_path: Path
) -> None:
    captions = {"version": "plain", "tune_mm_mlp_adapter": True, "data_path": tiny.captions}
    stage_1 = train(family, {**captions, "group_by_modality_length": None, "save_strategy": "no"})
    projector = torch.load(stage_1 / "mm_projector.bin", weights_only=True)
    assert {name.rpartition(".")[0] for name in projector} == {"model.mm_projector.0", "model.mm_projector.2"}
    model, _ = load(stage_1, Path(json.loads((stage_1 / "config.json").read_text())["_name_or_path"]))
    loaded = model.model.mm_projector[0].weight
    assert torch.allclose(loaded, projector["model.mm_projector.0.weight"], atol=1e-3)  # loaded in half precision
    assert train(family, {**MORES, "pretrain_mm_mlp_adapter": stage_1 / "mm_projector.bin"}, output=tmp_path / "two")


@by_family
def test_a_plan_counts_from_the_config_what_a_training_trains(family: Family, train: Trainings) -> None:
    for flags in (MORES, MIXLORA):
        check_planned(train, family, flags)


@by_family
def test_rows_of_a_batch_go_through_adapters_of_their_own(family: Family, train: Trainings, tmp_path: Path) -> None:
    check_rows(family, train(family, MORES), tmp_path)


@pytest.mark.parametrize("family", FAMILIES[:2], ids=lambda family: family.name)
def test_four_bits_are_trained_and_loaded(family: Family, train: Trainings, tmp_path: Path) -> None:
    with quantising_on_cpu():
        folder = train(family, {**MORES, "bits": 4}, output=tmp_path / "four")
        model, tokenizer = load(folder, load_4bit=True)
    import bitsandbytes

    packed = [part for part in model.model.layers.modules() if isinstance(part, bitsandbytes.nn.Linear4bit)]
    assert len(packed) == 2 * family.hosts
    model.get_vision_tower().half()
    assert generate(model, prompt_of(family, tokenizer), pictures(1).half())


FOREIGN = """
from llava_steering_plugin.components.base import LanguageModel

class Persimmon(LanguageModel):
    name = "persimmon"
    model_type = "persimmon"
"""


def test_a_foreign_family_of_a_few_lines_is_trained_and_loaded(
    train: Trainings, language_models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import PersimmonConfig, PersimmonForCausalLM

    points = "[llava_steering.language_models]\npersimmon = persimmon_part:Persimmon\n"
    add_distribution(tmp_path, "persimmon_part", "1.0", points)
    (tmp_path / "persimmon_part.py").write_text(FOREIGN)
    monkeypatch.syspath_prepend(tmp_path)
    base = tmp_path / "base"
    shutil.copytree(language_models["phi"], base, ignore=shutil.ignore_patterns("*.safetensors", "*config.json"))
    shutil.copy(language_models["phi"] / "tokenizer_config.json", base)
    sizes = {"hidden_size": HIDDEN, "intermediate_size": HIDDEN, "num_hidden_layers": 2, "num_attention_heads": 4}
    PersimmonForCausalLM(PersimmonConfig(vocab_size=700, **sizes)).save_pretrained(base)
    for flags in (MORES, MIXLORA):
        folder = train(FAMILIES[0], {**flags, "model_name_or_path": base}, output=tmp_path / str(flags["tuning_mode"]))
        model, tokenizer = load(folder)
        assert type(model).__name__ == "LlavaPersimmonForCausalLM"
        assert generate(model, prompt_of(FAMILIES[0], tokenizer), pictures(1))
        recorded = json.loads((folder / "config.json").read_text())["mm_components"]
        assert recorded == {"model_type": {"name": "persimmon", "package": "persimmon_part"}}
