"""A joint mode has one name, and the settings of its two parts; what is no pair of modes is refused."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
from joined import ROUTING, STEERING, GainMode

from llava_steering_plugin.errors import ArgumentsError
from llava_steering_plugin.modes import registry
from llava_steering_plugin.modes.base import setting
from llava_steering_plugin.modes.joint import Joint, flags_of, joint, kinds_of, parts_of
from llava_steering_plugin.modes.mixlora import MixLoRA
from llava_steering_plugin.modes.mores import MoReS


def test_the_name_is_one_whichever_part_comes_first() -> None:
    kind = registry.get("mores+mixlora")
    assert registry.get("mixlora+mores") is kind
    assert (kind.name, kind.idle_at_decode) == ("mores+mixlora", False)
    assert kinds_of(kind) == (MoReS, MixLoRA) and kinds_of(MoReS) == (MoReS,)
    assert joint(STEERING, ROUTING) == joint(ROUTING, STEERING)
    assert type(joint(STEERING, ROUTING)) is kind
    assert joint(STEERING) is STEERING
    assert registry.known("mores+mixlora") and not registry.known("mores+mixlra")


def test_the_settings_are_those_of_the_parts_by_the_names_of_their_flags() -> None:
    mode = joint(STEERING, ROUTING)
    assert isinstance(mode, Joint)
    expected = {f"mores_{name}": value for name, value in STEERING.settings().items()}
    expected |= {f"mixlora_{name}": value for name, value in ROUTING.settings().items()}
    assert mode.settings() == flags_of(mode) == expected
    assert mode.parts == parts_of(mode) == (STEERING, ROUTING)
    assert registry.configured("mores+mixlora", expected) == mode
    assert (parts_of(STEERING), flags_of(STEERING)["mores_rank"]) == ((STEERING,), 2)
    assert mode.problems() == []
    bad = joint(MoReS(rank=0), MixLoRA(factors=2, rank=3))
    assert [problem.split()[0] for problem in bad.problems()] == ["mores_rank", "mixlora_rank"]
    assert joint(MoReS(tokens="1%"), ROUTING).remarks(16) == MoReS(tokens="1%").remarks(16) != []


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("mores+mores", r"two different parts, and mores\+mores is mores twice"),
        ("mores+mixlra", "unknown tuning mode 'mixlra': did you mean 'mixlora'"),
        ("mroes+mixlra", r"(?s)did you mean 'mores'.*did you mean 'mixlora'"),
        ("mores+", r"lacks a part; write two modes, such as mores\+mixlora"),
        ("+", "lacks a part"),
        ("mores+ +mixlora", "lacks a part"),
        ("mores+mixlora+mores", r"has two parts, and mores\+mores\+mixlora has 3"),
        ("mores+projector", r"mores\+projector is nothing new: mores trains the projector too, unless --freeze"),
        ("mores+lora", "'lora' is a method of PEFT's: write peft in its place, and add --peft_method lora"),
        ("mores+none", "unknown tuning mode 'none'"),
    ],
)
def test_what_is_no_pair_of_modes_is_refused_with_what_to_write(name: str, said: str) -> None:
    with pytest.raises(ArgumentsError, match=said):
        registry.get(name)


def test_settings_that_no_part_has_and_joints_of_joints_are_refused() -> None:
    with pytest.raises(ArgumentsError, match=r"(?s)has no rank, only mores_rank, .*mores_rank is 'x' where int"):
        registry.configured("mores+mixlora", {"rank": 2, "mores_rank": "x"})
    with pytest.raises(ArgumentsError, match=r"has two parts, and mores\+gain\+mixlora has 3"):
        joint(joint(STEERING, ROUTING), GainMode())
    with pytest.raises(ArgumentsError, match="has two parts"):
        joint()


def test_settings_whose_names_two_parts_share_or_modes_need_are_refused() -> None:
    @dataclass(frozen=True)
    class Idle(GainMode):
        name: ClassVar[str] = "idle"
        at_decode: bool = setting(False, "as the attribute of a mode")

    @dataclass(frozen=True)
    class MixLoRATwice(GainMode):
        name: ClassVar[str] = "mixlora_start"
        layer: int = setting(0, "as a setting of MixLoRA")

    with pytest.raises(ArgumentsError, match="modes use the names of these settings themselves: idle_at_decode"):
        joint(STEERING, Idle())
    with pytest.raises(ArgumentsError, match="have settings of the same name: mixlora_start_layer"):
        joint(ROUTING, MixLoRATwice())
