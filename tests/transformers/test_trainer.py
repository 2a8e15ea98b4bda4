"""transformers' own Trainer with an adapter: its checkpoints are adapters, it resumes to the bit, checks and measures.

Covers `training/trainer.py`, `training/attaching.py` and `training/saving/beside_adapter.py`.
"""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from chat_bases import BASES, Collator, samples
from steering_trainer import trainer_of
from transformers import AutoProcessor, Trainer, TrainingArguments

from llava_steering_plugin import SteeringTrainerMixin, attach, attachment_of, from_pretrained, get_model
from llava_steering_plugin.errors import ArgumentsError, CheckpointError, SteeringError
from llava_steering_plugin.modes.base import Mode
from llava_steering_plugin.modes.mixlora import MixLoRA
from llava_steering_plugin.modes.mores import MoReS

pytest.importorskip("easy_vqa", reason="easy-vqa is missing: scripts/setup.sh --transformers installs it")
MODES: list[Mode] = [MoReS(rank=2, dropout=0.2), MixLoRA(factors=8, rank=2, balance=0.3)]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    BASES["Llava"](folder)
    return folder


def adapter_in(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "adapter_model.safetensors")


def losses(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.name)
@pytest.mark.parametrize("accumulation", [1, 3])
def test_a_resumed_training_ends_bit_equal(base: Path, tmp_path: Path, mode: Mode, accumulation: int) -> None:
    flags: dict[str, Any] = {"gradient_accumulation_steps": accumulation}
    whole = trainer_of(base, tmp_path / "whole", mode, **flags)
    whole.train()
    checkpoint = tmp_path / "whole" / "checkpoint-3"
    assert not any(path.name.startswith(("model", "pytorch_model")) for path in checkpoint.iterdir())
    assert (checkpoint / "adapter_model.safetensors").stat().st_size < 1_000_000

    shutil.copytree(checkpoint, tmp_path / "again" / "checkpoint-3")
    again = trainer_of(base, tmp_path / "again", mode, **flags)
    again.train(resume_from_checkpoint=True)
    first, second = (adapter_in(tmp_path / name / "checkpoint-6") for name in ("whole", "again"))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    assert losses(again) == losses(whole) and len(losses(whole)) == 6
    before = adapter_in(checkpoint)
    assert any(not torch.equal(first[name], before[name]) for name in first if name.startswith("adapter."))


def test_checkpoints_load_with_their_base_and_answer_as_the_trained_model(base: Path, tmp_path: Path) -> None:
    trainer = trainer_of(base, tmp_path, MoReS(rank=2), num_train_epochs=1, max_steps=-1)
    trainer.train()
    trainer.save_model()
    batch = Collator(trainer.processing_class)(samples(2))
    with torch.no_grad():
        expected = trainer.model.eval()(**batch).logits
        plain = transformers.AutoModelForImageTextToText.from_pretrained(base)(**batch).logits
        assert not torch.equal(expected, plain)
        for folder in (tmp_path, tmp_path / "checkpoint-4"):
            loaded = from_pretrained(folder)
            assert torch.equal(loaded(**batch).logits, expected)
            assert AutoProcessor.from_pretrained(folder).chat_template == trainer.processing_class.chat_template
    attachment = attachment_of(from_pretrained(tmp_path))
    assert attachment is not None and attachment.config is not None
    assert attachment.config.trained_on == {"bits": 32, "compute dtype": "float32"}

    ended = trainer_of(base, tmp_path, MoReS(rank=2), num_train_epochs=1, max_steps=-1)
    assert ended.train(resume_from_checkpoint=True).global_step == 4  # and no step more
    with torch.no_grad():
        assert torch.equal(ended.model.eval()(**batch).logits, expected)
    longer = trainer_of(base, tmp_path, MoReS(rank=2), num_train_epochs=2, max_steps=-1)
    assert longer.train(resume_from_checkpoint=True).global_step == 8


@pytest.mark.parametrize("mode", MODES, ids=["mores", "mixlora"])
def test_diagnostics_are_measured_and_change_nothing(mode: Mode, base: Path, tmp_path: Path) -> None:
    plain = trainer_of(base, tmp_path / "plain", mode)
    plain.train()
    drawn = torch.get_rng_state()
    measured = trainer_of(
        base, tmp_path / "measured", mode, steering_diagnostics_steps=2, steering_diagnostics_samples=2
    )
    measured.train()
    assert torch.equal(torch.get_rng_state(), drawn)
    # Not to the bit: those of MKL's products may depend on where operands lie in memory (docs/reliability.md).
    assert losses(measured) == pytest.approx(losses(plain), rel=1e-6)
    header, *lines = map(json.loads, (tmp_path / "measured" / "diagnostics.jsonl").read_text().splitlines())
    assert header["mode"] == mode.name and len(header["samples"]) == 2
    assert [line["step"] for line in lines] == [0, 2, 4, 6]
    measure = "routing" if mode.name == "mixlora" else "update_norms"
    assert all(line["lmar"]["answers"] == 2 and measure in line for line in lines)


def test_the_best_checkpoint_is_the_result_and_an_evaluation_leaves_no_trace(base: Path, tmp_path: Path) -> None:
    plain = trainer_of(base, tmp_path / "plain", MODES[0])
    plain.train()
    trainer = trainer_of(
        base, tmp_path / "best", MODES[0], eval_strategy="steps", eval_steps=3, load_best_model_at_end=True,
        eval_dataset=samples(4),
    )  # fmt: skip
    trainer.train()
    assert losses(trainer) == losses(plain)
    trainer.save_model()
    best = adapter_in(Path(trainer.state.best_model_checkpoint))
    assert all(torch.equal(value, best[name]) for name, value in adapter_in(tmp_path / "best").items())


def test_a_parameter_without_gradients_ends_the_training(base: Path, tmp_path: Path) -> None:
    model = get_model(transformers.AutoModelForImageTextToText.from_pretrained(base), MoReS(rank=2))
    attachment = attachment_of(model)
    assert attachment is not None
    for name, parameter in attachment.trained().items():
        if name.startswith("layers.1."):
            parameter.register_hook(torch.zeros_like)
    trainer = trainer_of(base, tmp_path, None, model, max_steps=12, save_strategy="no")
    with pytest.raises(SteeringError, match=r"after 10 step\(s\), \d of .* cannot learn[^!]*layers\.1\."):
        trainer.train()


def test_what_cannot_be_trained_is_refused_before_the_trainer_is_built(base: Path, tmp_path: Path) -> None:
    model = transformers.AutoModelForImageTextToText.from_pretrained(base)
    with pytest.raises(SteeringError, match="carries none"):
        trainer_of(base, tmp_path, None, model)
    attach(model, "mores")
    with pytest.raises(SteeringError, match=r"parameters of the base would be trained.*get_model"):
        trainer_of(base, tmp_path, None, model)
    model.requires_grad_(False)
    attachment = attachment_of(model)
    assert attachment is not None
    for parameter in attachment.trained().values():
        parameter.requires_grad_(True)
    model.model.multi_modal_projector.requires_grad_(True)  # what an adapter can hold belongs to it
    trainer_of(base, tmp_path, None, model)
    assert {name.split(".")[1] for name in attachment.extras} == {"multi_modal_projector"}
    with pytest.raises(ArgumentsError, match="steering_diagnostics_steps is -1"):
        trainer_of(base, tmp_path, None, model, steering_diagnostics_steps=-1)


class Resizing(Trainer):
    """Does in its constructor what TRL's does for the tokens of another chat template, and for quantised models."""

    def __init__(self, model: Any, **rest: Any):
        if rest["args"].seed == 0:
            model.resize_token_embeddings(model.config.text_config.vocab_size + 2)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(torch.bfloat16)
        super().__init__(model=model, **rest)


class SteeringResizing(SteeringTrainerMixin, Resizing):
    """As a user writes it."""


def test_what_the_constructor_of_a_trainer_changes_is_undone_or_refused(base: Path, tmp_path: Path) -> None:
    model = get_model(transformers.AutoModelForImageTextToText.from_pretrained(base), MoReS(rank=2))
    attachment = attachment_of(model)
    assert attachment is not None
    before = {name: each.clone() for name, each in attachment.trained().items()}
    SteeringResizing(model=model, args=TrainingArguments(str(tmp_path), report_to=[], use_cpu=True))
    for name, parameter in attachment.trained().items():
        assert parameter.dtype == torch.float32 and torch.equal(parameter, before[name])
    with pytest.raises(SteeringError, match="has resized the embeddings from 263 to 265 tokens"):
        SteeringResizing(model=model, args=TrainingArguments(str(tmp_path), report_to=[], use_cpu=True, seed=0))


def test_a_4_bit_base_is_trained(base: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is missing: scripts/setup.sh --transformers installs it")
    how = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    model = transformers.AutoModelForImageTextToText.from_pretrained(base, quantization_config=how)
    trainer = trainer_of(base, tmp_path, None, get_model(model, MoReS(rank=2)), max_steps=3)
    trainer.train()
    attachment = attachment_of(from_pretrained(tmp_path / "checkpoint-3"))
    assert attachment is not None and attachment.config is not None
    assert attachment.config.trained_on == {"bits": 4, "compute dtype": "float32"}
    with pytest.raises(ValueError, match="purely quantized"):  # what transformers says without the mixin
        Trainer(model=model, args=TrainingArguments(str(tmp_path), report_to=[], use_cpu=True))


def test_a_checkpoint_of_another_training_or_of_a_whole_model_is_not_resumed(base: Path, tmp_path: Path) -> None:
    trainer_of(base, tmp_path / "run", MoReS(rank=2), max_steps=3).train()
    with pytest.raises(CheckpointError, match="mores_rank is 1 and was 2"):
        trainer_of(base, tmp_path / "run", MoReS(rank=1)).train(resume_from_checkpoint=True)
    transformers.AutoModelForImageTextToText.from_pretrained(base).save_pretrained(tmp_path / "other" / "checkpoint-5")
    with pytest.raises(CheckpointError, match="another kind of training"):
        trainer_of(base, tmp_path / "other", MoReS(rank=2))


def test_an_incomplete_checkpoint_is_passed_over(base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer_of(base, tmp_path, MoReS(rank=2)).train()
    (tmp_path / "checkpoint-6" / "optimizer.pt").unlink()
    with caplog.at_level(logging.WARNING):
        again = trainer_of(base, tmp_path, MoReS(rank=2))
        again.train(resume_from_checkpoint=True)
    assert "checkpoint-6 is not complete" in caplog.text and len(losses(again)) == 6
