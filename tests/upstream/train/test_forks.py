"""What is said of LLaVA-NeXT's trainings before one begins (`upstream/train/forks.py`); tests/next runs them.

Covers `upstream/train_source.py` and `training/data/pictured.py`.
"""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from llava_steering_plugin.training.data.sample_checks import SampleChecks
from llava_steering_plugin.training.settings.conflicts import conflicts
from llava_steering_plugin.upstream.source import undefined_names
from llava_steering_plugin.upstream.train.forks import mapped, problems_of_fork
from llava_steering_plugin.upstream.train_source import broken_trainer

LLAMA = {"model_type": "llama"}


def flags(path: str, **given: Any) -> Namespace:
    return Namespace(model_name_or_path=path, vision_tower="tower", mm_tunable_parts=None, **given)


def llava_with(trainer: str, folder: Path) -> Path:
    (folder / "llava/train").mkdir(parents=True)
    (folder / "llava/train/llava_trainer.py").write_text(trainer)
    return folder / "llava"


def test_a_trainer_that_uses_names_it_never_gets_is_broken_and_the_commit_to_take_is_named(tmp_path: Path) -> None:
    source = "import os\nclass T:\n    def train(self):\n        return [DebugOption(x) for x in os.environ if math]\n"
    said = broken_trainer(llava_with(source, tmp_path))
    assert said is not None and "uses DebugOption, math without importing" in said
    assert "git checkout b42941c -- llava/train/llava_trainer.py" in said


@pytest.mark.parametrize(
    "source",
    [
        "from os import *\ndef f():\n    return path\n",
        "def f():\n    global made\n    made = 1\n\ndef g():\n    return made, print, __file__\n",
        "try:\n    import apex\nexcept ImportError:\n    late = 1\n\ndef f():\n    return apex, late, f\n",
        "class A:\n    x = 1\n    def f(self):\n        return __class__, super().f(), A\n",
    ],
)
def test_names_that_are_given_somewhere_are_not_missed(tmp_path: Path, source: str) -> None:
    (tmp_path / "module.py").write_text(source)
    assert undefined_names(tmp_path / "module.py") == set()


def test_the_llava_under_test_has_a_sound_trainer(pristine_llava: Path) -> None:
    assert broken_trainer(pristine_llava / "llava") is None


def test_llavas_own_trainings_have_no_problem_of_a_fork(tmp_path: Path) -> None:
    only = Namespace(model_name_or_path="/models/any", vision_tower="tower")
    assert problems_of_fork(only, tmp_path, LLAMA) == []


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("models/vicuna-7b", None),
        ("models/Llama-Qwen", None),
        ("models/llava-v1.5-7b", "it has none of its words"),
        ("models/zephyr/vicuna", "for 'zephyr' in it, it would take llava_mistral"),
        ("qwen", "for 'qwen' in it, it would take llava_qwen"),
    ],
)
def test_a_path_must_lead_to_the_class_of_the_base(
    patched_llava: Path, tmp_path: Path, path: str, reason: str | None
) -> None:
    found = problems_of_fork(flags(path), tmp_path, LLAMA)
    assert len(found) == (reason is not None)
    assert all(reason in problem and "a base for llava_llama" in problem for problem in found if reason)


@pytest.mark.parametrize("data", ["mix.yaml", "data/{a,b}.json"])
def test_data_of_several_files_is_refused_with_what_to_do(tmp_path: Path, data: str) -> None:
    (said,) = problems_of_fork(flags("models/vicuna-7b", data_path=data), tmp_path, None)
    assert f"--data_path {data}" in said and "join them into one JSON list" in said
    assert problems_of_fork(flags("models/vicuna-7b", data_path="a.json"), tmp_path, None) == []


def test_the_projector_among_the_tunable_parts_is_taken_out_and_other_parts_are_refused() -> None:
    words = ["--bf16", "True", "--mm_tunable_parts", "mm_mlp_adapter", "--lr", "1"]
    assert mapped(words) == mapped(["--bf16", "True", "--mm_tunable_parts=mm_mlp_adapter", "--lr", "1"])
    assert mapped(words) == ["--bf16", "True", "--lr", "1"]
    for parts, advice in (
        ("mm_vision_tower,mm_mlp_adapter,mm_language_model", "write --mm_tunable_parts mm_mlp_adapter"),
        ("mm_language_model", "--freeze_mm_mlp_adapter True"),
    ):
        assert mapped(["--mm_tunable_parts", parts]) == ["--mm_tunable_parts", parts]
        (said,) = (line for line in conflicts(with_parts(parts)) if "--mm_tunable_parts" in line)
        assert f"--mm_tunable_parts {parts} cannot" in said and advice in said
    assert not any("mm_tunable_parts" in line for line in conflicts(with_parts("mm_mlp_adapter")))


def with_parts(parts: str) -> Namespace:
    from llava.train import train as upstream
    from transformers import HfArgumentParser

    classes = (upstream.ModelArguments, upstream.DataArguments, upstream.TrainingArguments)
    words = ["--output_dir", "out", "--tuning_mode", "mores"]
    return Namespace(**vars(HfArgumentParser(classes).parse_known_args(words)[0]), mm_tunable_parts=parts)


class TestSamplesOfLlavaNext:
    CHECKS = SampleChecks("/nowhere", several=True, video_folder="/nowhere")

    @staticmethod
    def sample(text: str, **pictures: Any) -> dict[str, Any]:
        return {"conversations": [{"from": "human", "value": text}, {"from": "gpt", "value": "Yes."}], **pictures}

    def test_lists_of_images_and_videos_are_sound_where_the_marks_match(self) -> None:
        for sound in (
            self.sample("<image><image> Which?", image=["a.png", "b.png"]),
            self.sample("<image>\nWhat?", image=["a.png"]),
            self.sample("<image>\nWhat?", image="a.png"),
            self.sample("<image>\nWhat?", video="clip.mp4"),
        ):
            assert self.CHECKS.structure(sound) == []
            assert len(self.CHECKS.picture(sound)) == (2 if sound.get("image") == ["a.png", "b.png"] else 1)

    def test_llava_itself_takes_neither(self) -> None:
        for refused in (self.sample("<image>", image=["a.png"]), self.sample("<image>", video="clip.mp4")):
            assert SampleChecks("/nowhere").structure(refused) != []

    @pytest.mark.parametrize(
        ("text", "pictures", "reason"),
        [
            ("<image> Which?", {"image": ["a.png", "b.png"]}, "it has 1 <image> and 2 pictures"),
            ("<image><image>", {"image": ["a.png"]}, "it has 2 <image> and one picture"),
            ("<image>", {"image": [3]}, "its `image` holds 3, and should be the path of a file"),
            ("<image>", {"image": []}, "its `image` is empty; take the key out of a sample without a picture"),
            (
                "What?",
                {"video": "clip.mp4"},
                "it has no <image> and one picture; begin its first question with <image>",
            ),
        ],
    )
    def test_what_does_not_match_is_named(self, text: str, pictures: dict[str, Any], reason: str) -> None:
        assert [defect.reason for defect in self.CHECKS.structure(self.sample(text, **pictures))] == [reason]

    def test_a_missing_video_is_named(self) -> None:
        (defect,) = self.CHECKS.picture(self.sample("<image>", video="clip.mp4"))
        assert (defect.kind, defect.reason) == ("video_missing", "there is no video /nowhere/clip.mp4")
