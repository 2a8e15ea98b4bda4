"""Trainings with bad samples: one clear error, or other samples in their places, the same in every way of running.

Covers `training/data/skipped.py`; what counts as bad: test_sample_checks.py.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ranks
from bad_samples import good_samples, pictured, said, turns, write_data
from rank_runs import MORES, ONE_RANK, PARITY, TWO_RANKS, assert_close, assert_equal, losses, resumed_from
from tiny_llava import TinyLlava
from training_runs import train_flags, train_in_process

from llava_steering_plugin.training.data.samples import NumberedDataset
from llava_steering_plugin.training.data.skipped import LIST, SkippedSamples

# All 28 samples are seen in the first epoch, and the bad ones again in the second.
RUN: dict[str, object] = {
    **MORES,
    "mores_dropout": 0.1,
    "freeze_mm_mlp_adapter": True,
    "max_steps": 10,
    "save_strategy": "steps",
    "save_steps": 5,
    "skip_bad_samples": True,
}
# By the position that each will have.
BAD: dict[int, Any] = {
    3: pictured("nothing-here.png", id="lost"),
    7: said(("human", "What?"), ("gpt", None)),
    12: pictured("00.png", id="twice", conversations=turns("Red.", first="<image>\n<image>\nWhat?")),
    20: {"id": 20, "conversations": []},
}


def with_bad(tiny: TinyLlava, folder: Path, bad: dict[int, Any]) -> Path:
    samples = good_samples(tiny)
    for position, sample in sorted(bad.items()):
        samples.insert(position, sample)
    return write_data(folder, samples)


@pytest.fixture(scope="module")
def run(tiny: TinyLlava, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of `data.json` and a training that skipped bad samples, `whole`."""
    folder = tmp_path_factory.mktemp("skipping")
    train_in_process(train_flags(tiny, folder / "whole", {**RUN, "data_path": with_bad(tiny, folder, BAD)}))
    return folder


def error_of(tiny: TinyLlava, folder: Path, changed: dict[str, object], capfd: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as stopped:
        train_in_process(train_flags(tiny, folder / "run", {**MORES, **changed}))
    assert stopped.value.code == 2
    error = capfd.readouterr().err
    assert "Traceback" not in error
    return error[error.index("error: ") :]


def without_weights(tiny: TinyLlava, folder: Path) -> Path:
    """Make a base that has its config.json, and that nothing can load."""
    base = folder / "no-weights"
    base.mkdir()
    (base / "config.json").write_bytes((tiny.llava / "config.json").read_bytes())
    return base


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_picture_is_one_clear_error_also_from_a_worker_of_the_data_loader(
    tiny: TinyLlava, tmp_path: Path, capfd: pytest.CaptureFixture[str], workers: int
) -> None:
    data = with_bad(tiny, tmp_path, {3: BAD[3]})
    error = error_of(tiny, tmp_path, {"data_path": data, "dataloader_num_workers": workers, "max_steps": 8}, capfd)
    assert error == (
        f"error: LLaVA cannot be trained on sample 3 (id 'lost') of {data}:\n"
        f"  - there is no image {tiny.images}/nothing-here.png\n"
        "Mend or remove it, or give --skip_bad_samples: other samples then take the places of bad ones.\n"
        "All of them at once, before a training: "
        f"llava-steering check-data {data} --image-folder {tiny.images} --version v1\n"
    )


def test_a_bad_entry_is_an_error_before_a_model_is_loaded_wherever_it_stands(
    tiny: TinyLlava, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    data = with_bad(tiny, tmp_path, BAD)
    error = error_of(tiny, tmp_path, {"data_path": data, "model_name_or_path": without_weights(tiny, tmp_path)}, capfd)
    assert f"cannot be trained on sample 7 (id 'bad') of {data} (2 more are bad):\n  - turn 1 says null\n" in error


def test_a_bad_entry_of_a_large_file_is_an_error_before_the_first_step(
    tiny: TinyLlava, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from llava_steering_plugin.upstream.train import samples

    monkeypatch.setattr(samples, "QUICKLY_READ", 100)
    data = with_bad(tiny, tmp_path, BAD)
    error = error_of(tiny, tmp_path, {"data_path": data, "max_steps": 1}, capfd)
    assert f"cannot be trained on sample 7 (id 'bad') of {data} (2 more are bad):\n  - turn 1 says null\n" in error


@pytest.mark.parametrize(
    ("content", "reason"),
    [("{", "is no JSON: "), ("[]", "holds no samples"), ('{"a": 1}\n{"a": 2}', "Is it JSON Lines?")],
    ids=["cut", "empty", "lines"],
)
def test_a_data_file_of_something_else_is_an_error_before_a_model_is_loaded(
    tiny: TinyLlava, tmp_path: Path, capfd: pytest.CaptureFixture[str], content: str, reason: str
) -> None:
    data = tmp_path / "data.json"
    data.write_text(content)
    error = error_of(tiny, tmp_path, {"data_path": data, "model_name_or_path": without_weights(tiny, tmp_path)}, capfd)
    assert str(data) in error and reason in error


def test_a_data_file_that_is_missing_is_an_error_before_a_model_is_loaded(
    tiny: TinyLlava, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    flags = {"data_path": tmp_path / "nothing.json", "model_name_or_path": tmp_path / "no-model"}
    error = error_of(tiny, tmp_path, flags, capfd)
    assert f"there is no file {tmp_path / 'nothing.json'}" in error
    assert f"--model_name_or_path: there is no folder {tmp_path / 'no-model'}" in error, "all at once"


def test_nothing_but_bad_samples_is_one_error(
    tiny: TinyLlava, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    data = write_data(tmp_path, [*BAD.values()])
    error = error_of(tiny, tmp_path, {"data_path": data, "skip_bad_samples": True}, capfd)
    assert "none of the 4 samples can be trained on" in error


def test_skipping_without_a_mode_is_refused(tiny: TinyLlava, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    error = error_of(
        tiny,
        tmp_path,
        {"tuning_mode": "none", "mores_rank": None, "mores_tokens": None, "skip_bad_samples": True},
        capfd,
    )
    assert "--skip_bad_samples belongs to the tuning modes and none is on" in error


def test_skipped_samples_are_listed_in_the_output_folder(run: Path, tiny: TinyLlava) -> None:
    listed = json.loads((run / "whole" / LIST).read_text())
    assert [(entry["index"], entry["id"]) for entry in listed] == [(3, "lost"), (7, "bad"), (12, "twice"), (20, 20)]
    assert [entry["reasons"] for entry in listed] == [
        [f"there is no image {tiny.images}/nothing-here.png"],
        ["turn 1 says null"],
        ["it has 2 <image> and one picture"],
        ["its `conversations` is empty"],
    ]


def test_loader_workers_change_nothing_and_skipped_samples_are_listed_at_the_end(
    run: Path, tiny: TinyLlava, caplog: pytest.LogCaptureFixture
) -> None:
    flags = {**RUN, "data_path": run / "data.json", "dataloader_num_workers": 2}
    with caplog.at_level(logging.WARNING, "llava_steering_plugin"):
        train_in_process(train_flags(tiny, run / "workers", flags))
    assert losses(run / "workers") == losses(run / "whole")
    assert_equal(run / "whole", run / "workers")
    (message,) = [text for text in caplog.messages if "skipped" in text]
    assert message.startswith(f"4 of 28 samples of {run / 'data.json'} were skipped, and others took their places:\n")
    assert "sample 7 (id 'bad'): turn 1 says null" in message


def test_a_resumed_training_is_bit_equal_and_lists_what_was_skipped_before(run: Path, tiny: TinyLlava) -> None:
    resumed = resumed_from(run / "whole", 5, run / "resumed")
    (resumed / LIST).write_text(json.dumps([{"index": 20}, {"index": 99}]))
    train_in_process(train_flags(tiny, resumed, {**RUN, "data_path": run / "data.json"}))
    assert len(losses(resumed)) == 10
    assert_equal(run / "whole", resumed)
    assert (resumed / LIST).read_bytes() == (run / "whole" / LIST).read_bytes()


def test_the_flag_changes_nothing_where_no_sample_is_bad(tiny: TinyLlava, tmp_path: Path) -> None:
    for name, skips in {"with": True, "without": False}.items():
        flags = {**RUN, "max_steps": 3, "save_strategy": "no", "skip_bad_samples": skips}
        train_in_process(train_flags(tiny, tmp_path / name, flags))
    assert_equal(tmp_path / "with", tmp_path / "without")
    assert not (tmp_path / "with" / LIST).exists()


def test_a_list_of_an_earlier_training_in_the_folder_goes(tmp_path: Path) -> None:
    (tmp_path / LIST).write_text("[]")
    callback = SkippedSamples(object(), tmp_path, set())  # type: ignore[arg-type]
    callback.on_train_begin(SimpleNamespace(process_index=1), SimpleNamespace(global_step=0), None)
    assert (tmp_path / LIST).exists()
    callback.on_train_begin(SimpleNamespace(process_index=0), SimpleNamespace(global_step=0), None)
    assert not (tmp_path / LIST).exists()


@pytest.mark.slow
def test_two_ranks_skip_what_one_rank_skips_and_an_error_of_one_ends_both(
    run: Path, tiny: TinyLlava, patched_llava: Path
) -> None:
    flags = {**PARITY, "max_steps": 14, "data_path": run / "data.json", "skip_bad_samples": True}
    lost = write_data(run, [*good_samples(tiny)[:7], BAD[3]], "lost.json")
    strict = {**flags, "data_path": lost, "skip_bad_samples": False, "dataloader_num_workers": 1}
    with pytest.raises(RuntimeError) as stopped:
        ranks.run_on_ranks(
            [train_flags(tiny, run / name, {**each, **TWO_RANKS}) for name, each in (("two", flags), ("lost", strict))],
            patched_llava,
            run,
        )
    assert "ended with" in str(stopped.value)
    assert str(stopped.value).count(f"LLaVA cannot be trained on sample 7 (id 'lost') of {lost}:") == 1
    assert "another rank has met a bad sample, which its own message names." in str(stopped.value)
    assert "Connection closed" not in str(stopped.value)
    train_in_process(train_flags(tiny, run / "one", {**flags, **ONE_RANK}))
    assert_close(run / "one", run / "two")
    assert (run / "two" / LIST).read_bytes() == (run / "whole" / LIST).read_bytes()


def test_a_list_that_cannot_be_written_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / LIST).mkdir()
    callback = SkippedSamples(NumberedDataset(Entries()), tmp_path, {1})
    with caplog.at_level(logging.WARNING, "llava_steering_plugin"):
        callback.on_train_end(SimpleNamespace(process_index=0), None, None)
    assert "cannot be written" in caplog.messages[0]
    assert "1 of 2 samples were skipped" in caplog.messages[1] and "sample 1 (id 'b')" in caplog.messages[1]


class Entries:
    """What `NumberedDataset` needs of LLaVA's dataset."""

    list_data_dict = ({"id": "a"}, {"id": "b"})

    def __len__(self) -> int:
        return 2

    def __getitem__(self, number: int) -> dict[str, Any]:
        raise ValueError(number)
