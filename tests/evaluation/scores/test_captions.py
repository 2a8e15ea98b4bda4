"""Captions are scored by pycocoevalcap, or refused with what is missing: `evaluation/scores/captions.py`."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
from benchmark_folders import write_answers

from llava_steering_plugin.errors import DataError
from llava_steering_plugin.evaluation.benchmark import Wanted
from llava_steering_plugin.evaluation.scores.captions import read_flickr30k
from llava_steering_plugin.evaluation.scoring import score

INSTALLED = importlib.util.find_spec("pycocoevalcap") is not None
CAPTIONS = {
    "1.jpg": ["A dog runs over the green grass .", "A brown dog runs ."],
    "2.jpg": ["Two men sit on a red bench ."],
}


@pytest.fixture
def flickr(tmp_path: Path) -> Path:
    images = [
        {"filename": name, "split": "test", "sentences": [{"raw": text, "tokens": []} for text in texts]}
        for name, texts in CAPTIONS.items()
    ]
    images.append({"filename": "3.jpg", "split": "train", "sentences": [{"raw": "A cat ."}]})
    (tmp_path / "dataset_flickr30k.json").write_text(json.dumps({"images": images, "dataset": "flickr30k"}))
    write_answers(tmp_path / "a.jsonl", [(name, texts[0], "") for name, texts in CAPTIONS.items()])
    return tmp_path


def test_the_images_of_the_split_have_their_captions(flickr: Path) -> None:
    assert read_flickr30k(flickr, Wanted()).items == CAPTIONS
    assert list(read_flickr30k(flickr, Wanted("train")).items) == ["3.jpg"]
    with pytest.raises(DataError, match="holds no questions"):
        read_flickr30k(flickr, Wanted("dev"))


@pytest.mark.skipif(INSTALLED, reason="pycocoevalcap is installed")
def test_what_is_missing_is_told_at_once(flickr: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(DataError) as caught:
        score("flickr30k", flickr / "a.jsonl", flickr)
    assert "CIDEr and BLEU need the package pycocoevalcap: pip install" in str(caught.value)
    assert "; and Java, for its tokenizer" in str(caught.value)


@pytest.mark.skipif(not INSTALLED or shutil.which("java") is None, reason="pycocoevalcap or Java is missing")
def test_captions_that_the_annotators_gave_have_a_bleu_of_100(flickr: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = score("flickr30k", flickr / "a.jsonl", flickr).metrics["all"]
    assert found["bleu-4"] == pytest.approx(100) and float(found["cider"] or 0) > 100
    assert capsys.readouterr().out == ""


@pytest.mark.skipif(not INSTALLED or shutil.which("java") is None, reason="pycocoevalcap or Java is missing")
def test_cider_is_the_mean_of_its_images_and_these_are_the_scores_of_questions(flickr: Path) -> None:
    write_answers(flickr / "a.jsonl", [("1.jpg", CAPTIONS["1.jpg"][0], ""), ("2.jpg", "A dog runs .", "")])
    found = score("flickr30k", flickr / "a.jsonl", flickr, per_question=True)
    assert found.points is not None and found.points["1.jpg"] > 1 > found.points["2.jpg"] >= 0
    mean = 100 * sum(found.points.values()) / 2
    assert found.metrics["all"]["cider"] == pytest.approx(mean)
    assert found.as_json()["per_question"] == {"metric": "cider", "mean": pytest.approx(mean), "questions": 2}
