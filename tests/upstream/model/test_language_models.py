"""Which language model a base is, its config.json and one flag tell; what cannot be is said before it is loaded.

Covers `components/model_types.py`, and the families in `components/language_models/phi.py`,
`components/language_models/qwen2.py`, `components/language_models/smollm2.py`, `components/language_models/mistral.py`
and `components/language_models/newer.py`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from tiny_language_models import FAMILIES, THREE_TURNS
from tiny_llava import TinyLlava
from training_runs import train_flags, upstream_globals_restored

from llava_steering_plugin.components.language_models.newer import Gemma
from llava_steering_plugin.components.model_types import language_models as registered
from llava_steering_plugin.components.model_types import of_llava_type, of_model_type
from llava_steering_plugin.errors import ArgumentsError, UpstreamError
from llava_steering_plugin.upstream.model.language_models import chosen, types_of_llava
from llava_steering_plugin.upstream.text.conversations import template_of_base

MORES = {"tuning_mode": "mores"}


@pytest.fixture(autouse=True)
def imported(patched_llava: Path) -> None:
    import llava.train.train  # noqa: F401


def refusal(tiny: TinyLlava, capsys: pytest.CaptureFixture[str], flags: Mapping[str, Any]) -> str:
    """What a training says that does not start. LLaVA loads nothing before it has read its flags."""
    import sys

    from llava.train import train as upstream

    with upstream_globals_restored(), pytest.raises(SystemExit):
        sys.argv = ["train.py", *train_flags(tiny, Path("nowhere"), flags)]
        upstream.train()
    return capsys.readouterr().err


def with_type(base: Path, folder: Path, model_type: str) -> Path:
    """A base whose config.json says another type, and which has no weights."""
    shutil.copytree(base, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((folder / "config.json").read_text()) | {"model_type": model_type}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_base_that_llava_has_no_class_for_is_known_by_its_type() -> None:
    for model_type, name in (("phi", "phi"), ("llava_phi", "phi"), ("qwen2", "qwen2"), ("llava_smollm2", "smollm2")):
        component = chosen({"model_type": model_type}, "base")
        assert component is not None and component.name == name
    assert {"llama", "mistral", "mpt", "llava_llama", "llava_mistral", "llava"} <= types_of_llava()
    for model_type in ("llama", "mistral", "llava_llama", "llava_mistral", "bert"):
        assert chosen({"model_type": model_type}, "base") is None


def test_a_name_takes_a_base_from_llavas_own_class() -> None:
    for model_type, name in (("llama", "smollm2"), ("mistral", "mistral"), ("llava_mistral", "mistral")):
        component = chosen({"model_type": model_type}, "base", name)
        assert component is not None and component.name == name


def test_a_name_for_another_type_says_which_one_suits() -> None:
    with pytest.raises(ArgumentsError) as caught:
        chosen({"model_type": "qwen2"}, "some-base", "phi")
    for expected in ("--language_model phi is for", "config.json of some-base says 'qwen2'", "--language_model qwen2"):
        assert expected in str(caught.value)
    with pytest.raises(ArgumentsError, match=r"unknown language model 'qwen22': did you mean 'qwen2'"):
        chosen({"model_type": "qwen2"}, "some-base", "qwen22")


def test_a_type_that_needs_another_transformers_says_which() -> None:
    with pytest.raises(ArgumentsError, match=r"some-base is of type 'gemma', which needs transformers 4.38 or newer"):
        chosen({"model_type": "gemma"}, "some-base")
    assert Gemma.missing().startswith("transformers 4.38 or newer; ")


def test_every_registered_one_is_found_by_both_of_its_types() -> None:
    found = list(registered())
    assert {"phi", "qwen2", "smollm2", "mistral", "gemma", "stablelm", "phi3", "qwen3"} <= {each.name for each in found}
    for each in found:
        assert of_llava_type(each.llava_type) is each
        other = of_model_type(each.model_type)
        assert other is not None and other.model_type == each.model_type
        assert each.missing() or each.causal_class().config_class.model_type == each.model_type
    assert of_llava_type("llava_nothing") is of_model_type("nothing") is None


def test_a_base_without_an_adapter_is_asked_in_the_template_of_its_component() -> None:
    assert template_of_base({"model_type": "llava_qwen2"}) == "qwen2_5"
    assert template_of_base({"model_type": "llava_llama"}) is None


def test_everything_wrong_with_a_base_is_said_at_once_and_nothing_is_loaded(
    tiny: TinyLlava, language_models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = with_type(language_models["qwen2"], tmp_path / "mpt-qwen", "qwen2")
    said = refusal(tiny, capsys, {"model_name_or_path": base, "version": None, "vision_tower": None})
    for expected in (
        "--vision_tower is missing: without one, LLaVA would build a Llama, not qwen2",
        "has 'mpt' in its name, by which LLaVA would build an MPT",
        "--version is missing, and LLaVA's default is Vicuna's. --version qwen2_5 suits qwen2; stage 1 takes",
    ):
        assert expected in said


def test_an_unknown_type_is_refused_with_the_nearest_ones_if_a_mode_is_on(
    tiny: TinyLlava, language_models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = with_type(language_models["qwen2"], tmp_path / "base", "qwem2")
    said = refusal(tiny, capsys, {"model_name_or_path": base, **MORES})
    assert "is of type 'qwem2', and neither LLaVA nor a component that is installed here knows it" in said
    assert "did you mean 'qwen2'" in said and "llava_steering.language_models" in said


def test_a_tokenizer_without_a_template_is_refused_with_those_that_have_a_name(
    tiny: TinyLlava, language_models: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    flags = {"model_name_or_path": language_models["phi"], "version": "tokenizer", **MORES}
    said = refusal(tiny, capsys, flags)
    assert "--version tokenizer: the tokenizer of" in said and "has no chat template" in said
    assert "Give one that LLaVA has: " in said and "phi" in said.split("Give one that LLaVA has: ")[1]


def test_of_a_base_that_needs_another_transformers_nothing_else_is_said(
    tiny: TinyLlava, language_models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its tokenizer cannot be read either, which says nothing about --version."""
    base = with_type(language_models["qwen2"], tmp_path / "base", "gemma")
    for mode in ({}, MORES):
        said = refusal(tiny, capsys, {"model_name_or_path": base, "version": "tokenizer", **mode})
        assert said.count("\n  - ") == 1 and "which needs transformers 4.38 or newer" in said


def test_a_checkpoint_of_a_component_that_is_not_here_is_refused_before_it_is_loaded(
    language_models: dict[str, Path], tmp_path: Path
) -> None:
    from llava.model.builder import load_pretrained_model

    unknown = with_type(language_models["qwen2"], tmp_path / "unknown", "llava_olmo")
    with pytest.raises(UpstreamError, match=r"type 'llava_olmo', and neither LLaVA nor a component .* knows it"):
        load_pretrained_model(str(unknown), None, "llava", device="cpu")
    newer = with_type(language_models["qwen2"], tmp_path / "newer", "llava_gemma")
    with pytest.raises(UpstreamError, match=r"type 'llava_gemma', which needs transformers 4.38 or newer"):
        load_pretrained_model(str(newer), None, "llava", device="cpu")


def test_llavas_modules_are_as_before_after_a_component(language_models: dict[str, Path]) -> None:
    import transformers
    from llava.model import LlavaLlamaForCausalLM, builder
    from llava.train import train

    from llava_steering_plugin.upstream.model.language_models import in_loading, in_training

    component = of_llava_type("llava_qwen2")
    before = train.transformers, builder.AutoTokenizer
    with in_training(train, component), in_loading(builder, component):
        assert train.LlavaLlamaForCausalLM is builder.LlavaLlamaForCausalLM is not LlavaLlamaForCausalLM
        assert train.transformers.LlamaForCausalLM is transformers.LlamaForCausalLM
    assert train.LlavaLlamaForCausalLM is builder.LlavaLlamaForCausalLM is LlavaLlamaForCausalLM
    assert (train.transformers, builder.AutoTokenizer) == before


def test_tokens_are_counted_with_the_components_tokenizer_and_template(
    tiny: TinyLlava, language_models: dict[str, Path]
) -> None:
    from llava_steering_plugin.upstream.text.tokens import TokenCounter

    family = FAMILIES[1]
    counter = TokenCounter(str(language_models["qwen2"]), family.version, 512, str(tiny.tower))
    by_name = TokenCounter(str(language_models["smollm2"]), "tokenizer", 512, str(tiny.tower), "smollm2")
    for each in (counter, by_name):
        length = each.count({"image": "a.png", "conversations": THREE_TURNS})
        ends = len([turn for turn in THREE_TURNS if turn["from"] == "gpt"])
        answers = sum(len(each.tokenizer(turn["value"]).input_ids) for turn in THREE_TURNS if turn["from"] == "gpt")
        assert length.learned == answers + ends
