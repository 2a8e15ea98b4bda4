"""A run over training data measures what MixLoRA adapters choose and what it is worth, and goes on where it ended.

Modules: diagnostics/routing/one_model.py, diagnostics/routing/run.py, diagnostics/routing/summary.py,
diagnostics/pictures/routing.py, inference/training_samples.py, cli/diagnose/routing.py.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diagnosing import diagnosed, saved_adapter
from PIL import Image
from reports import reported
from steered import load_llava
from tiny_llava import TinyLlava

from llava_steering_plugin import save_adapter
from llava_steering_plugin.adapters.attachment import Attachment, attachment_of
from llava_steering_plugin.diagnostics.routing.one_model import Others, choose_by_task
from llava_steering_plugin.diagnostics.task_data import Sample
from llava_steering_plugin.errors import ArgumentsError, SteeringError
from llava_steering_plugin.inference.training_samples import TrainingSamples, score_of
from llava_steering_plugin.inference.tunable import open_tunable
from llava_steering_plugin.modes.mixlora import MixLoRA, RoutedLinear
from llava_steering_plugin.modes.mores import MoReS

Run = Callable[..., dict[str, Any]]
SEEING, KNOWING = "seeing", "knowing"


@pytest.fixture(scope="module")
def tasks(tiny: TinyLlava, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four of the tiny LLaVA's conversations about an image, and the four about none."""
    samples = json.loads(tiny.data.read_text())
    chosen = [sample | {"task": SEEING} for sample in samples if "image" in sample][:4]
    chosen += [sample | {"task": KNOWING} for sample in samples if "image" not in sample]
    file = tmp_path_factory.mktemp("data") / "tasks.json"
    file.write_text(json.dumps(chosen))
    return file


def route_alike(attachment: Attachment) -> None:
    """Lets the routers choose the same for all inputs: B by the chosen A alone, in any order."""
    for name, parameter in attachment.parameters().items():
        if name.endswith(("router_a", "router_b")):
            parameter.data.zero_()


def route_by_task(start: Path, target: Path, tiny: TinyLlava, tasks: Path) -> Path:
    """Saves an adapter whose only linear picks one factor for each task, trained for that task alone."""
    opened = open_tunable(str(start), None, {"device": "cpu"})
    samples = TrainingSamples(opened.model, opened.tokenizer, opened.processor, tasks, tiny.images, "v1")
    attachment = attachment_of(opened.model)
    assert attachment is not None
    (module,) = attachment.modules.values()
    assert isinstance(module, RoutedLinear)
    pooled: list[torch.Tensor] = []

    def pool(_: Any, args: tuple[Any, ...]) -> None:
        pooled.append(args[1][0][args[2].prompt[0]].mean(0))

    handle = module.register_forward_pre_hook(pool)
    with torch.no_grad():
        for number in range(len(samples.entries)):
            samples.loss(number)
    handle.remove()
    wanted = torch.tensor([1.0 if entry["task"] == SEEING else -1.0 for entry in samples.entries])
    direction = torch.linalg.lstsq(torch.stack(pooled), wanted).solution
    with torch.no_grad():
        for router in (module.router_a, module.router_b):
            router.copy_(torch.stack([direction, -direction]))
        module.routed_b.zero_()
    optimizer = torch.optim.Adam([module.routed_a, module.routed_b], lr=0.05)
    for _ in range(4):
        optimizer.zero_grad()
        for number in range(len(samples.entries)):
            samples.loss(number).backward()
        optimizer.step()
    save_adapter(opened.model, target)
    return target


@pytest.fixture(scope="module")
def adapters(
    tiny: TinyLlava, patched_llava: Path, tasks: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("adapters")
    model = load_llava(tiny.llava)
    one = MixLoRA(factors=2, rank=1, alpha=4.0, conditional=False, targets="down_proj", start_layer=3)
    alike = MixLoRA(factors=4, rank=2, alpha=1.0)
    return {
        "by_task": route_by_task(saved_adapter(model, one, root / "start", tiny), root / "by_task", tiny, tasks),
        "constant": saved_adapter(model, alike, root / "constant", tiny, route_alike),
        "mores": saved_adapter(model, MoReS(rank=1), root / "mores", tiny),
    }


@pytest.fixture
def diagnose(tiny: TinyLlava, patched_llava: Path, tmp_path: Path) -> Run:
    """Runs `llava-steering diagnose routing` and returns routing.json."""

    def run(*words: str) -> dict[str, Any]:
        return diagnosed("routing", tiny, tmp_path / "out", *words, "--repeats", "2")

    return run


def test_routing_by_task_is_worth_something_and_constant_routing_is_worth_nothing(
    diagnose: Run, adapters: dict[str, Path], tasks: Path, tmp_path: Path
) -> None:
    found = diagnose(str(adapters["by_task"]), str(adapters["constant"]), "--data", str(tasks), "--samples", "4")
    assert (found["settings"]["measure"], found["tasks"]) == ("routing", [SEEING, KNOWING])
    by_task, constant = found["models"]
    assert by_task["samples"] == constant["samples"] == {SEEING: 4, KNOWING: 4}
    assert (by_task["factors"], by_task["chosen"], by_task["notes"]) == (2, 1, [])
    assert by_task["selection"] == {"A": "independent", "B": "independent"}
    assert constant["selection"] == {"A": "independent", "B": "conditional"}

    # One linear: half of the samples choose each factor, and the choice is the task.
    assert [(place["layer"], place["linear"], place["side"]) for place in by_task["places"]] == [
        (3, "down_proj", "A"),
        (3, "down_proj", "B"),
    ]
    for place in by_task["places"]:
        assert place["use"] == [0.5, 0.5]
        assert place["use_by_task"] == {SEEING: [1, 0], KNOWING: [0, 1]}
        assert place["entropy"] == pytest.approx(1)
        assert place["mutual_information"] == pytest.approx(1)
        assert place["overlap"] == 0
    assert by_task["overlap"]["A"] == [[1, 0], [0, 1]]
    lost = {variant: each["over_all"]["loss_added"] for variant, each in by_task["forced"].items()}
    assert set(lost) == {"shuffled", "shuffled_within_task", "most_frequent", "random"}
    assert lost["shuffled"]["mean"] > 0 and lost["random"]["mean"] > 0
    assert lost["shuffled_within_task"] == {"mean": 0, "low": 0, "high": 0}  # all of a task choose alike
    fixed = by_task["forced"]["most_frequent"]["tasks"]
    assert fixed[SEEING]["loss_added"]["mean"] == 0 < fixed[KNOWING]["loss_added"]["low"]
    assert len(by_task["embeddings"]["A"]["scores"]) == len(by_task["points"]) == 8

    # 28 linears, each with one choice for all samples.
    assert len(constant["places"]) == 2 * 28
    assert constant["sides"]["B"] == {"entropy": pytest.approx(0.5), "overlap": 1, "mutual_information": 0}
    nothing = {"mean": 0, "low": 0, "high": 0}
    for variant in ("shuffled", "shuffled_within_task", "most_frequent"):
        assert constant["forced"][variant]["over_all"] == {"loss_added": nothing, "accuracy_lost": nothing}
    assert constant["forced"]["random"]["over_all"]["loss_added"]["mean"] != 0
    assert constant["embeddings"]["A"]["selections"] is None  # all alike

    rows = list(csv.DictReader((tmp_path / "out" / "routing.csv").open()))
    (row,) = [
        each for each in rows if each["model"] == "by_task" and each["quantity"] == "own: loss" and each["of"] == "all"
    ]
    assert float(row["mean"]) == by_task["own"]["over_all"]["loss"]["mean"]
    for name in ("routing", "routing-use", "routing-tsne"):
        with Image.open(tmp_path / "out" / f"{name}.png") as picture:
            assert picture.width > 1000
        assert "by_task" in (tmp_path / "out" / f"{name}.svg").read_text()

    page = reported(tmp_path / "report.html", tmp_path / "out")
    worth = page.traces("added loss")
    assert worth.keys() == {"over all", SEEING, KNOWING}
    variants = ("shuffled", "shuffled_within_task", "most_frequent", "random")
    assert worth["over all"]["y"] == [lost[variant]["mean"] for variant in variants]
    assert page.traces("mutual information")["by_task, A"]["y"] == pytest.approx([1])
    uses = [[place["use"] for place in model["places"] if place["side"] == "A"] for model in (by_task, constant)]
    drawn = [each["z"] for each in page.maps()]
    assert all(each in drawn for each in (*uses, by_task["overlap"]["A"]))
    scores = [[point[0] for point in by_task["embeddings"]["A"]["scores"]]]
    planes = [[x for trace in data for x in trace["x"]] for data, _ in page.figures if data[0].get("mode") == "markers"]
    assert sorted(scores[0]) in map(sorted, planes)
    assert "0 (0 to 0) with those of another sample of the same task" in page.text


def test_an_interrupted_run_goes_on_and_ends_as_the_whole_one(
    diagnose: Run, adapters: dict[str, Path], tasks: Path, tmp_path: Path
) -> None:
    words = (str(adapters["by_task"]), "--data", str(tasks), "--samples", "2")
    whole = diagnose(*words)
    kept = tmp_path / "out" / "routing" / "by_task.jsonl"
    lines = kept.read_bytes().splitlines(keepends=True)
    assert len(lines) == 9  # the settings, and two records for each of four samples
    for whole_lines in (2, 6):  # in the middle of either half
        kept.write_bytes(b"".join(lines[:whole_lines]) + lines[whole_lines][:40])
        assert diagnose(*words) == whole
        assert kept.read_bytes() == b"".join(lines)
    with pytest.raises(ArgumentsError, match=r"(?s)of other settings.*seed: 0 there, 5 now"):
        diagnose(*words, "--seed", "5")


def test_of_one_task_only_what_needs_no_other_is_measured(
    diagnose: Run, tiny: TinyLlava, adapters: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = "one task: mutual information, overlap and t-SNE by task are left out"
    few = tmp_path / "few.json"
    few.write_text(json.dumps(json.loads(tiny.data.read_text())[:3]))
    found = diagnose(str(adapters["by_task"]), "--data", f"vqa={few}")
    assert f"fewer than 32 samples: vqa (3)\n{said}" in capsys.readouterr().err
    (model,) = found["models"]
    assert model["notes"] == [said]
    assert model["overlap"] is model["embeddings"] is model["places"][0]["mutual_information"] is None
    assert set(model["forced"]) == {"shuffled", "most_frequent", "random"}
    assert not (tmp_path / "out" / "routing-tsne.png").exists()
    page = reported(tmp_path / "report.html", tmp_path / "out")
    assert page.traces("added loss").keys() == {"over all"}
    assert "one task: mutual information" in page.text
    assert len(page.maps()) == 2  # the use of A and of B


def test_bad_input_is_refused_in_one_message_before_a_model_loads(
    diagnose: Run, tiny: TinyLlava, adapters: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SteeringError) as refused:
        diagnose(str(adapters["mores"]), str(tiny.llava), "--data", str(tiny.data))
    for part in (
        "is a mores adapter, and `diagnose routing` is for mixlora: use `llava-steering diagnose steering`",
        "is a base (use `llava-steering diagnose modality`)",
        "24 of 24 samples of file 1 name no task",
    ):
        assert part in str(refused.value)
    monkeypatch.setattr("llava_steering_plugin.diagnostics.preflight.find_spec", lambda name: None)
    with pytest.raises(SteeringError, match="matplotlib and scipy and scikit-learn: pip install -e"):
        diagnose(str(adapters["by_task"]), "--data", f"vqa={tiny.data}")


def test_the_choices_of_others_come_from_the_seed_and_never_from_the_sample_itself() -> None:
    place = ("q_proj", "A")
    rows = [{place: torch.tensor([number])} for number in range(6)]
    tasks = ["a", "a", "a", "b", "b", "b"]
    others = Others(rows, tasks, 6, repeats=3, seed=1)
    for number in range(6):
        found = others.instead_of(number)
        assert {name: len(each) for name, each in found.items()} == {
            "most_frequent": 1,
            "shuffled": 3,
            "random": 3,
            "shuffled_within_task": 3,
        }
        for choices in found["shuffled"]:
            assert int(choices[place]) != number
        for choices in found["shuffled_within_task"]:
            other = int(choices[place])
            assert other != number and tasks[other] == tasks[number]
        again = Others(rows, tasks, 6, repeats=3, seed=1).instead_of(number)
        assert again == found
    assert "shuffled_within_task" not in Others(rows, ["a"] * 6, 6, 1, 0).instead_of(0)
    alone = Others(rows, [*"aaaaa", "b"], 6, 1, 0)
    assert "shuffled_within_task" in alone.instead_of(0)
    assert "shuffled_within_task" not in alone.instead_of(5)


def test_samples_are_chosen_by_the_seed() -> None:
    entries = [{"task": "ab"[number % 2]} for number in range(40)] + [{"task": "c"}]
    chosen = choose_by_task([(None, entries)], 8, seed=1)
    assert {name: len(each) for name, each in chosen.items()} == {"a": 8, "b": 8, "c": 1}
    assert chosen["c"] == [Sample(0, 40)]
    assert chosen == choose_by_task([(None, entries)], 8, seed=1) != choose_by_task([(None, entries)], 8, seed=2)
    with pytest.raises(ArgumentsError, match="fewer than two samples"):
        choose_by_task([("a", [{}])], 8, seed=1)


def test_scores_by_hand() -> None:
    logits = torch.tensor([[[2.0, 0.0], [0.0, 1.0], [5.0, 5.0]]])
    labels = torch.tensor([[-100, 0, 0]])  # the first two positions predict the two labels: one right, one wrong
    found = score_of(logits, labels)
    first, second = (torch.log_softmax(logits[0, at], -1)[0] for at in (0, 1))
    assert found.loss == pytest.approx(-float(first + second) / 2)
    assert (found.accuracy, found.tokens) == (0.5, 2)
    nothing = score_of(logits, torch.full((1, 3), -100))
    assert nothing.loss != nothing.loss and nothing.tokens == 0
