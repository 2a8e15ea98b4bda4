"""The comparison of joint modes with their parts (`experiments.joint`, and `experiments.camera`'s settings)."""

from __future__ import annotations

from experiments.joint.settings import FULL, LORA, MORES, QUICK, together
from experiments.program import sized


def test_every_part_stands_alone_beside_what_it_is_tuned_together_with() -> None:
    names = [str(tuning.flags["tuning_mode"]) for tuning in FULL.tunings]
    alone = [name for name in names if "+" not in name]
    joint = [name for name in names if "+" in name]
    assert sorted(joint) == ["mores+mixlora", "mores+peft"]
    assert {part for name in joint for part in name.split("+")} == set(alone)
    assert {tuning.rates for tuning in FULL.tunings} == {LORA.rates}, "every method has the same budget"
    assert {len({tuning.slug for tuning in each.tunings}) for each in (FULL, QUICK)} == {5, 2}


def test_a_joint_tuning_has_each_parts_flags() -> None:
    both = together(MORES, LORA)
    assert both.flags == MORES.flags | LORA.flags | {"tuning_mode": "mores+peft"}


def test_the_command_line_changes_lengths_alone() -> None:
    changed = sized(FULL, 20, 2, 1)
    assert (changed.steps, changed.seeds, changed.processes) == (20, (1, 2), 1)
    assert (changed.tunings, changed.questions) == (FULL.tunings, FULL.questions)
    assert sized(FULL, None, None, None) == FULL
