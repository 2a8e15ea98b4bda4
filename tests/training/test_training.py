"""Training through LLaVA's own train(), with nothing but `--tuning_mode` added to its flags.

Covers `training/trainer.py`, `upstream/train/trainer.py`, `upstream/train/attaching.py`, `upstream/train/training.py`,
and what an adapter records, `training/provenance.py`.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from rank_runs import assert_trained
from tiny_llava import HIDDEN, LAYERS, TinyLlava
from training_runs import plain_llm_overrides, train_flags, train_in_process

from llava_steering_plugin.adapters.stored.folder import ADAPTER, EXTRA, WEIGHTS, StoredAdapter
from llava_steering_plugin.adapters.stored.locate import find, read

MORES = {"tuning_mode": "mores", "mores_rank": 2, "mores_tokens": "all"}
FROZEN = {"freeze_mm_mlp_adapter": True}
PARAMETERS = LAYERS * (2 * HIDDEN * 2 + 2)


def train(tiny: TinyLlava, output: Path, overrides: Mapping[str, object]) -> StoredAdapter:
    train_in_process(train_flags(tiny, output, {**MORES, **overrides}))
    return read(output)


def assert_same_tensors(one: StoredAdapter, other: StoredAdapter) -> None:
    assert one.tensors.keys() == other.tensors.keys()
    different = [name for name, value in one.tensors.items() if not torch.equal(value, other.tensors[name])]
    assert not different


def refusal(
    tiny: TinyLlava, tmp_path: Path, overrides: Mapping[str, object], capsys: pytest.CaptureFixture[str]
) -> str:
    with pytest.raises(SystemExit) as stopped:
        train_in_process(train_flags(tiny, tmp_path / "refused", overrides))
    assert stopped.value.code == 2
    assert not (tmp_path / "refused").exists()
    return capsys.readouterr().err


@pytest.fixture(scope="module")
def whole_run(tiny: TinyLlava, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten steps, one and two thirds epochs, with dropout, checkpoints after the fourth and the eighth."""
    output = tmp_path_factory.mktemp("whole") / "run"
    train(tiny, output, RESUMABLE)
    return output


RESUMABLE = {**FROZEN, "mores_dropout": 0.1, "max_steps": 10, "save_strategy": "steps", "save_steps": 4}


def test_a_frozen_projector_leaves_an_adapter_of_kilobytes_that_changed(whole_run: Path) -> None:
    stored = read(whole_run)
    assert sum(value.numel() for value in stored.section(ADAPTER).values()) == PARAMETERS
    assert not stored.section(EXTRA)
    assert (whole_run / WEIGHTS).stat().st_size < 16_384
    shifts = [value for name, value in stored.section(ADAPTER).items() if name.endswith("steer_shift")]
    # The last layer's visual tokens reach no target; all others must have learned.
    assert all(bool(shift.abs().max() > 0) for shift in shifts[:-1])
    assert not [path for path in whole_run.rglob("*") if path.suffix == ".bin" and "optimizer" not in path.name]


def test_every_checkpoint_is_a_complete_adapter(whole_run: Path) -> None:
    for name in ("checkpoint-4", "checkpoint-8"):
        assert read(whole_run / name).config == read(whole_run).config
        assert (whole_run / name / "trainer_state.json").is_file()


@pytest.mark.parametrize("step", [4, 8])
def test_a_resumed_run_ends_bit_equal_to_the_uninterrupted_one(
    tiny: TinyLlava, whole_run: Path, tmp_path: Path, step: int
) -> None:
    # Step 4 is in the first epoch and the run goes on into the second; step 8 is in the second.
    shutil.copytree(whole_run / f"checkpoint-{step}", tmp_path / "run" / f"checkpoint-{step}")
    torch.manual_seed(1234)
    resumed = train(tiny, tmp_path / "run", RESUMABLE)
    assert_same_tensors(resumed, read(whole_run))


def test_a_plain_llm_with_a_pretrained_projector_gives_the_adapter_that_the_whole_llava_gives(
    tiny: TinyLlava, tmp_path: Path
) -> None:
    # Both bases have the same weights, so everything learned must be the same; only one must carry the projector.
    whole = train(tiny, tmp_path / "whole", {**FROZEN, "bf16": False})
    plain = train(tiny, tmp_path / "plain", {**FROZEN, "bf16": False, **plain_llm_overrides(tiny)})
    assert whole.section(ADAPTER).keys() == plain.section(ADAPTER).keys()
    for name, value in whole.section(ADAPTER).items():
        torch.testing.assert_close(plain.section(ADAPTER)[name], value)
    assert sorted(plain.section(EXTRA)) == [
        f"model.mm_projector.{layer}.{kind}" for layer in (0, 2) for kind in ("bias", "weight")
    ]
    assert plain.config.base.name_or_path == str(tiny.llm)


def test_a_trained_projector_is_in_the_adapter_and_follows_its_own_learning_rate(
    tiny: TinyLlava, tmp_path: Path
) -> None:
    still = train(tiny, tmp_path / "still", {"mm_projector_lr": 0.0, "bf16": False})
    moved = train(tiny, tmp_path / "moved", {"mm_projector_lr": 1e-2, "bf16": False})
    original = torch.load(tiny.projector, weights_only=True)
    for name, value in still.section(EXTRA).items():
        torch.testing.assert_close(value, original[name].to(value.dtype), msg=name)
        assert not torch.equal(moved.section(EXTRA)[name], value)


def test_training_continues_from_an_adapter(tiny: TinyLlava, whole_run: Path, tmp_path: Path) -> None:
    flags = {"tuning_mode": None, "mores_rank": None, "mores_tokens": None, "adapter_path": whole_run}
    unchanged = train(tiny, tmp_path / "unchanged", {**FROZEN, **flags, "learning_rate": 0.0})
    assert_same_tensors(unchanged, read(whole_run))
    continued = train(tiny, tmp_path / "continued", {**FROZEN, **flags})
    assert continued.config.settings == read(whole_run).config.settings
    assert any(not torch.equal(value, unchanged.tensors[name]) for name, value in continued.tensors.items())


def test_accumulated_steps_equal_one_large_batch(tiny: TinyLlava, tmp_path: Path) -> None:
    # One answer of one token each: losses are means over tokens, and only then is the mean of means the mean.
    data = tmp_path / "data.json"
    samples = json.loads(tiny.data.read_text())[:1] * 4
    data.write_text(json.dumps(samples))
    common = {**FROZEN, "data_path": data, "bf16": False, "group_by_modality_length": False, "max_steps": 2}
    large = train(tiny, tmp_path / "large", {**common, "per_device_train_batch_size": 4})
    small = train(
        tiny, tmp_path / "small", {**common, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    )
    for name, value in large.tensors.items():
        torch.testing.assert_close(small.tensors[name], value, rtol=1e-3, atol=1e-5)
    assert_trained(large)


def test_without_gradient_checkpointing_the_result_is_the_same(tiny: TinyLlava, tmp_path: Path) -> None:
    common = {**FROZEN, "bf16": False}
    plain = train(tiny, tmp_path / "plain", {**common, "gradient_checkpointing": False})
    recomputed = train(tiny, tmp_path / "recomputed", {**common, "gradient_checkpointing": True})
    for name, value in plain.tensors.items():
        torch.testing.assert_close(recomputed.tensors[name], value)
    assert_trained(plain)


def test_tensorboard_sees_the_losses(tiny: TinyLlava, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(tiny, tmp_path / "run", {**FROZEN, "report_to": "tensorboard", "logging_dir": tmp_path / "board"})
    board = EventAccumulator(str(tmp_path / "board")).Reload()
    history = json.loads((tmp_path / "run" / "trainer_state.json").read_text())["log_history"]
    losses = [entry["loss"] for entry in history if "loss" in entry]
    assert len(losses) == 3
    assert [event.value for event in board.Scalars("train/loss")] == pytest.approx(losses)


def test_the_table_at_the_start_compares_with_lora(
    tiny: TinyLlava, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(tiny, tmp_path / "run", {"max_steps": 1})
    shown = " ".join(capsys.readouterr().out.split())
    projector = HIDDEN * HIDDEN * 2 + 2 * HIDDEN
    for expected in (f"{PARAMETERS:,}", f"{projector:,}", f"{PARAMETERS + projector:,}", "LoRA r=8", "LoRA r=128"):
        assert expected in shown
    shares = re.findall(r"(mores|projector|total) │ ([\d,]+) │ (\d+\.\d{4}) %", shown)
    assert [name for name, _, _ in shares] == ["mores", "projector", "total"]
    wholes = [int(count.replace(",", "")) / float(share) for _, count, share in shares]
    assert wholes == pytest.approx([wholes[0]] * 3, rel=1e-2), "each is a share of the same whole"


def test_a_batch_without_targets_warns_once_and_names_its_samples(
    tiny: TinyLlava, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = tmp_path / "data.json"
    samples = [sample for sample in json.loads(tiny.data.read_text()) if "image" in sample][:4]
    for number, sample in enumerate(samples):
        sample["id"] = f"photo-{number}"
        # Behind the cut that --model_max_length makes once the image is in: the answer is lost.
        sample["conversations"][0]["value"] += " and then" * 60
    data.write_text(json.dumps(samples))
    with caplog.at_level(logging.WARNING), pytest.raises(SystemExit):
        # Nothing can be learned from it either, so the training stops by itself.
        train(tiny, tmp_path / "run", {**FROZEN, "data_path": data, "model_max_length": 100, "max_steps": 12})
    warnings = [record.getMessage() for record in caplog.records if "no supervised token" in record.getMessage()]
    assert len(warnings) == 1
    assert "photo-" in warnings[0]


def test_everything_wrong_with_a_command_line_is_said_at_once(
    tiny: TinyLlava, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = {
        "tuning_mode": "mores",
        "mores_rank": 0,
        "mores_tokens": "f4+x",
        "mores_modality": "audio",
        "mores_layers": "3-1",
        "mores_dropout": 1.5,
        "mores_rnak": 3,
        "lora_enable": True,
        "tune_mm_mlp_adapter": True,
        "load_best_model_at_end": True,
    }
    error = refusal(tiny, tmp_path, flags, capsys)
    for expected in (
        "mores_rank is 0",
        "'x' is none of all, fN",
        "mores_modality is 'audio'",
        "runs backwards",
        "mores_dropout is 1.5",
        "unknown flag --mores_rnak; did you mean --mores_rank?",
        "--lora_enable cannot be combined",
        "--tune_mm_mlp_adapter cannot be combined",
        "--load_best_model_at_end cannot be combined",
    ):
        assert error.count(expected) == 1, error


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({"tuning_mode": "moers"}, "did you mean 'mores'?"),
        ({"mores_rank": 2}, "--mores_rank belongs to a tuning mode and none is on; add --tuning_mode mores"),
        ({"adapter_path": "nowhere"}, "nowhere is no folder"),
        ({**MORES, "mixlora_rank": 2}, "--mixlora_rank belongs to another mode than mores; remove it"),
    ],
)
def test_a_wrong_mode_says_what_to_do(
    tiny: TinyLlava, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: dict[str, object], expected: str
) -> None:
    assert expected in refusal(tiny, tmp_path, flags, capsys)


def test_an_adapter_given_as_the_base_points_to_adapter_path(
    tiny: TinyLlava, whole_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    error = refusal(tiny, tmp_path, {"model_name_or_path": whole_run}, capsys)
    assert f"--adapter_path {whole_run}" in error


def test_flags_that_contradict_the_adapter_to_continue_are_refused(
    tiny: TinyLlava, whole_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    error = refusal(tiny, tmp_path, {"adapter_path": whole_run, "mores_rank": 3, "mores_tokens": "all"}, capsys)
    assert "--mores_rank 3 contradicts the adapter in --adapter_path, which has 2" in error
    assert "mores_tokens" not in error


def test_what_base_and_machine_do_not_allow_is_refused_together_with_wrong_flags(
    tiny: TinyLlava, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    flags = {"tuning_mode": "mores", "mores_rank": HIDDEN + 1, "mores_tokns": "all", "use_cpu": None}
    error = refusal(tiny, tmp_path, flags, capsys)
    assert f"it cannot exceed the model's width of {HIDDEN}" in error
    assert "torchrun --nproc_per_node 2" in error
    assert "did you mean --mores_tokens" in error


@pytest.mark.parametrize("flag", ["use_cpu", "no_cuda"])
def test_a_training_that_is_kept_on_the_processor_starts_whatever_gpus_there_are(
    tiny: TinyLlava, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flag: str
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    overrides = {**MORES, "use_cpu": None, flag: True, "max_steps": 1}
    train_in_process(train_flags(tiny, tmp_path / "run", overrides))
    assert find(tmp_path / "run") is not None


def test_several_gpus_in_one_process_are_refused_with_the_launcher_to_use(
    tiny: TinyLlava, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # What transformers counts on a machine with two GPUs and no launcher; there is none here.
    import transformers

    monkeypatch.setattr(transformers.TrainingArguments, "n_gpu", property(lambda self: 2))
    error = refusal(tiny, tmp_path, MORES, capsys)
    assert "torchrun --nproc_per_node 2" in error
