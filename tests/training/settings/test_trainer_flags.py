"""Flags of transformers' Trainer that it would accept and then ignore, or die of, are refused before a model is loaded.

Covers `training/settings/trainer_flags.py`, `training/settings/validation_flags.py` and `training/attaching.py`.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from rank_runs import losses
from tiny_llava import TinyLlava
from training_runs import train_flags, train_in_process

from llava_steering_plugin.training.settings.flags import read_request
from llava_steering_plugin.training.settings.trainer_flags import machine_problems
from llava_steering_plugin.upstream.train.training import flag_classes

MORES = ("--tuning_mode", "mores")


@pytest.fixture(autouse=True)
def needs_llava(patched_llava: Path) -> None:
    """The flags are those of the llava under test."""


def problems(*words: str) -> list[str]:
    """Return what is wrong with a training by these flags, on this machine too."""
    from llava.train import train

    request = read_request(flag_classes(train), ["--output_dir", "out", "--report_to", "none", *words])
    return [*request.problems, *machine_problems(request.flags)]


@pytest.mark.parametrize(
    ("flag", "value", "expected"),
    [
        ("label_smoothing_factor", "0.1", "LLaVA computes the loss itself"),
        ("neftune_noise_alpha", "5", "LLaVA embeds its texts as one row"),
        ("past_index", "0", "LLaVA's models take no such input"),
        ("remove_unused_columns", "True", "it would remove the images"),
        ("label_names", "targets", "it has no effect"),
        ("auto_find_batch_size", "True", "half-trained weights"),
        ("dispatch_batches", "True", "cannot be handed from one rank"),
        ("do_predict", "True", "it has no effect"),
        ("include_inputs_for_metrics", "True", "it has no effect"),
        ("bf16_full_eval", "True", "it has no effect"),
        ("jit_mode_eval", "True", "it has no effect"),
        ("use_legacy_prediction_loop", "True", "it has no effect"),
        ("use_ipex", "True", "it replaces modules"),
        ("save_safetensors", "False", "adapters are always saved as safetensors"),
        ("lora_weight_path", "/a/lora", "no LoRA is loaded"),
        ("fsdp_config", "fsdp.json", "FSDP flattens"),
        ("per_device_train_batch_size", "0", "it must be at least 1"),
        ("gradient_accumulation_steps", "0", "it must be at least 1"),
        ("num_train_epochs", "0", "there is nothing to train"),
        ("bits", "3", "it must be 4, 8 or 16"),
        ("dataloader_persistent_workers", "True", "needs --dataloader_num_workers"),
        ("optim", "adamw_apex_fused", "needs apex, which is not installed"),
        ("optim", "adamw_anyprecision", "needs torchdistx, which is not installed"),
        ("optim", "adamw_tocrh", "did you mean 'adamw_torch'?"),
        ("report_to", "tensorbord", "is unknown; here there are"),
        ("metric_for_best_model", "accuracy", "a validation computes loss = eval_loss alone"),
        ("metric_for_best_model", "loss", "has no effect without --evaluation_strategy"),
        ("greater_is_better", "True", "would keep the worst checkpoint"),
        ("eval_steps", "10", "has no effect without --evaluation_strategy steps"),
    ],
)
def test_a_flag_that_cannot_work_is_one_line_that_names_it(flag: str, value: str, expected: str) -> None:
    (problem,) = problems(*MORES, f"--{flag}", value)
    assert problem.startswith(f"--{flag}") and expected in problem
    assert problems(f"--{flag}", value) == machine_problems_alone(flag, value), "upstream as it is without a mode"


def machine_problems_alone(flag: str, value: str) -> list[str]:
    """What the machine lacks is asked for trainings with a mode only; here it is asked for both."""
    return problems(f"--{flag}", value) if flag in ("optim", "report_to") else []


def test_of_two_ways_to_group_samples_one_would_be_ignored() -> None:
    both = ("--group_by_length", "True", "--group_by_modality_length", "True")
    assert problems(*MORES, *both) == [
        "--group_by_length has no effect beside --group_by_modality_length; remove one of the two"
    ]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--include_num_input_tokens_seen", "True"), "works on one rank only"),
        (("--ddp_find_unused_parameters", "True", "--gradient_checkpointing", "True"), "for a second use"),
    ],
)
def test_what_dies_on_several_ranks_is_refused_there_alone(
    monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], expected: str
) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert problems(*MORES, *words) == []
    monkeypatch.setenv("WORLD_SIZE", "2")
    (problem,) = problems(*MORES, *words)
    assert problem.startswith(words[0]) and expected in problem


@pytest.mark.parametrize(
    "words",
    [
        ("--evaluation_strategy", "steps"),
        ("--evaluation_strategy", "epoch"),
        ("--do_eval", "True"),
        ("--load_best_model_at_end", "True"),
        ("--lr_scheduler_type", "reduce_lr_on_plateau"),
    ],
)
def test_an_evaluation_without_data_is_refused_with_the_flag_that_brings_them(words: tuple[str, str]) -> None:
    (problem,) = problems(*MORES, *words)
    assert words[0] in problem and "--eval_data_path FILE" in problem


def test_all_that_asks_for_an_evaluation_is_one_problem() -> None:
    (problem,) = problems(*MORES, "--evaluation_strategy", "steps", "--do_eval", "True")
    assert problem.startswith("--evaluation_strategy steps and --do_eval cannot be combined with a tuning mode without")


def test_data_to_validate_on_that_nothing_uses_is_refused(tiny: TinyLlava) -> None:
    data = ("--eval_data_path", str(tiny.data))
    assert problems(*data) == [f"{' '.join(data)} works with a tuning mode only; add --tuning_mode"]
    (problem,) = problems(*MORES, *data)
    assert problem.startswith(f"{' '.join(data)} has no effect: add --evaluation_strategy")
    assert problems(*MORES, *data, "--evaluation_strategy", "epoch") == []
    assert problems(*MORES, *data, "--do_eval", "True") == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [(None, "cannot be read: No such file"), ("[", "is no JSON"), ("{}", "holds no list"), ("[]", "holds no list")],
)
def test_a_file_to_validate_on_is_looked_at_first(tmp_path: Path, text: str | None, expected: str) -> None:
    file = tmp_path / "held-out.json"
    if text is not None:
        file.write_text(text)
    (problem,) = problems(*MORES, "--evaluation_strategy", "steps", "--eval_data_path", str(file))
    assert f"--eval_data_path {file} {expected}" in problem


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ({"save_strategy": "epoch"}, "--evaluation_strategy is steps and --save_strategy epoch"),
        ({"eval_steps": 2, "save_steps": 3}, "to be a multiple of --eval_steps; they are 3 and 2"),
        ({"eval_steps": 0.1, "save_steps": 3}, "to be a multiple of --eval_steps; they are 3 and 0.1"),
        ({"eval_steps": 0.1, "save_steps": 0.3}, None),
        ({"eval_steps": 2, "save_steps": 4}, None),
        ({"logging_steps": 5, "save_steps": 7}, "they are 7 and 5"),
    ],
)
def test_the_best_checkpoint_needs_a_checkpoint_for_each_evaluation(
    tiny: TinyLlava, words: dict[str, object], expected: str | None
) -> None:
    given = [part for name, value in words.items() for part in (f"--{name}", str(value))]
    asked = ("--evaluation_strategy", "steps", "--eval_data_path", str(tiny.data), "--load_best_model_at_end", "True")
    found = problems(*MORES, *asked, *given)
    assert found == [] if expected is None else len(found) == 1 and expected in found[0]


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({"fp16": True, "bf16": False}, "can only be used on CUDA"),
        ({"deepspeed": "/nowhere/zero.json"}, "/nowhere/zero.json"),
        ({"version": "vicuna_v2"}, "--version vicuna_v2 is no conversation template; did you mean 'vicuna_v1'?"),
        ({"vision_tower": None}, "--vision_tower is missing"),
    ],
)
def test_what_transformers_and_llava_would_say_with_a_traceback_or_not_at_all_is_one_message(
    tiny: TinyLlava, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: dict[str, object], expected: str
) -> None:
    with pytest.raises(SystemExit) as stopped:
        train_in_process(train_flags(tiny, tmp_path / "run", {"tuning_mode": "mores", **flags}))
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert "this training cannot start:\n  - " in error and expected in error and "Traceback" not in error


def test_a_data_loader_that_keeps_no_batch_is_refused_before_the_first_step(
    tiny: TinyLlava, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = {"tuning_mode": "mores", "dataloader_drop_last": True, "per_device_train_batch_size": 64}
    with pytest.raises(SystemExit):
        train_in_process(train_flags(tiny, tmp_path / "run", wanted))
    error = capsys.readouterr().err
    assert "--dataloader_drop_last leaves no batch of 24 samples" in error and "Traceback" not in error


def test_what_may_look_odd_and_works_is_not_refused(tiny: TinyLlava, tmp_path: Path) -> None:
    flags = {
        "tuning_mode": "mores",
        "optim": "adafactor",
        "lr_scheduler_type": "inverse_sqrt",
        "include_num_input_tokens_seen": True,
        "split_batches": True,
        "skip_memory_metrics": False,
        "per_device_eval_batch_size": 4,
        "lora_r": 128,
        "max_steps": 1,
    }
    train_in_process(train_flags(tiny, tmp_path / "run", flags))
    assert len(losses(tmp_path / "run")) == 1
