"""What `--peft_method` and `--peft_config` may say, and one message of all that they may not, before a model is loaded.

Covers `modes/peft/settings.py`, and `problems` of `modes/peft/mode.py`.
"""

from __future__ import annotations

import json
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
from tiny_llava import TinyLlava
from training_runs import train_flags, train_in_process

from llava_steering_plugin.errors import ArgumentsError
from llava_steering_plugin.modes import registry
from llava_steering_plugin.modes.base import DecoderShape, LayerShape, Mode
from llava_steering_plugin.modes.joint import joint
from llava_steering_plugin.modes.mores import MoReS
from llava_steering_plugin.modes.peft.mode import Peft
from llava_steering_plugin.modes.peft.settings import METHODS, config_class, method_problems, version
from llava_steering_plugin.planning.plan import plan

LINEARS = ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")
DECODER = DecoderShape(
    8, tuple(LayerShape(f"layers.{n}", {f"layers.{n}.{path}": (8, 16) for path in LINEARS}) for n in range(3))
)
PREFIX = "model.layers."


def problems(method: str = "lora", config: Any = None) -> list[str]:
    text = config if config is None or isinstance(config, str) else json.dumps(config)
    return Peft(method, text).problems(DECODER)


@pytest.mark.parametrize("method", METHODS)
def test_methods_without_settings_go_onto_every_linear(method: str) -> None:
    assert problems(method) == []
    assert list(Peft(method).build(DECODER)) == [path for layer in DECODER.layers for path in layer.linears]


@pytest.mark.parametrize(
    ("config", "hosts"),
    [
        ({"target_modules": ["q_proj"]}, ["0.self_attn.q_proj", "1.self_attn.q_proj", "2.self_attn.q_proj"]),
        ({"target_modules": ["model.layers.1.mlp.down_proj"]}, ["1.mlp.down_proj"]),
        ({"target_modules": r"model\.layers\.[02]\.mlp\.\w+"}, ["0.mlp.down_proj", "2.mlp.down_proj"]),
        ({"target_modules": ["v_proj"], "layers_to_transform": [2]}, ["2.self_attn.v_proj"]),
        ({"layers_to_transform": 1}, [f"1.{path}" for path in LINEARS]),
        ({"target_modules": "all-linear", "layers_to_transform": [0]}, [f"0.{path}" for path in LINEARS]),
    ],
)
def test_pefts_own_rules_choose_the_linears_and_the_file_for_peft_names_them_in_full(
    config: dict[str, Any], hosts: list[str]
) -> None:
    mode = Peft("lora", json.dumps(config))
    assert mode.problems(DECODER) == []
    assert sorted(mode.build(DECODER)) == sorted(f"layers.{path}" for path in hosts)
    described = mode.config_for_peft(DECODER)
    assert described["target_modules"] == sorted(PREFIX + path for path in hosts)
    assert described["layers_to_transform"] is None
    assert described["task_type"] == "CAUSAL_LM" and described["peft_type"] == "LORA"
    assert config_class("lora")(**described)


def test_a_config_that_peft_has_saved_is_taken_as_it_is() -> None:
    saved = config_class("lora")(
        r=4, target_modules=["q_proj"], base_model_name_or_path="x", inference_mode=True
    ).to_dict()
    assert problems("lora", json.dumps(saved, default=list)) == []


def test_two_ways_to_say_the_same_are_the_same_setting_and_all_that_counts_is_in_it() -> None:
    short, spaced = Peft("lora", '{"r":8}'), Peft("lora", ' { "r" : 8, "peft_type": "LORA", "bias": "none" }')
    assert short == spaced == Peft("lora")
    assert json.loads(short.config or "") == {
        "bias": "none",
        "init_lora_weights": True,
        "lora_alpha": 8,
        "lora_dropout": 0.0,
        "r": 8,
    }


def test_whatever_the_installed_peft_has_trains_here_or_is_refused_by_name_with_the_reason() -> None:
    from peft import PeftType

    reasons = {kind.value.lower(): " ".join(method_problems(kind.value.lower())) for kind in PeftType}
    assert [name for name, reason in reasons.items() if not reason] == [name for name in reasons if name in METHODS]
    for name, reason in reasons.items():
        assert not reason or reason.startswith(f"peft_method {name} is refused: "), reason
        assert not reason or reason.endswith(f"with PEFT {version()}: {', '.join(METHODS)}")
    assert "it needs a training loop that calls its update_and_allocate() after every step" in reasons["adalora"]


def test_a_method_of_peft_that_was_never_tried_is_not_taken_for_a_typing_error(monkeypatch: pytest.MonkeyPatch) -> None:
    from peft import PeftType

    monkeypatch.setattr("peft.PeftType", Enum("PeftType", [*PeftType.__members__, "XLORA"]))
    (reason,) = method_problems("xlora")
    assert reason.startswith("peft_method xlora is refused: PEFT has it") and "did you mean" not in reason


@pytest.mark.parametrize(
    ("method", "config", "said"),
    [
        ("lorra", None, "peft_method lorra is unknown; did you mean 'lora'? methods that train here, with PEFT "),
        ("dora", None, "peft_method dora is refused: it is an option of LoRA: --peft_method lora --peft_config"),
        ("adalora", None, "peft_method adalora is refused: it needs a training loop"),
        ("prefix_tuning", None, "peft_method prefix_tuning is refused: it adds vectors to prompts"),
        ("poly", None, ": ia3, loha, lokr, lora, oft"),
        ("lora", "nowhere.json", "peft_config: 'nowhere.json' is neither JSON in braces nor a file"),
        ("lora", '["r"]', "is neither JSON in braces"),
        ("lora", '{"r": 8', "peft_config: it is not JSON"),
        ("lora", '{"lora_alpha": NaN}', "NaN is not a valid number"),
        ("lora", "{" + "[" * 20_000, "peft_config: it has 20,001 characters"),
        ("lora", {"peft_type": "IA3"}, "peft_config is that of ia3, and peft_method is lora"),
        ("lora", {"rank": 8}, "rank is no setting of lora in PEFT"),
        ("lora", {"lora_aplha": 8}, "did you mean 'lora_alpha'?"),
        ("ia3", {"r": 8}, "r is no setting of ia3"),
        ("lora", {"r": "8"}, 'peft_config: r is "8", where int is expected'),
        ("lora", {"r": True}, "peft_config: r is true, where int is expected"),
        ("lora", {"r": 0}, "cannot build it: `r` should be a positive integer"),
        ("lora", {"lora_dropout": 1.5}, "lora_dropout is 1.5; it must be at least 0 and below 1"),
        (
            "lora",
            {"modules_to_save": ["lm_head"]},
            'modules_to_save ["lm_head"] cannot be used here: it would change the base',
        ),
        ("lora", {"bias": "all"}, 'bias "all" cannot be used here: it would change the base itself'),
        ("lora", {"init_lora_weights": "loftq"}, "a fresh adapter must leave the base's answers as they are"),
        ("oft", {"init_weights": False}, "init_weights false cannot be used here"),
        ("loha", {"module_dropout": 0.1}, "ranks would wait for one"),
        ("lora", {"target_modules": ["q_prij"]}, "no linear of the decoder is called q_prij; did you mean 'q_proj'?"),
        ("lora", {"target_modules": []}, "target_modules: it is empty; the decoder has"),
        (
            "lora",
            {"target_modules": ["lm_head", "q_proj"]},
            "is called lm_head; the decoder has down_proj, q_proj, v_proj (in full model.layers.0.",
        ),
        (
            "oft",
            {"target_modules": r"model\.vision_tower\..*"},
            "Vision tower, projector and language-model head are not",
        ),
        ("loha", {"target_modules": "(q_proj"}, "cannot build it: missing ), unterminated subpattern"),
        ("lora", {"layers_to_transform": [1, 7]}, "layers_to_transform names 7, and the decoder has 3 layers"),
        ("ia3", {"target_modules": ["q_proj"], "feedforward_modules": ["down_proj"]}, "should be a subset"),
    ],
)
def test_what_cannot_be_trained_is_refused(method: str, config: Any, said: str) -> None:
    found = problems(method, config)
    assert len(found) == 1 and said in found[0], found


def test_all_that_is_wrong_comes_in_one_message_before_a_model_is_loaded(
    tiny: TinyLlava, patched_llava: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text('{"rnak": 8, "bias": "all", "lora_dropout": 2}')
    flags = {"tuning_mode": "peft", "peft_config": tmp_path / "config.json", "mores_rank": 2}
    with pytest.raises(SystemExit):
        train_in_process(train_flags(tiny, tmp_path / "run", flags))
    said = capsys.readouterr().err
    assert all(f"--peft_config: {word}" in said for word in ("rnak", "bias", "lora_dropout"))
    assert "--mores_rank belongs to another mode than peft" in said and "Traceback" not in said


@pytest.mark.parametrize(
    ("text", "said"), [("nowhere.json", "is neither JSON in braces nor a file"), ("{", "not JSON")]
)
def test_a_command_line_with_a_config_that_cannot_be_read_is_refused(tiny: TinyLlava, text: str, said: str) -> None:
    [problem] = plan(train_flags(tiny, Path("never"), {"tuning_mode": "peft", "peft_config": text})).problems
    assert problem.startswith("--peft_config: ") and said in problem


def test_targets_that_the_base_lacks_are_refused_by_its_config_alone(tiny: TinyLlava) -> None:
    wrong = {"tuning_mode": "peft", "peft_config": '{"target_modules": ["c_attn"]}'}
    found = plan(train_flags(tiny, Path("never"), wrong))
    assert [
        "--peft_config: target_modules: no linear of the decoder is called c_attn" in each for each in found.problems
    ] == [True]


def test_a_file_is_read_where_the_flag_names_it_and_never_where_an_adapter_does(
    tiny: TinyLlava, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text('{"r": 3}')
    found = plan(train_flags(tiny, tmp_path / "run", {"tuning_mode": "peft", "peft_config": tmp_path / "config.json"}))
    assert found.problems == () and json.loads(found.settings["config"])["r"] == 3
    mode: Mode = registry.configured("peft", {"method": "lora", "config": str(tmp_path / "config.json")})
    assert "is neither JSON in braces" in mode.problems()[0]


def test_settings_of_another_type_are_refused_as_those_of_every_mode() -> None:
    with pytest.raises(ArgumentsError, match="method is 3 where str is expected"):
        registry.configured("peft", {"method": 3})


@pytest.mark.parametrize(
    ("mode", "called"),
    [
        (Peft(), "peft (lora)"),
        (Peft("lora", '{"use_dora": true}'), "peft (dora)"),
        (Peft("ia3"), "peft (ia3)"),
        (Peft("lora", "unreadable"), "peft (lora)"),
        (joint(Peft("oft"), MoReS()), "mores+peft (oft)"),
    ],
)
def test_the_full_name_says_the_method(mode: Mode, called: str) -> None:
    assert mode.full_name == called


def test_sharding_parameters_is_for_loras_without_magnitudes() -> None:
    assert Peft("lora").shards
    assert not Peft("lora", '{"use_dora": true}').shards and not Peft("ia3").shards
