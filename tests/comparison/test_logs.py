"""The end of a log says why a program failed, without the states of progress bars."""

from __future__ import annotations

from pathlib import Path

from llava_steering_plugin.comparison.logs import Progress, end_of, last_lines, summary

LOG = "$ python -m train\n" + "  5%|▌ | 1/20 [00:01<00:10]\r 10%|█ | 2/20 [00:02<00:09]\nValueError: no\n\n"


def test_the_last_lines_are_those_that_people_read(tmp_path: Path) -> None:
    log = tmp_path / "train.log"
    log.write_text("x" * 50_000 + "\n" + LOG)
    assert last_lines(log)[-1] == "ValueError: no" and not any("/20 [" in line for line in last_lines(log))
    assert Progress(log).now() == (2, 20)


def test_a_failure_says_status_lines_and_log(tmp_path: Path) -> None:
    log = tmp_path / "train.log"
    log.write_text(LOG)
    said = end_of(log, 2, "the training")
    assert said == f"the training ended with status 2:\n  ValueError: no\nThe whole log: {log}"
    assert summary(said) == f"the training ended with status 2: ValueError: no (The whole log: {log})"
    assert "signal SIGKILL" in end_of(log, -9, "the training")


def test_a_log_that_is_not_there_has_said_nothing(tmp_path: Path) -> None:
    assert "(nothing)" in end_of(tmp_path / "none", 1, "it")
    assert Progress(tmp_path / "none").now() is None


def test_the_bars_of_loading_and_of_evaluations_are_not_the_trainings_steps(tmp_path: Path) -> None:
    log = tmp_path / "train.log"
    progress = Progress(log)
    log.write_text("Loading checkpoint shards: 100%|█| 2/2 [00:01<00:00]\n")
    assert progress.now() is None
    log.write_text(log.read_text() + "\r  0%|          | 0/12 [00:00<?, ?it/s]\r 42%|████▏     | 5/12 [00:01<00:02]\n")
    assert progress.now() == (5, 12)
    log.write_text(log.read_text() + "\r 33%|███▎      | 1/3 [00:00<00:00]\x1b[A")
    assert progress.now() == (5, 12)
    log.write_text(log.read_text() + "\r 50%|█████     | 6/12 [00:02<00:02]")
    assert progress.now() == (6, 12)
