"""LLaVAs of other language models are trained by LLaVA's own train(), loaded by its loader, and answer.

Covers `upstream/model/language_models.py` and `upstream/train/trained_base.py`, from the command line to the answer.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from quantising import quantising_on_cpu
from safetensors.torch import load_file
from small_checkout import add_distribution
from steered import generate, pictures, strengthen
from tiny_language_models import FAMILIES, Family
from tiny_llava import HIDDEN, TinyLlava
from training_runs import LORA, train_flags, train_in_process

from llava_steering_plugin import attach, attachment_of, remove, save_adapter
from llava_steering_plugin.modes.mixlora import MixLoRA
from llava_steering_plugin.modes.mores import MoReS
from llava_steering_plugin.pool.pool import AdapterPool

MORES = {"tuning_mode": "mores", "mores_rank": 2, "mores_tokens": "all", "mores_dropout": 0.1}
MIXLORA = {"tuning_mode": "mixlora", "mixlora_factors": 4, "mixlora_rank": 2}
TWO_STEPS = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "learning_rate": 1e-2, "warmup_ratio": 0}
Train = Callable[..., Path]
by_family = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)


@pytest.fixture(scope="module")
def train(
    tiny: TinyLlava, patched_llava: Path, language_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Train:
    """Trains a family in this process; what was trained with the same flags is not trained again."""
    done: dict[str, Path] = {}

    def run(family: Family, flags: Mapping[str, object], *, output: Path | None = None) -> Path:
        key = f"{family.name} {sorted(flags.items())}"
        if output is None and key in done:
            return done[key]
        folder = output or tmp_path_factory.mktemp(family.name) / "out"
        base = {"model_name_or_path": language_models[family.name], "version": family.version}
        named = {"language_model": family.name} if family.name in ("smollm2", "mistral") else {}
        train_in_process(train_flags(tiny, folder, {**base, **named, **TWO_STEPS, **flags}))
        done[key] = folder
        return folder

    return run


def load(path: Path, base: Path | None = None, name: str = "any", **options: Any) -> tuple[Any, Any]:
    """Model and tokenizer, in float32, by LLaVA's own loader under a name that tells nothing."""
    from llava.model.builder import load_pretrained_model

    tokenizer, model, _, _ = load_pretrained_model(str(path), base and str(base), name, device="cpu", **options)
    if not options:
        model = model.float()
    model.get_vision_tower().float()
    return model, tokenizer


def prompt_of(family: Family, tokenizer: Any) -> torch.Tensor:
    from llava.conversation import conv_templates
    from llava.mm_utils import tokenizer_image_token

    chat = conv_templates[family.version].copy()
    chat.append_message(chat.roles[0], "<image>\nWhat color is the circle?")
    chat.append_message(chat.roles[1], None)
    ids: torch.Tensor = tokenizer_image_token(chat.get_prompt(), tokenizer, return_tensors="pt")
    return ids[None]


@by_family
@pytest.mark.parametrize("flags", [MORES, MIXLORA], ids=lambda flags: str(flags["tuning_mode"]))
def test_a_mode_is_trained_loaded_and_answers_as_it_was_trained(
    family: Family, flags: Mapping[str, object], train: Train
) -> None:
    folder = train(family, flags)
    described = json.loads((folder / "llava_steering_config.json").read_text())
    assert described["conversation"] == family.version
    model, tokenizer = load(folder)
    assert model.config.model_type == f"llava_{family.name}"
    attachment = attachment_of(model)
    assert attachment is not None and attachment.mode.name == flags["tuning_mode"]
    stored = load_file(folder / "adapter_model.safetensors")
    trained = attachment.parameters()
    assert trained and all(torch.equal(value, stored[f"adapter.{name}"]) for name, value in trained.items())
    begun_at_zero = [value for name, value in trained.items() if name.endswith(("shift", "offset", "routed_b"))]
    # Of MoReS' last layer, nothing reaches the loss: it steers visual tokens, and answers come after them.
    assert sum(bool(value.any()) for value in begun_at_zero) >= len(begun_at_zero) / 2 > 0
    ids = prompt_of(family, tokenizer)
    assert len(generate(model, ids, pictures(1))[0]) >= 6


@by_family
def test_a_lora_of_llavas_own_is_trained_and_loaded(
    family: Family, train: Train, language_models: dict[str, Path]
) -> None:
    folder = train(family, LORA)
    model, tokenizer = load(folder, language_models[family.name])
    assert model.config.model_type == f"llava_{family.name}"
    named = json.loads((folder / "adapter_config.json").read_text())["target_modules"]
    assert ({"dense", "fc1", "fc2"} if family.name == "phi" else {"o_proj", "down_proj"}) <= set(named)
    assert generate(model, prompt_of(family, tokenizer), pictures(1))


@by_family
def test_a_resumed_training_ends_bit_equal(family: Family, train: Train, tmp_path: Path) -> None:
    whole = train(family, MORES)
    part = tmp_path / "part"
    shutil.copytree(whole, part, ignore=shutil.ignore_patterns("checkpoint-2", "adapter_model*", "trainer_state*"))
    train(family, MORES, output=part)
    first, second = (load_file(folder / "adapter_model.safetensors") for folder in (whole, part))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("family", FAMILIES[:2], ids=lambda family: family.name)
def test_gradient_checkpointing_changes_nothing(family: Family, train: Train) -> None:
    with_it = load_file(train(family, MIXLORA) / "adapter_model.safetensors")
    without = load_file(train(family, {**MIXLORA, "gradient_checkpointing": False}) / "adapter_model.safetensors")
    assert all(torch.allclose(with_it[name].float(), without[name].float(), rtol=1e-3, atol=1e-5) for name in with_it)


@pytest.mark.parametrize("family", [FAMILIES[0]], ids=["phi"])
def test_features_without_a_connector_come_in_the_dtype_of_the_words(family: Family, train: Train) -> None:
    """A layer norm in bfloat16 takes no float32 on the CPU, and Phi begins with one."""
    folder = train(family, {**MORES, "mm_projector_type": "identity"})
    assert attachment_of(load(folder)[0]) is not None


@pytest.mark.parametrize("family", [FAMILIES[1]], ids=["qwen2"])
def test_a_whole_checkpoint_is_trained_loaded_and_goes_on_by_its_type_alone(
    family: Family, train: Train, tmp_path: Path
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
    family: Family, train: Train, tiny: TinyLlava, tmp_path: Path
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
def test_a_plan_counts_from_the_config_what_a_training_trains(
    family: Family, train: Train, tiny: TinyLlava, language_models: dict[str, Path]
) -> None:
    from llava_steering_plugin.planning.plan import plan

    for flags in (MORES, MIXLORA):
        config_alone = language_models[family.name]
        named = {"model_name_or_path": config_alone, "version": family.version, "language_model": family.name}
        planned = plan(train_flags(tiny, Path("nowhere"), {**named, **flags}))
        assert planned.problems == ()
        attachment = attachment_of(load(train(family, flags))[0])
        assert attachment is not None and planned.counts is not None
        assert planned.counts.mode == sum(value.numel() for value in attachment.parameters().values())
    linears = {path.rpartition(".")[2] for layer in attachment.shape.layers for path in layer.linears}
    assert len(linears) == family.hosts
    assert attachment.shape.hidden_size == HIDDEN


@by_family
def test_rows_of_a_batch_go_through_adapters_of_their_own(family: Family, train: Train, tmp_path: Path) -> None:
    model, tokenizer = load(train(family, MORES))
    remove(model)
    kinds = {"cats": MoReS(rank=2, tokens="all"), "pets": MixLoRA(factors=4, rank=2, alpha=1.0)}
    for seed, (name, mode) in enumerate(kinds.items()):
        strengthen(attach(model, mode), seed)
        save_adapter(model, tmp_path / name)
        remove(model)
    pool = AdapterPool(model, tokenizer)
    for name in kinds:
        pool.load(name, tmp_path / name)
    ids, images = prompt_of(family, tokenizer), pictures(3)
    names = ["cats", "__base__", "pets"]
    with torch.inference_mode():
        together = model(input_ids=ids.repeat(3, 1), images=images, adapter_names=names).logits
        alone = [
            model(input_ids=ids, images=images[row : row + 1], adapter_names=names[row]).logits for row in range(3)
        ]
    assert torch.allclose(together, torch.cat(alone), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(alone[0], alone[2], atol=1e-2)
    made = generate(model, ids.repeat(3, 1), images, adapter_names=names)
    assert [row[-6:] for row in made] == [
        generate(model, ids, images[row : row + 1], adapter_names=names[row])[0][-6:] for row in range(3)
    ]


@pytest.mark.parametrize("family", FAMILIES[:2], ids=lambda family: family.name)
def test_four_bits_are_trained_and_loaded(family: Family, train: Train, tmp_path: Path) -> None:
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
    train: Train, language_models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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
