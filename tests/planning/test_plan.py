"""`llava-steering plan` (`cli/plan.py`): what a training would train, or why it would not start.

Covers `planning/plan.py`, `planning/vision.py` and `upstream/model/projector.py`.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_llava import TinyLlava
from training_runs import plain_llm_overrides, subprocess_environment, train_flags
from typer.testing import CliRunner

from llava_steering_plugin.cli import app
from llava_steering_plugin.errors import ArgumentsError
from llava_steering_plugin.planning.plan import Plan, plan

PHI_2 = {
    "model_type": "phi",
    "hidden_size": 2560,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "intermediate_size": 10240,
    "vocab_size": 51200,
}
LLAVA_7B = {
    "model_type": "llava_llama",
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "intermediate_size": 11008,
    "vocab_size": 32000,
    "mm_vision_tower": "openai/clip-vit-large-patch14-336",
    "mm_hidden_size": 1024,
    "mm_projector_type": "mlp2x_gelu",
}
LLAVA_13B = LLAVA_7B | {
    "hidden_size": 5120,
    "num_hidden_layers": 40,
    "num_attention_heads": 40,
    "intermediate_size": 13824,
}
VICUNA_7B = {key: value for key, value in LLAVA_7B.items() if not key.startswith("mm_")} | {"model_type": "llama"}
PROJECTOR_7B = (1024 + 1) * 4096 + (4096 + 1) * 4096

Planned = Callable[..., Plan]


@pytest.fixture(scope="module", autouse=True)
def needs_llava(llava_copies: object) -> None:
    """Plans ask LLaVA for its flags; the one test without LLaVA hides it."""


@pytest.fixture
def planned(tmp_path: Path) -> Planned:
    """Plans MoReS on a model of which there is only this config.json."""

    def make(config: dict[str, Any], *flags: str) -> Plan:
        (tmp_path / "config.json").write_text(json.dumps(config))
        return plan(["--model_name_or_path", str(tmp_path), "--tuning_mode", "mores", *flags])

    return make


@pytest.mark.parametrize(("rank", "parameters"), [(1, 163_872), (2, 327_744), (4, 655_488)])
def test_phi_2_has_the_papers_number_of_parameters(planned: Planned, rank: int, parameters: int) -> None:
    made = planned(PHI_2, "--mores_rank", str(rank))

    assert made.counts is not None and made.counts.mode == parameters
    assert not made.problems


def test_two_modes_at_once_are_counted_together_and_apart(planned: Planned) -> None:
    made = planned(LLAVA_7B, "--tuning_mode", "mixlora+mores")
    assert not made.problems and made.mode == "mores+mixlora"
    counted = made.as_json()["parameters"]
    assert counted["parts"] == {"mores": 262_176, "mixlora": 149_291_008}
    assert counted["mode"] == sum(counted["parts"].values()) == 149_553_184


def test_what_does_not_fit_the_model_is_said_of_both_parts(planned: Planned) -> None:
    flags = ("--mores_rank", "5000", "--mixlora_start_layer", "32", "--mixlora_noise", "-1")
    problems = "\n".join(planned(LLAVA_7B, "--tuning_mode", "mores+mixlora", *flags).problems)
    for said in ("--mores_rank is 5000", "--mixlora_start_layer is 32", "--mixlora_noise is -1"):
        assert problems.count(said) == 1, problems


@pytest.mark.parametrize(("config", "parameters"), [(LLAVA_7B, 262_176), (LLAVA_13B, 409_640)], ids=["7B", "13B"])
def test_llava_has_the_papers_number_of_parameters(planned: Planned, config: dict[str, Any], parameters: int) -> None:
    made = planned(config)

    assert made.counts is not None and made.counts.mode == parameters


def test_the_whole_plan_of_llava_7b_is_exact(planned: Planned) -> None:
    made = planned(LLAVA_7B).as_json()

    layer = 4 * 4096 * 4096 + 3 * 4096 * 11008 + 2 * 4096
    model = 32 * layer + 2 * 32000 * 4096 + 4096
    lora = 32 * (4 * (4096 + 4096) + 3 * (4096 + 11008))
    trainable = 262_176 + PROJECTOR_7B
    assert made == {
        "mode": "mores",
        "settings": {"rank": 1, "tokens": "1%", "modality": "vis", "layers": "all", "dropout": 0.0},
        "parameters": {
            "mode": 262_176,
            "parts": {"mores": 262_176},
            "projector": PROJECTOR_7B,
            "trainable": trainable,
            "model": model,
            "percent": pytest.approx(100 * trainable / (model + 262_176)),
            "lora_r8": 8 * lora,
            "lora_r128": 128 * lora,
        },
        "memory": None,
        "notes": [],
        "problems": [],
    }


def test_a_frozen_projector_is_not_trained_and_counts_as_nothing(planned: Planned) -> None:
    counts = planned(LLAVA_7B, "--freeze_mm_mlp_adapter", "True").counts

    assert counts is not None and counts.other == 0 and counts.trainable == 262_176


def test_a_plain_language_model_gets_the_projector_that_the_flags_and_the_towers_config_describe(
    planned: Planned, tmp_path: Path
) -> None:
    tower = tmp_path / "tower"
    tower.mkdir()
    (tower / "config.json").write_text(json.dumps({"model_type": "clip", "vision_config": {"hidden_size": 1024}}))

    counts = planned(VICUNA_7B, "--vision_tower", str(tower), "--mm_projector_type", "mlp2x_gelu").counts

    assert counts is not None and counts.other == PROJECTOR_7B


@pytest.mark.parametrize(("side", "notes"), [(64, 1), (336, 0)])
def test_a_share_of_the_image_tokens_that_is_hardly_one_is_noted_once(
    planned: Planned, tmp_path: Path, side: int, notes: int
) -> None:
    (tmp_path / "tower").mkdir()
    (tmp_path / "tower" / "config.json").write_text(
        json.dumps({"model_type": "clip_vision_model", "hidden_size": 1024, "image_size": side, "patch_size": 14})
    )
    made = planned(LLAVA_7B | {"mm_vision_tower": str(tmp_path / "tower")})

    said = [note for note in made.notes if note.startswith("--mores_tokens 1% steers only 1 of the 16 tokens")]
    assert (len(said), len(made.notes)) == (notes, notes) and not made.problems


def test_a_projector_that_nothing_describes_is_unknown_rather_than_nothing(planned: Planned, tmp_path: Path) -> None:
    for flags, reason in (((), "--vision_tower is not given"), (("--vision_tower", str(tmp_path / "no")), "no folder")):
        made = planned(VICUNA_7B, *flags)

        assert made.as_json()["parameters"]["projector"] is made.as_json()["parameters"]["trainable"] is None
        assert reason in made.notes[0]
        assert not made.problems


@pytest.mark.parametrize(
    "config",
    [
        VICUNA_7B,
        VICUNA_7B | {"model_type": "llava"},
        VICUNA_7B | {"model_type": "llava_mistral", "num_key_value_heads": 8},
        {"model_type": "llava", "text_config": {"hidden_size": 4096, "num_hidden_layers": 32}},
        {"model_type": "llava_next", "text_config": VICUNA_7B | {"model_type": "mistral"}},
    ],
    ids=["llama", "llava's first", "llava_mistral", "transformers' llava", "transformers' llava_next"],
)
def test_the_language_model_is_found_in_every_kind_of_config(planned: Planned, config: dict[str, Any]) -> None:
    made = planned(config)

    assert made.counts is not None and made.counts.mode == 262_176


def test_a_training_scripts_flags_are_taken_as_they_are_and_count_what_training_counts(
    tiny: TinyLlava, tmp_path: Path
) -> None:
    mode = {"tuning_mode": "mores", "mores_rank": 2, "mores_tokens": "all"}
    script = train_flags(tiny, tmp_path, {**plain_llm_overrides(tiny), **mode})

    made = plan(["llava/train/train_mem.py", *script])

    assert not made.problems and not made.notes
    assert made.counts is not None
    assert made.counts.mode == 4 * (2 * 64 * 2 + 2)
    assert made.counts.other == 2 * (64 * 64 + 64)


def test_all_that_is_wrong_is_said_at_once_also_what_only_the_model_can_tell(planned: Planned) -> None:
    made = planned(
        PHI_2,
        *("--mores_rank", "2561", "--mores_tokens", "some", "--mores_layers", "30-40"),
        *("--mores_tokns", "all", "--lora_enable", "True"),
    )

    said = "\n".join(made.problems)
    assert made.counts is None and len(made.problems) == 5
    for part in ("--mores_rank is 2561; it cannot exceed", "'some' is none of", "goes beyond layer 31"):
        assert part in said
    assert "--mores_tokns; did you mean --mores_tokens?" in said and "--lora_enable cannot be combined" in said


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        ((), "--model_name_or_path is missing"),
        (("--model_name_or_path", "/no/such/model"), "there is no folder /no/such/model"),
        (("--tuning_mode", "none"), "--tuning_mode is missing; registered:"),
        (("--tuning_mode", "more"), "did you mean 'mores'?"),
    ],
)
def test_a_missing_or_unknown_base_or_mode_is_said(flags: tuple[str, ...], problem: str) -> None:
    made = plan(["--tuning_mode", "mores", *flags])

    assert made.counts is None
    assert any(problem in said for said in made.problems)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, "has no config.json"),
        ("{", "cannot be read"),
        ("[]", "holds no settings"),
        ("5", "holds no settings"),
        ("{}", "names no model_type"),
        ('{"model_type": "clip"}', "know no language model 'clip'"),
        ('{"model_type": "llava_unheard_of"}', "know no language model 'unheard_of'"),
        (json.dumps(VICUNA_7B | {"num_attention_heads": 0}), "describes no model that can be built"),
        (json.dumps(VICUNA_7B | {"hidden_size": "wide"}), "describes no model that can be built"),
        (json.dumps(VICUNA_7B | {"hidden_act": "bounce"}), "describes no model that can be built"),
    ],
)
def test_a_folder_that_describes_no_language_model_is_one_clear_problem(
    tmp_path: Path, content: str | None, problem: str
) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)

    made = plan(["--model_name_or_path", str(tmp_path), "--tuning_mode", "mores"])

    assert len(made.problems) == 1 and problem in made.problems[0] and str(tmp_path) in made.problems[0]


def test_without_llava_the_modes_flags_and_the_base_are_still_checked_and_the_rest_is_said_to_be_unchecked(
    planned: Planned, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "llava.train.train", None)
    monkeypatch.setitem(sys.modules, "llava.model.multimodal_projector.builder", None)

    fine = planned(LLAVA_7B, "--per_device_train_batch_size", "16", "--bf16", "True", "--mores_rank", "2")
    wrong = planned(LLAVA_7B, "--per_device_train_batch_size", "16", "--mores_rnk", "2")

    assert fine.counts is not None and fine.counts.mode == 524_352 and fine.counts.other is None
    assert "cannot be imported" in fine.notes[0] and not fine.problems
    assert wrong.problems == ("unknown flag --mores_rnk; did you mean --mores_rank?",)


def test_the_command_shows_a_table_and_says_what_it_does_not_know(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(PHI_2))

    result = CliRunner().invoke(app, ["plan", "--model_name_or_path", str(tmp_path), "--tuning_mode", "mores"])

    assert result.exit_code == 0
    assert "163,872" in result.stdout and "LoRA r=128" in result.stdout
    assert "projector" in result.stdout and "unknown" in result.stdout and "note: the projector" in result.stdout


def test_the_command_fails_with_one_message_or_with_json_that_lists_the_problems(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(PHI_2))
    words = ["plan", "--model_name_or_path", str(tmp_path), "--tuning_mode", "mores", "--mores_rank", "0"]

    told, listed = CliRunner().invoke(app, words), CliRunner().invoke(app, [*words, "--json"])

    assert isinstance(told.exception, ArgumentsError) and "--mores_rank is 0" in str(told.exception)
    assert listed.exit_code == 1
    made = json.loads(listed.stdout)
    assert made["problems"] == ["--mores_rank is 0; it must be at least 1"]
    assert set(made["parameters"].values()) == {None}


def test_a_value_that_is_no_number_is_named_without_pages_of_usage(
    planned: Planned, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        planned(PHI_2, "--mores_rank", "one")

    said = capsys.readouterr().err
    assert "argument --mores_rank: invalid int value: 'one'" in said and len(said.splitlines()) < 4


@pytest.mark.slow
def test_json_is_all_that_goes_to_standard_output(tmp_path: Path, patched_llava: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(PHI_2))
    words = ["--model_name_or_path", str(tmp_path), "--tuning_mode", "mores", "--mores_rank", "4", "--json"]

    result = subprocess.run(
        [sys.executable, "-m", "llava_steering_plugin", "plan", *words],
        env=subprocess_environment(patched_llava),
        capture_output=True,
        text=True,
        check=True,
    )

    assert json.loads(result.stdout)["parameters"]["mode"] == 655_488
