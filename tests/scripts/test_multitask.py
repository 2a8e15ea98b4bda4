"""The multi-task measurement: its tasks conflict, and its figures are what they are called.

Covers `tasks`, `information`, `methods` and `report` of `experiments.multitask`.
"""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

SAMPLES, QUESTIONS, FIRST = 40, 20, 1300


@pytest.fixture(scope="module")
def digits() -> list[int]:
    from sklearn.datasets import load_digits

    return load_digits().target.tolist()


def test_every_task_has_as_many_questions_and_all_cameras_see_the_same_test_pictures(digits: list[int]) -> None:
    from experiments import world
    from experiments.multitask import tasks

    trained = tasks.training(world.Split.load("train").questions, digits[:FIRST], SAMPLES)
    tested = tasks.testing(world.Split.load("test").questions, digits[FIRST:], FIRST, QUESTIONS)
    assert Counter(asked.kind for asked in trained) == dict.fromkeys(tasks.TASKS, SAMPLES)
    assert Counter(asked.kind for asked in tested) == dict.fromkeys(tasks.TASKS, QUESTIONS)
    seen = defaultdict(list)
    for asked in tested:
        if asked.kind in tasks.COLOUR_TASKS:
            seen[asked.kind].append((Path(asked.image).name, asked.text.partition(": ")[2], asked.answer))
    assert all(questions == seen["colour a"] for questions in seen.values())
    assert {asked.text.partition(":")[0] for asked in tested if asked.kind == "colour c"} == {"camera c"}


def test_no_test_digit_is_trained_on_and_answers_are_the_digits_in_the_pictures(digits: list[int]) -> None:
    from experiments import world
    from experiments.multitask import tasks

    def numbers(asked: list[tasks.Asked]) -> dict[int, str]:
        return {int(Path(one.image).stem): one.answer for one in asked if one.kind == "digit"}

    trained = numbers(tasks.training(world.Split.load("train").questions, digits[:FIRST], 2 * FIRST))
    tested = numbers(tasks.testing(world.Split.load("test").questions, digits[FIRST:], FIRST, QUESTIONS))
    assert set(trained) == set(range(FIRST))
    assert min(tested) >= FIRST
    assert all(answer == str(digits[number]) for number, answer in {**trained, **tested}.items())


def test_cameras_are_different_orders_of_the_channels_and_the_first_is_clean() -> None:
    from experiments.multitask import tasks

    orders = list(tasks.CAMERAS.values())
    assert orders[0] == (0, 1, 2)
    assert len(set(orders)) == len(orders)
    assert all(sorted(order) == [0, 1, 2] for order in orders)


def test_the_same_pixels_have_different_answers_under_different_cameras() -> None:
    """What makes the tasks pull: a red that camera b shows is a colour that camera a shows from another shape."""
    from experiments import world
    from experiments.multitask import tasks

    pure = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}
    answers = defaultdict(set)
    for order in tasks.CAMERAS.values():
        for name, colour in pure.items():
            shown = world.permuted(Image.new("RGB", (1, 1), colour), order)
            answers[shown.getpixel((0, 0))].add(name)
    assert all(names == set(pure) for names in answers.values())


def test_a_digit_becomes_a_grey_picture_of_the_size_of_the_tower_with_full_contrast() -> None:
    from experiments.multitask import tasks

    values = np.zeros((8, 8))
    values[2:6, 2:6] = 16
    picture = np.asarray(tasks.digit_picture(values))
    assert picture.shape == (64, 64, 3)
    assert (picture == picture[..., :1]).all()
    assert (picture[0, 0, 0], picture[32, 32, 0]) == (0, 255)


def test_mutual_information_is_that_of_constructed_cases() -> None:
    from experiments.multitask.information import entropy, mutual_information

    labels = [0, 0, 1, 1]
    assert entropy(labels) == pytest.approx(math.log(2))
    assert mutual_information(labels, labels) == pytest.approx(math.log(2))
    assert mutual_information(labels, ["x", "x", "y", "z"]) == pytest.approx(math.log(2))
    assert mutual_information(labels, [0, 1, 0, 1]) == pytest.approx(0)
    # A channel that is wrong once in four: 1 - H(1/4) bits.
    noisy = mutual_information([0] * 4 + [1] * 4, [0, 0, 0, 1, 1, 1, 1, 0])
    assert noisy / math.log(2) == pytest.approx(1 - (0.25 * 2 + 0.75 * math.log2(4 / 3)))


def test_a_set_that_tells_the_task_tells_all_of_it_and_one_that_does_not_tells_no_more_than_chance() -> None:
    from experiments.multitask.information import of_linears

    rng = np.random.default_rng(0)
    tasks = [("left", "right")[place % 2] for place in range(2000)]
    telling = np.array([[2, 5] if task == "left" else [1, 2] for task in tasks])
    # The order in which a set was chosen is no information.
    telling[::3] = telling[::3, ::-1]
    silent = rng.integers(0, 8, (2000, 2))
    found = of_linears(tasks, {"telling": telling, "silent": silent})
    assert found["telling"]["told"] == pytest.approx(1)
    assert found["telling"]["sets"] == 2
    assert found["silent"]["told"] == pytest.approx(found["silent"]["chance"], abs=0.01)
    assert found["telling"]["chance"] < 0.01
    with pytest.raises(ValueError, match="one task"):
        of_linears(["left"] * 4, {"telling": telling[:4]})


def test_the_rank_of_the_larger_lora_trains_as_many_parameters_as_learned_routing() -> None:
    from experiments.multitask.methods import (
        ACTIVE,
        FACTORS,
        compared,
        linears,
        lora_parameters,
        matching_rank,
        mixlora_parameters,
    )
    from llava_steering_plugin.modes.base import DecoderShape, LayerShape
    from llava_steering_plugin.modes.mixlora import MixLoRA

    decoder = linears(4, 128)
    layer = LayerShape("layers.0", {f"layers.0.{place}": shape for place, shape in enumerate(linears(1, 128))})
    built = MixLoRA(factors=FACTORS, rank=ACTIVE).build(DecoderShape(128, (layer,)))
    counted = sum(parameter.numel() for module in built.values() for parameter in module.parameters())
    wanted = mixlora_parameters(FACTORS, ACTIVE, decoder)
    assert wanted == 4 * counted
    equal = lora_parameters(matching_rank(wanted, decoder), decoder)
    assert abs(equal - wanted) < 0.02 * wanted
    small, large, frozen, learned, balanced = compared(4, 128, (1e-3,))
    assert [method.flags["peft_config"]["r"] for method in (small, large)] == [ACTIVE, matching_rank(wanted, decoder)]
    assert (small.is_mixlora, learned.is_mixlora) == (False, True)
    assert frozen.flags["mixlora_router_grad"] == "none"
    assert (learned.flags | {"mixlora_balance": 0.05}) == balanced.flags


def test_no_picture_is_in_two_of_training_validation_and_test(tmp_path: Path) -> None:
    from experiments.multitask import tasks

    tasks.write(tmp_path, samples=30, questions=20, validation=10)
    seen: dict[str, set[str]] = {
        "train": {sample["image"] for sample in json.loads((tmp_path / "train.json").read_text())}
    }
    for split, count in (("validation", 10), ("test", 20)):
        lines = [json.loads(line) for line in (tmp_path / f"{split}.jsonl").read_text().splitlines()]
        assert Counter(line["task"] for line in lines) == dict.fromkeys(tasks.TASKS, count)
        seen[split] = {line["image"] for line in lines}
    for task in tasks.TASKS:
        lines = [json.loads(line) for line in (tmp_path / tasks.question_file(task)).read_text().splitlines()]
        assert len(lines) == 20 and {line["task"] for line in lines} == {task}
    assert not seen["train"] & seen["test"] and not seen["validation"] & (seen["test"] | seen["train"])
    pictures = {split: {tuple(Path(image).parts[-2:]) for image in images} for split, images in seen.items()}
    assert not pictures["validation"] & pictures["test"], "nor through another camera"
    assert all((tmp_path / "pictures" / image).is_file() for images in seen.values() for image in images)


def _row(method: str, seed: int, told: float) -> dict[str, Any]:
    figures = {"told": told, "chance": 0.02, "sets": 9.0, "layers": {"0": told, "1": told}}
    return {"method": method, "seed": seed, "information": {"tasks": figures, "cameras": figures}}


def test_what_choices_tell_is_given_with_its_spread_over_seeds() -> None:
    from experiments.multitask.report import by_method

    (mixlora,) = by_method([_row("MixLoRA", 1, 0.25), _row("MixLoRA", 2, 0.35)])
    assert (mixlora["method"], mixlora["seeds"]) == ("MixLoRA", [1, 2])
    assert mixlora["information"]["tasks"]["told"] == pytest.approx({"mean": 0.3, "sd": math.sqrt(0.005)})
    assert mixlora["information"]["cameras"]["layers"]["1"]["mean"] == pytest.approx(0.3)


def test_the_table_and_the_plot_show_every_method(tmp_path: Path) -> None:
    from experiments.multitask.report import by_method, markdown, plot
    from experiments.multitask.tasks import TASKS
    from llava_steering_plugin.comparison.results.outcomes import MEAN

    learned = "MixLoRA 2 of 8, learned routers"
    scores = {test: {"score": {"mean": 50.0, "deviation": 2.0}} for test in (MEAN, *TASKS)}
    lost = {test: {"score": None} for test in scores}
    methods = [
        {"method": "base (frozen)", "frozen": True, "outcomes": scores},
        {"method": "LoRA r=2", "frozen": False, "outcomes": lost},
        {"method": learned, "frozen": False, "outcomes": scores},
    ]
    comparison = {"tasks": [{"methods": methods}]}
    results = {"steps": 4, "comparison": comparison, "information": by_method([_row(learned, 1, 0.25)])}
    assert f"| {learned} | cameras only | 0.25 ±0.00 | 0.02 ±0.00 | 9.0 |" in markdown(results)
    plot(results, tmp_path / "plot.png")
    assert min(Image.open(tmp_path / "plot.png").size) > 400
