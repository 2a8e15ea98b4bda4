"""The file of a comparison names all that is compared, and its results are found (`experiments.comparing`)."""

from __future__ import annotations

import json
from pathlib import Path

import yaml
from comparison_records import BASE, record

from llava_steering_plugin.comparison.reading import read_comparison
from llava_steering_plugin.comparison.records import FAILED, FILE, VALIDATION, write_records
from llava_steering_plugin.comparison.results.writing import write_results


def test_a_file_names_all_tunings_with_their_rates_and_a_test_for_each_kind_of_question(tmp_path: Path) -> None:
    from experiments.base import Base
    from experiments.comparing import Data, write_file
    from experiments.demo.settings import FULL
    from experiments.stages import Done

    done = Done(tmp_path, "key", 1.0, {})
    questions = {kind: tmp_path / f"{kind}.jsonl" for kind in ("colour", "shape")}
    data = Data("shifted", tmp_path / "train.json", tmp_path, tmp_path / "held.jsonl", questions)
    for needed in (data.train, data.validation, *questions.values()):
        needed.write_text("[]")
    file = tmp_path / "run" / "compare.yaml"
    write_file(file, Base(done, done, done, ()), data, FULL.tunings, steps=20, batch=4, seeds=[7])
    found = yaml.safe_load(file.read_text())
    assert list(found["methods"]) == [tuning.name for tuning in FULL.tunings]
    assert found["methods"]["LoRA r=8"] == {
        "tuning_mode": "peft",
        "peft_method": "lora",
        "peft_config": {"r": 8, "lora_alpha": 16, "lora_dropout": 0.05},
        "learning_rates": [1e-3, 3e-3],
    }
    assert (found["defaults"]["max_steps"], found["seeds"]) == (20, [7])
    (task,) = found["tasks"].values()
    assert list(task["test"]) == ["colour", "shape"]
    held = str(tmp_path / "held.jsonl")
    assert task["validation"]["all questions"] == {"questions": held, "annotations": held, "benchmark": "exact_match"}
    comparison = read_comparison(file)
    assert [method.name for method in comparison.methods] == list(found["methods"])
    assert comparison.output == tmp_path / "run" / "compare"
    assert json.loads(comparison.methods[-1].flags["peft_config"])["r"] == 8


def test_the_adapters_are_those_of_the_chosen_rate_at_the_first_seed(tmp_path: Path) -> None:
    from experiments.comparing import read, spread
    from experiments.tuning import Tuning

    tunings = [Tuning("one", "Method one", {}, (0.1,)), Tuning("two", "Method two", {}, (0.1,))]
    records = [record(tmp_path, BASE, 1, [0, 1])]
    for seed in (2, 1):
        records += [
            record(tmp_path, tuning.name, seed, [1, 1], rate=0.1, adapter=f"cells/{tuning.slug}-{seed}/model")
            for tuning in reversed(tunings)
        ]
    records.append(record(tmp_path, "Method one", 1, [1, 0], split=VALIDATION, adapter="cells/other/model"))
    records.append(record(tmp_path, "Method two", 1, rate=1.0, split=VALIDATION, status=FAILED))
    write_records(tmp_path / FILE, records)
    write_results(tmp_path)
    found = read(tmp_path, tunings)
    cells = tmp_path / "cells"
    assert {slug: each.adapter for slug, each in found.firsts.items()} == {
        "one": cells / "one-1" / "model",
        "two": cells / "two-1" / "model",
    }
    assert [(each.slug, each.seed) for each in found.tested] == [("one", 1), ("two", 1), ("one", 2), ("two", 2)]
    assert list(found.firsts) == ["one", "two"]
    first = found.firsts["one"]
    assert (first.cell, first.parameters, first.accuracy) == ("colours-Method one-0.1-1", 1000, {"held out": 1.0})
    (task,) = found.document["tasks"]
    assert spread(task["methods"][1]["outcomes"]["held out"]["score"]) == "100.0 ±0.0"
    assert spread(None) == "-" and spread({"mean": 1.0, "deviation": None}) == "1.0"
