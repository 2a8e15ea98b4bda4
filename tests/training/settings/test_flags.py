"""A training's command line as one request, and what is wrong with it: on LLaVA's own flags, without a model.

Covers `training/settings/flags.py`, `training/settings/conflicts.py` and `training/deepspeed_config.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llava_steering_plugin.adapters.stored.config import AdapterConfig, BaseModel
from llava_steering_plugin.adapters.stored.writing import write_folder
from llava_steering_plugin.modes.mores import MoReS
from llava_steering_plugin.training.settings.flags import TrainingRequest, read_request
from llava_steering_plugin.upstream.train.training import flag_classes

BASE = BaseModel("/models/base", "llava_llama", 64, 4, 700)


@pytest.fixture(autouse=True)
def needs_llava(patched_llava: Path) -> None:
    """The flags are those of the llava under test."""


def request(*words: str) -> TrainingRequest:
    """Read a command line with these flags."""
    from llava.train import train

    return read_request(flag_classes(train), ["--output_dir", "out", *words])


def problems(*words: str) -> list[str]:
    """Return what is wrong with a training by these flags."""
    return list(request(*words).problems)


def adapter(folder: Path, mode: str = "mores", **settings: object) -> str:
    write_folder(folder, AdapterConfig(mode, settings, BASE, "v1"), {}, "{}", "")
    return str(folder)


@pytest.mark.parametrize(
    ("mode", "settings", "expected"),
    [
        ("mores", {"rank": 2, "speed": 3}, ("cannot take these settings", "no speed, only rank")),
        ("mores", {"rank": "2"}, ("rank is '2' where int is expected",)),
        ("mores", {"rank": 0}, ("mores_rank is 0",)),
        ("morse", {}, ("unknown tuning mode 'morse': did you mean 'mores'?",)),
    ],
)
def test_an_adapter_of_a_mode_that_is_another_here_is_one_problem_among_the_others(
    tmp_path: Path, mode: str, settings: dict[str, object], expected: tuple[str, ...]
) -> None:
    path = adapter(tmp_path / "pets", mode, **settings)
    first, second = problems("--adapter_path", path, "--lora_enable", "True")
    assert all(part in first for part in expected)
    assert "--lora_enable cannot be combined" in second


@pytest.mark.parametrize("where", ["a folder", "the hub"])
def test_an_adapter_is_no_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    cached = tmp_path / "models--somebody--pets"
    name = adapter(cached / "snapshots" / "0123")
    if where == "the hub":
        (cached / "refs").mkdir()
        (cached / "refs" / "main").write_text("0123")
        name = "somebody/pets"
    [problem] = problems("--model_name_or_path", name, "--tuning_mode", "mores")
    assert problem.startswith(f"--model_name_or_path {name} is an adapter.") and f"--adapter_path {name}" in problem


def test_an_adapter_of_another_mode_than_the_flags_say_is_refused(tmp_path: Path) -> None:
    path = adapter(tmp_path / "pets", rank=1)
    assert problems("--adapter_path", path, "--tuning_mode", "mixlora") == [
        f"--adapter_path {path} is a mores adapter and --tuning_mode says mixlora"
    ]
    assert problems("--adapter_path", path, "--tuning_mode", "mores") == []


@pytest.mark.parametrize("word", ["--mores_rnak", "-mores_rank", "\N{EM DASH}mores_rank", "\N{EN DASH}mores_rank=3"])
def test_a_flag_with_a_slip_of_the_pen_is_named_with_the_one_that_was_meant(word: str) -> None:
    assert problems("--tuning_mode", "mores", word) == [
        f"unknown flag {word.partition('=')[0]}; did you mean --mores_rank?"
    ]


def test_negative_numbers_are_no_flags() -> None:
    assert problems("--tuning_mode", "mores", "--mm_vision_select_layer", "-2") == []


def test_all_problems_are_found_at_once() -> None:
    assert len(problems("--tuning_mode", "mores", "--mores_rank", "0", "--bogus", "--fsdp", "full_shard")) == 3


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[]", "holds no JSON object but a list"),
        ('"zero2"', "holds no JSON object but a string"),
        ('{"zero_optimization": true}', "its zero_optimization is no JSON object but true or false"),
        ('{"zero_optimization": {"stage": "auto"}}', "is 'auto'; it must be 0, 1, 2 or 3"),
        ('{"zero_optimization": {"stage": 7}}', "is 7; it must be 0, 1, 2 or 3"),
        ("{", "cannot be read"),
        ('{"zero_optimization": null}', "has no ZeRO stage"),
        ('{"zero_optimization": {"stage": 0}}', "Leave out --deepspeed and start with torchrun"),
        ("{}", "has no ZeRO stage"),
    ],
)
def test_a_deepspeed_file_that_is_none_or_does_not_shard_is_one_problem(
    tmp_path: Path, text: str, expected: str
) -> None:
    settings = tmp_path / "zero.json"
    settings.write_text(text)
    (problem,) = problems("--tuning_mode", "mores", "--deepspeed", str(settings))
    assert f"--deepspeed {settings}" in problem and expected in problem


def test_a_request_holds_every_flag_and_the_mode_with_its_settings(tmp_path: Path) -> None:
    made = request("--tuning_mode", "mores", "--mores_rank", "3", "--learning_rate", "0.5", "--model_name_or_path", "x")
    assert made.mode == MoReS(rank=3)
    assert (made.flags.learning_rate, made.flags.model_name_or_path, made.problems) == (0.5, "x", ())
    continued = request("--adapter_path", adapter(tmp_path / "pets", rank=2))
    assert continued.mode == MoReS(rank=2)


def test_without_a_mode_a_request_has_none_and_a_modes_flag_is_a_problem() -> None:
    assert request().mode is None and request().problems == ()
    assert problems("--mores_rank", "2") == [
        "--mores_rank belongs to a tuning mode and none is on; add --tuning_mode mores"
    ]


def test_where_not_all_flags_are_known_only_those_of_the_modes_are_checked() -> None:
    from llava.train import train

    words = ["--output_dir", "out", "--tuning_mode", "mores", "--mores_rnak", "2", "--learnign_rate", "1"]
    classes = flag_classes(train)
    assert [len(read_request(classes, words, complete=complete).problems) for complete in (True, False)] == [2, 1]


def test_an_adapter_on_the_hub_is_looked_up_once_for_a_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    cached = tmp_path / "models--somebody--pets"
    folder = adapter(cached / "snapshots" / "0123", rank=2)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0123")
    asked: list[str] = []
    original = huggingface_hub.snapshot_download

    def download(name: str, **how: Any) -> str:
        asked.append(name)
        return original(name, **how)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    read = request("--adapter_path", "somebody/pets")
    assert read.adapter is not None and str(read.adapter) == folder
    assert read.mode == MoReS(rank=2)
    assert asked == ["somebody/pets"]
