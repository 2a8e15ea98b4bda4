"""All that is wrong with `--model_args` is said in one message, before anything is loaded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_llava import TinyLlava

from llava_steering_plugin.errors import AdapterError, ArgumentsError, SteeringError
from llava_steering_plugin.harness.arguments import ModelArguments, as_arguments, check_arguments, split_arguments

pytest_plugins = ["pooled_fixtures", "steered_fixtures"]


def checked(text: str, **flags: object) -> ModelArguments:
    return check_arguments(split_arguments(text), **flags)  # type: ignore[arg-type]


def test_arguments_are_read_as_they_are_written() -> None:
    assert split_arguments("adapter=007, base=/a=b,") == {"adapter": "007", "base": "/a=b"}
    assert split_arguments("") == {}


def test_an_adapter_a_base_and_both_are_taken(
    tiny: TinyLlava, folders: dict[str, Path], patched_llava: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cats, base = str(folders["cats"]), str(tiny.llava)
    alone = checked(f"base={base},device=cpu")
    assert (alone.path, alone.base) == (base, None)
    assert alone.how == {"device": "cpu", "load_4bit": False, "load_8bit": False}
    assert (alone.batch_size, alone.seed, alone.too_long, alone.conversation) == (1, 0, "refuse", None)
    assert checked(f"base={base}", device="cpu").device == "cpu"
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    both = checked(f"adapter={cats},base={base},conversation=v1,too_long=empty,seed=3,load_4bit=True", batch_size="4")
    assert (both.path, both.base, both.conversation, both.too_long) == (cats, base, "v1", "empty")
    assert (both.load_4bit, both.batch_size, both.seed) == (True, 4, 3)


def test_everything_that_is_wrong_comes_in_one_message(patched_llava: Path) -> None:
    with pytest.raises(ArgumentsError) as raised:
        checked(
            "adaptor=x,load_4bit=maybe,device=cup,conversation=v9,too_long=emtpy,seed=a,batch_size=3", batch_size="auto"
        )
    said = str(raised.value)
    for wrong in (
        "unknown argument 'adaptor': did you mean 'adapter'?",
        "load_4bit=maybe is neither True nor False",
        "device=cup: torch knows no such device",
        "unknown conversation template 'v9'",
        "too_long=emtpy: did you mean 'empty'?",
        "seed=a is no whole number",
        "batch_size is no argument of the model: give lmms-eval --batch_size N",
        "'auto' is not known",
    ):
        assert wrong in said
    assert "neither adapter= nor base=" not in said, "what was meant for one of them is named already"


def test_no_model_at_all_two_devices_and_two_precisions(patched_llava: Path) -> None:
    with pytest.raises(ArgumentsError, match="there is neither adapter= nor base=") as raised:
        check_arguments({"device": "cpu", "load_4bit": True, "load_8bit": True}, device="cuda")
    assert "two devices are given: cuda to lmms-eval, and device=cpu" in str(raised.value)
    assert "load_4bit=True and load_8bit=True exclude each other" in str(raised.value)
    with pytest.raises(SteeringError, match="load_8bit=True needs a GPU"):
        check_arguments({"base": "x", "load_8bit": True}, device="cpu")


def test_what_is_no_argument_is_named() -> None:
    with pytest.raises(ArgumentsError, match=r"(?s)'./pets' is not name=value.*'base=' is not.*seed is given twice"):
        split_arguments("./pets,base=,seed=1,seed=2")


def test_an_adapter_that_is_not_there_or_damaged(folders: dict[str, Path], patched_llava: Path, tmp_path: Path) -> None:
    with pytest.raises(SteeringError, match="nowhere is no folder"):
        checked(f"adapter={tmp_path / 'nowhere'},device=cpu")
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "adapter_config.json").write_text(json.dumps({"peft_type": "LLAVA_MORES"}))
    with pytest.raises(AdapterError, match="cut"):
        checked(f"adapter={tmp_path / 'cut'},device=cpu")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ArgumentsError, match="empty is neither an adapter nor an unmerged LoRA"):
        checked(f"adapter={tmp_path / 'empty'},device=cpu")


def test_a_base_that_does_not_fit_or_is_none(
    tiny: TinyLlava, folders: dict[str, Path], patched_llava: Path, tmp_path: Path
) -> None:
    cats = folders["cats"]
    config = json.loads((tiny.llava / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 9}))
    with pytest.raises(ArgumentsError, match="trained on 4 layers of width 64"):
        checked(f"adapter={cats},base={tmp_path},device=cpu")
    with pytest.raises(ArgumentsError, match=f"base={cats} is an adapter: give it as adapter="):
        checked(f"base={cats},device=cpu")
    with pytest.raises(SteeringError, match="nothing"):
        checked(f"adapter={cats},base={tmp_path / 'nothing'},device=cpu")


def test_advice_names_the_arguments_and_not_the_flags_of_other_commands() -> None:
    said = "say where it is with --model-base. Check --device, --load-8bit, --load-4bit; --device cpu"
    assert as_arguments(said) == (
        "say where it is with base=. Check device=, load_8bit=True, load_4bit=True; device=cpu"
    )
