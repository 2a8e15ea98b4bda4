"""4-bit and 8-bit backbones: trained through upstream's own `--bits`, and loaded by its own `--load-4bit`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import bitsandbytes
import pytest
import torch
from quantising import quantising_on_cpu
from tiny_llava import HIDDEN, TinyLlava
from torch import Tensor, nn
from training_runs import train_flags, train_in_process

from llava_steering_plugin.adapters.attachment import required
from llava_steering_plugin.adapters.stored.folder import ADAPTER, CARD, EXTRA
from llava_steering_plugin.adapters.stored.locate import read
from llava_steering_plugin.training import trainer

MORES: dict[str, object] = {"tuning_mode": "mores", "mores_rank": 2, "mores_tokens": "all"}
MIXLORA: dict[str, object] = {"tuning_mode": "mixlora", "mores_rank": None, "mores_tokens": None}
# More than the ten steps after which a parameter without a gradient would have stopped the training.
WATCHED = {"max_steps": 11}


@pytest.fixture(autouse=True)
def on_cpu(patched_llava: Path) -> Iterator[None]:
    with quantising_on_cpu():
        yield


def train(tiny: TinyLlava, output: Path, overrides: Mapping[str, object]) -> Any:
    """Trains, and returns the model as it was when the adapter was saved."""
    saved: list[Any] = []
    save = trainer.save_adapter

    def watched(model: Any, *args: Any, **kwargs: Any) -> None:
        saved.append(model)
        save(model, *args, **kwargs)

    with mock.patch.object(trainer, "save_adapter", watched):
        train_in_process(train_flags(tiny, output, {"max_steps": 3, **MORES, **overrides}))
    return saved[-1]


def load(path: Path, **how: Any) -> tuple[Any, Any, Any]:
    from llava.mm_utils import get_model_name_from_path
    from llava.model.builder import load_pretrained_model

    name = get_model_name_from_path(str(path))
    return load_pretrained_model(str(path), None, name, device="cpu", device_map="cpu", **how)[:3]


def answer(loaded: tuple[Any, Any, Any], tiny: TinyLlava) -> Tensor:
    """The logits of the next token after a question with an image, float32 [pieces]."""
    from llava.mm_utils import process_images, tokenizer_image_token
    from PIL import Image

    tokenizer, model, processor = loaded
    picture = Image.open(sorted(tiny.images.iterdir())[0]).convert("RGB")
    pixels = process_images([picture], processor, model.config).to(model.dtype)
    ids = tokenizer_image_token("USER: <image>\nWhat color is it? ASSISTANT:", tokenizer, -200, return_tensors="pt")
    with torch.inference_mode():
        logits: Tensor = model(ids[None], images=pixels).logits[0, -1].float()
    return logits


def linear_kinds(model: Any) -> set[type]:
    return {type(part) for part in model.get_model().layers.modules() if isinstance(part, nn.Linear)}


@pytest.fixture(scope="module")
def four_bit(tiny: TinyLlava, patched_llava: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """An adapter with a trained projector over a backbone in nf4, in bf16, with a checkpoint halfway; and its model."""
    output = tmp_path_factory.mktemp("quantised") / "four-bit"
    with quantising_on_cpu():
        model = train(tiny, output, {"bits": 4, **WATCHED, "save_strategy": "steps", "save_steps": 6})
    return output, model


def test_with_four_bits_only_the_backbone_is_quantised_and_the_adapter_trains_in_float32(
    four_bit: tuple[Path, Any],
) -> None:
    output, model = four_bit
    assert linear_kinds(model) == {bitsandbytes.nn.Linear4bit}
    packed = model.get_model().layers[0].mlp.up_proj.weight
    assert packed.dtype == torch.uint8
    assert packed.quant_state.quant_type == "nf4" and packed.quant_state.nested
    assert {type(part) for part in model.get_model().mm_projector} == {nn.Linear, nn.GELU}
    assert {parameter.dtype for parameter in required(model).parameters().values()} == {torch.float32}
    stored = read(output)
    assert {value.dtype for value in stored.section(ADAPTER).values()} == {torch.float32}
    shifts = [value for name, value in stored.section(ADAPTER).items() if name.endswith("steer_shift")]
    assert all(bool(shift.abs().max() > 0) for shift in shifts[:-1])


def test_the_mark_for_transformers_refusal_is_gone_once_the_trainer_stands(four_bit: tuple[Path, Any]) -> None:
    assert four_bit[1].is_quantized
    assert not four_bit[1]._hf_peft_config_loaded


def test_the_card_says_what_it_was_trained_on(four_bit: tuple[Path, Any]) -> None:
    output, _ = four_bit
    expected = {"bits": 4, "compute dtype": "bfloat16", "quantisation": "nf4, double"}
    assert read(output).config.trained_on == expected
    card = (output / CARD).read_text()
    assert all(f"| {key} | `{value}` |" in card for key, value in expected.items())


def test_the_saved_config_loads_unquantised(four_bit: tuple[Path, Any], tiny: TinyLlava) -> None:
    from llava.model.language_model.llava_llama import LlavaConfig, LlavaLlamaForCausalLM

    config = LlavaConfig.from_pretrained(four_bit[0])
    assert not hasattr(config, "quantization_config")
    model = LlavaLlamaForCausalLM.from_pretrained(tiny.llava, config=config)
    assert linear_kinds(model) == {nn.Linear}


def test_a_resumed_four_bit_run_ends_bit_equal_also_if_it_is_measured(
    four_bit: tuple[Path, Any], tiny: TinyLlava, tmp_path: Path
) -> None:
    output, _ = four_bit
    shutil.copytree(output / "checkpoint-6", tmp_path / "run" / "checkpoint-6")
    measured = {"steering_diagnostics_steps": 2, "steering_diagnostics_samples": 2}
    train(tiny, tmp_path / "run", {"bits": 4, **WATCHED, "save_strategy": "steps", "save_steps": 6, **measured})
    _, *passes = map(json.loads, (tmp_path / "run" / "diagnostics.jsonl").read_text().splitlines())
    assert [line["step"] for line in passes] == [6, 8, 10, 11]
    assert all(value > 0 for line in passes for value in line["lmar"]["layers"])
    whole, resumed = read(output), read(tmp_path / "run")
    assert not [name for name, value in whole.tensors.items() if not torch.equal(value, resumed.tensors[name])]


@pytest.mark.parametrize(
    "flags",
    [
        {"bits": 4, "quant_type": "fp4", "double_quant": False, "bf16": False},
        {"bits": 8, **WATCHED},
        {"bits": 8, "bf16": False, "freeze_mm_mlp_adapter": True},
        {"bits": 4, **WATCHED, **MIXLORA},
        {"bits": 8, "bf16": False, **MIXLORA},
    ],
    ids=["fp4 in fp32", "8 bits in bf16", "8 bits in fp32", "MixLoRA over nf4 in bf16", "MixLoRA over 8 bits in fp32"],
)
def test_other_quantisations_precisions_and_modes_train(
    tiny: TinyLlava, tmp_path: Path, flags: Mapping[str, object]
) -> None:
    model = train(tiny, tmp_path / "run", flags)
    expected = bitsandbytes.nn.Linear4bit if flags["bits"] == 4 else bitsandbytes.nn.Linear8bitLt
    assert linear_kinds(model) <= {expected, nn.Linear} and expected in linear_kinds(model)
    stored = read(tmp_path / "run")
    assert stored.config.trained_on["bits"] == flags["bits"]
    assert all(bool(value.isfinite().all()) for value in stored.tensors.values())
    # Zero at first, in MixLoRA.
    pools = [value for name, value in stored.tensors.items() if name.endswith("routed_b")]
    assert all(bool(value.any()) for value in pools)


def test_mixlora_over_eight_bits_trains_where_its_linears_give_views(tiny: TinyLlava) -> None:
    from llava.model.language_model.llava_llama import LlavaLlamaForCausalLM

    from llava_steering_plugin import attach, token_map

    # In eval mode bitsandbytes multiplies on the processor as it always does on CUDA: what comes out is a view made
    # inside its autograd function, which nobody may write into.
    model = LlavaLlamaForCausalLM.from_pretrained(tiny.llava, load_in_8bit=True).eval().requires_grad_(False)
    attachment = attach(model, "mixlora")
    for parameter in attachment.trained().values():
        parameter.requires_grad_(True)
    ids = torch.tensor([[1, 5, 9, 23, 41]])
    with token_map(torch.zeros_like(ids, dtype=torch.bool), torch.ones_like(ids)):
        model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.float().sum().backward()
    pools = [value for name, value in attachment.trained().items() if name.endswith("routed_b")]
    assert pools and all(value.grad is not None and bool(value.grad.isfinite().all()) for value in pools)
    assert any(bool(value.grad.any()) for value in pools if value.grad is not None)


def test_over_four_bits_gradient_checkpointing_changes_nothing(tiny: TinyLlava, tmp_path: Path) -> None:
    common = {"bits": 4, "bf16": False}
    train(tiny, tmp_path / "plain", {**common, "gradient_checkpointing": False})
    train(tiny, tmp_path / "recomputed", {**common, "gradient_checkpointing": True})
    plain, recomputed = read(tmp_path / "plain"), read(tmp_path / "recomputed")
    for name, value in plain.tensors.items():
        torch.testing.assert_close(recomputed.tensors[name], value)
    assert max(value.abs().max() for name, value in plain.tensors.items() if name.endswith("steer_shift")) > 1e-4


@pytest.mark.parametrize(
    ("how", "kind"),
    [
        ({"load_4bit": True}, bitsandbytes.nn.Linear4bit),
        ({"load_8bit": True}, bitsandbytes.nn.Linear8bitLt),
        ({}, nn.Linear),
    ],
    ids=["4 bits", "8 bits", "16 bits"],
)
def test_an_adapter_trained_on_four_bits_loads_on_any_with_its_trained_projector(
    four_bit: tuple[Path, Any], tiny: TinyLlava, how: dict[str, bool], kind: type
) -> None:
    loaded = load(four_bit[0], **how)
    model = loaded[1]
    assert linear_kinds(model) == {kind}
    for name, value in read(four_bit[0]).section(EXTRA).items():
        torch.testing.assert_close(model.get_parameter(name), value.to(model.dtype), rtol=0, atol=0)
    assert bool(answer(loaded, tiny).isfinite().all())


def test_over_four_bits_the_base_has_its_own_packed_projector_while_the_adapter_is_off_and_once_it_is_removed(
    four_bit: tuple[Path, Any], tiny: TinyLlava
) -> None:
    from llava_steering_plugin import disabled, remove

    plain, loaded = load(tiny.llava, load_4bit=True), load(four_bit[0], load_4bit=True)
    model, expected = loaded[1], answer(plain, tiny)
    kinds = [type(part) for part in plain[1].get_model().mm_projector]
    assert bitsandbytes.nn.Linear4bit in kinds
    with disabled(model):
        assert torch.equal(answer(loaded, tiny), expected)
    tuned = answer(loaded, tiny)
    assert not torch.equal(tuned, expected)
    remove(model)
    assert [type(part) for part in model.get_model().mm_projector] == kinds
    assert torch.equal(answer(loaded, tiny), expected)


# All factors are chosen: over a tiny random model, rounding to 4 bits turns some choices, and with them the update.
@pytest.mark.parametrize("mode", [{}, {**MIXLORA, "mixlora_factors": 4, "mixlora_rank": 4}], ids=["MoReS", "MixLoRA"])
def test_an_adapter_trained_on_sixteen_bits_loads_on_four_and_works_there_too(
    tiny: TinyLlava, tmp_path: Path, mode: Mapping[str, object]
) -> None:
    from llava_steering_plugin import disabled

    train(tiny, tmp_path / "pets", {"learning_rate": 1e-2, "freeze_mm_mlp_adapter": True, **mode})
    whole, packed = load(tmp_path / "pets"), load(tmp_path / "pets", load_4bit=True)
    assert linear_kinds(packed[1]) == {bitsandbytes.nn.Linear4bit}
    moves = []
    for loaded in (whole, packed):
        with disabled(loaded[1]):
            before = answer(loaded, tiny)
        moves.append(answer(loaded, tiny) - before)
    # Quantisation of a model of width 64 is coarse; the adapter must push the logits the same way all the same.
    assert float(torch.cosine_similarity(moves[0], moves[1], dim=0)) > 0.5
    assert len(moves[0]) > HIDDEN


def test_quantised_weights_under_zero_3_are_refused_before_anything_is_loaded(
    tiny: TinyLlava, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = tmp_path / "zero3.json"
    settings.write_text('{"zero_optimization": {"stage": 3}}')
    with pytest.raises(SystemExit):
        train(tiny, tmp_path / "run", {"bits": 4, "deepspeed": settings, "use_cpu": None})
    assert "--bits 4 with ZeRO-3" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
