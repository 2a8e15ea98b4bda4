"""What LLaVA cannot be trained on is found and named; what it reads rightly stays as it is, to the bit.

Covers `training/data/sample_checks.py` and `training/data/source.py`, with LLaVA's own dataset and the tokenizer and
image processor of the tiny LLaVA; test_bad_samples.py trains.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from bad_samples import BAD, ODD, PICTURE, good_samples, pictured, said, turns, write_data, write_pictures
from tiny_llava import TinyLlava
from training_runs import upstream_globals_restored

from llava_steering_plugin.errors import DataError
from llava_steering_plugin.planning.data_check import Checker
from llava_steering_plugin.training.attaching import REQUEST
from llava_steering_plugin.training.data.sample_checks import KINDS, PLAIN, SINGLE, SampleChecks, misread
from llava_steering_plugin.training.data.samples import REFUSED, SAMPLE_NUMBERS, SKIPPED, NumberedDataset
from llava_steering_plugin.training.data.source import early_problem
from llava_steering_plugin.training.settings.flags import TrainingRequest
from llava_steering_plugin.upstream.text.tokens import TokenCounter


class Reader:
    """Reads data files as LLaVA's train() does with a mode, without a model."""

    def __init__(self, tiny: TinyLlava, folder: Path):
        from transformers import AutoTokenizer, CLIPImageProcessor

        self.folder, self.images = folder, write_pictures(tiny, folder)
        self.tokenizer = AutoTokenizer.from_pretrained(
            tiny.llava, model_max_length=512, padding_side="right", use_fast=False
        )
        self.tokenizer.pad_token = self.tokenizer.unk_token
        self.processor = CLIPImageProcessor.from_pretrained(tiny.tower)
        self.good = good_samples(tiny)

    def upstreams(self, samples: Any, **changed: Any) -> Any:
        from llava.train.train import LazySupervisedDataset

        data = Namespace(
            **{
                "image_folder": str(self.images),
                "image_aspect_ratio": "pad",
                "is_multimodal": True,
                "mm_use_im_start_end": False,
                "image_processor": self.processor,
                **changed,
            }
        )
        path = write_data(self.folder, samples) if isinstance(samples, list | dict) else samples
        return LazySupervisedDataset(data_path=str(path), tokenizer=self.tokenizer, data_args=data)

    def dataset(self, samples: Any, skip_seed: int | None = None, **changed: Any) -> NumberedDataset:
        request = TrainingRequest(None, Namespace(tuning_mode="mores", version="v1"))
        token = REQUEST.set(request)
        try:
            return NumberedDataset(self.upstreams(samples, **changed), skip_seed)
        finally:
            REQUEST.reset(token)


@pytest.fixture(scope="module")
def reader(tiny: TinyLlava, patched_llava: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reader]:
    with upstream_globals_restored():
        from llava import conversation

        conversation.default_conversation = conversation.conv_templates["v1"]
        yield Reader(tiny, tmp_path_factory.mktemp("samples"))


@pytest.mark.parametrize("name", BAD)
def test_a_bad_sample_is_named_with_file_id_and_reason_and_its_kind_is_known(reader: Reader, name: str) -> None:
    sample, kind = BAD[name]
    dataset = reader.dataset([reader.good[0], sample])
    assert REFUSED not in dataset[0]
    found = dataset.why_bad(1)
    assert kind in {defect.kind for defect in found} <= KINDS.keys()
    message = dataset[1][REFUSED]
    where = "sample 1 (id 'bad')" if isinstance(sample, dict) else "sample 1"
    assert message.startswith(f"LLaVA cannot be trained on {where} of {reader.folder / 'data.json'}:\n  - ")
    assert all(defect.reason in message for defect in found)
    assert "--skip_bad_samples" in message and "llava-steering check-data" in message


@pytest.fixture(scope="module")
def checker(reader: Reader, tiny: TinyLlava) -> Checker:
    """That of `check-data`, with everything it can look at."""
    return Checker(SampleChecks(str(reader.images)), True, TokenCounter(str(tiny.llava), "v1", 512))


@pytest.mark.parametrize("name", BAD)
def test_check_data_finds_the_same_defects_as_the_training(reader: Reader, checker: Checker, name: str) -> None:
    sample, _ = BAD[name]
    of_training, of_command = reader.dataset([sample]).why_bad(0), checker.check(sample).defects
    assert list(of_command)[: len(of_training)] == of_training
    # A training that has seen a header that will not do does not go on to decode the picture.
    assert {defect.kind for defect in of_command} == {defect.kind for defect in of_training}


@pytest.mark.parametrize("name", ODD)
def test_check_data_finds_nothing_where_the_training_finds_nothing(checker: Checker, name: str) -> None:
    found = checker.check(ODD[name])
    assert found.defects == () and found.tokens and (found.learned or name in ("trailing-question", "one-answer-empty"))


@pytest.mark.parametrize("name", BAD)
def test_what_takes_its_place_is_another_sample_of_its_kind(reader: Reader, name: str) -> None:
    sample, _ = BAD[name]
    dataset = reader.dataset([sample, sample, *reader.good], skip_seed=3)
    taken = dataset[0]
    number = taken.pop(SAMPLE_NUMBERS)
    assert number > 1 and taken.pop(SKIPPED) == 0
    assert ("image" in reader.good[number - 2]) == (isinstance(sample, dict) and "image" in sample)
    itself = dataset[number]
    assert itself.pop(SAMPLE_NUMBERS) == number and itself.keys() == taken.keys()
    assert all(torch.equal(value, itself[key]) for key, value in taken.items())


@pytest.mark.parametrize("name", ODD)
def test_what_llava_reads_rightly_is_read_as_without_a_mode_to_the_bit(reader: Reader, name: str) -> None:
    dataset = reader.dataset([ODD[name]])
    expected = reader.upstreams([ODD[name]])[0]
    read = dataset[0]
    assert REFUSED not in read, read[REFUSED]
    assert read.pop(SAMPLE_NUMBERS) == 0 and read.keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) for key, value in read.items())


def test_a_picture_at_an_absolute_path_is_read(reader: Reader) -> None:
    assert REFUSED not in reader.dataset([pictured(str(reader.images / PICTURE))])[0]


@pytest.mark.parametrize("aspect", ["pad", "square"])
@pytest.mark.parametrize("width", [1, 2, 3, 4, 40])
@pytest.mark.parametrize("height", [1, 2, 3, 4, 40])
def test_a_size_is_refused_exactly_where_the_image_processor_misreads_it(
    reader: Reader, tmp_path: Path, width: int, height: int, aspect: str
) -> None:
    """A picture of the colour that LLaVA pads with stays of one colour, unless its axes are taken for others."""
    from PIL import Image

    path = tmp_path / "picture.png"
    mean, deviation = (torch.tensor(getattr(reader.processor, name)) for name in ("image_mean", "image_std"))
    colour = tuple(int(part * 255) for part in reader.processor.image_mean)
    Image.new("RGB", (width, height), colour).save(path)
    dataset = reader.dataset([pictured(str(path))], image_aspect_ratio=aspect)
    try:
        pixels = reader.upstreams([pictured(str(path))], image_aspect_ratio=aspect)[0]["image"]
        expected = ((torch.tensor(colour) / 255 - mean) / deviation)[:, None, None]
        sound = pixels.shape == (3, 56, 56) and torch.allclose(pixels, expected.expand_as(pixels), atol=0.02)
    except ValueError:
        sound = False
    assert misread(width, height, padded=aspect == "pad") == (not sound)
    assert (REFUSED in dataset[0]) == (not sound)


def test_all_defects_of_a_sample_are_named(reader: Reader) -> None:
    sample = {"id": 5, "image": None, "conversations": [{"from": "bot", "value": None}, 3]}
    kinds = [defect.kind for defect in reader.dataset([sample]).why_bad(0)]
    assert kinds == ["role", "text", "turn", "image_name"]


def test_the_first_bad_entry_is_an_error_before_the_first_step_and_pictures_are_not_looked_at(reader: Reader) -> None:
    bad = said(("human", "What?"), ("gpt", None))
    dataset = reader.dataset([reader.good[0], pictured("nothing.png"), bad, bad])
    with pytest.raises(
        DataError, match=r"sample 2 \(id 'bad'\) of .*data.json \(1 more are bad\):\n  - turn 1 says null"
    ):
        dataset.refuse_bad_entries()
    reader.dataset([reader.good[0], pictured("nothing.png")]).refuse_bad_entries()
    reader.dataset([reader.good[0], bad], skip_seed=0).refuse_bad_entries()


def test_a_sample_on_which_llava_fails_for_a_reason_of_its_own_is_named_too(
    reader: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llava.train import train as upstream

    def failing(*args: Any, **kwargs: Any) -> None:
        raise KeyError("something new")

    dataset = reader.dataset([reader.good[0]])
    monkeypatch.setattr(upstream, "preprocess", failing)
    (found,) = dataset.why_bad(0)
    assert found.kind == "other" and found.reason == "LLaVA fails on it: KeyError: 'something new'"


def test_if_nothing_can_be_trained_on_it_is_said_once(reader: Reader) -> None:
    dataset = reader.dataset([pictured("a.png"), said(("human", "What?")), pictured("b.png")], skip_seed=0)
    assert dataset[0][REFUSED].startswith(
        "none of the 3 samples can be trained on. LLaVA cannot be trained on sample 0"
    )


@pytest.mark.parametrize("property", ["modality_lengths", "lengths"])
def test_lengths_are_llavas_and_bad_samples_have_one(reader: Reader, property: str) -> None:
    good = reader.dataset(reader.good)
    assert getattr(good, property) == getattr(reader.upstreams(reader.good), property)
    samples = [sample for sample, _ in BAD.values()]
    lengths = getattr(reader.dataset([*reader.good, *samples], skip_seed=0), property)
    assert lengths[: len(reader.good)] == getattr(good, property)
    if property == "modality_lengths":
        signs = [isinstance(sample, dict) and "image" in sample for sample in samples]
        assert [length > 0 for length in lengths[len(reader.good) :]] == signs
    assert 0 not in lengths


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{", "is no JSON: "),
        ('{"id": 1}', "holds an object at its top level; LLaVA reads a list"),
        ('{"id": 1}\n{"id": 2}\n', "Is it JSON Lines? LLaVA reads one list"),
        ("7", "holds int at its top level"),
        ("[]", "holds no samples"),
        ("[" * 100_000, "cannot be read: "),
        ("[" + "1" * 5000 + "]", "cannot be read: "),
        (b"\xff\xfe[]", "cannot be read: "),
    ],
    ids=["cut", "object", "lines", "number", "empty", "deep", "long", "bytes"],
)
def test_a_data_file_that_is_no_list_of_samples_is_named(
    reader: Reader, tmp_path: Path, content: str | bytes, reason: str
) -> None:
    path = tmp_path / "data.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError) as caught:
        reader.dataset(path)
    assert str(path) in str(caught.value) and reason in str(caught.value)


def test_flags_for_images_that_are_missing_are_named(reader: Reader) -> None:
    with pytest.raises(DataError, match=r"sample 0 .* has an image, and the flags lack --image_folder\."):
        reader.dataset([pictured(PICTURE)], image_folder=None)
    with pytest.raises(DataError, match="lack --image_folder and --vision_tower"):
        reader.dataset([pictured(PICTURE)], image_folder=None, image_processor=None)
    text = reader.dataset([said(("human", "What?"), ("gpt", "This."))], image_folder=None)
    assert REFUSED not in text[0]


def test_a_glance_at_a_data_file_finds_what_is_missing(tmp_path: Path) -> None:
    (tmp_path / "empty.json").write_text(" \n")
    (tmp_path / "data.json").write_text("[1]")
    assert early_problem(str(tmp_path / "data.json")) == []
    for path, reason in {
        "nothing.json": "there is no file",
        "": "is a folder",
        "empty.json": "is an empty file",
    }.items():
        (problem,) = early_problem(str(tmp_path / path))
        assert reason in problem and str(tmp_path) in problem
    assert early_problem("\0") and early_problem(None)


def test_without_a_mode_llavas_dataset_is_as_it_was(reader: Reader) -> None:
    dataset = reader.upstreams([pictured("nothing.png")])
    assert vars(dataset).keys() == {"tokenizer", "list_data_dict", "data_args"}
    with pytest.raises(FileNotFoundError):
        dataset[0]


def test_captions_of_stage_1_are_a_picture_and_two_turns_of_any_role() -> None:
    def kinds(sample: Any) -> list[str]:
        return [defect.kind for defect in SampleChecks(None, style=PLAIN).structure(sample)]

    caption = [{"from": "user", "value": "Describe it.\n<image>"}, {"from": "bot", "value": "A red circle."}]
    assert kinds({"image": "a.png", "conversations": caption}) == []
    assert kinds({"conversations": caption}) == ["image_marks"]
    assert kinds({"image": "a.png", "conversations": turns("A", "B")}) == ["order"]
    assert kinds({"image": "a.png", "conversations": turns("A", first="What?")}) == ["image_marks"]


def test_turns_may_come_in_any_order_where_llava_does_not_look_at_it() -> None:
    sample = said(("human", "A."), ("human", "B?"), ("gpt", "C."))
    assert SampleChecks(None, style=SINGLE).structure(sample) == []
    assert [defect.kind for defect in SampleChecks(None).structure(sample)] == ["order"]
