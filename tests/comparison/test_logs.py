"""The end of a log says why a program failed, without the states of progress bars."""

from __future__ import annotations

from pathlib import Path

from llava_steering_plugin.comparison.logs import end_of, last_lines, progress_in, summary

LOG = "$ python -m train\n" + "  5%|▌ | 1/20 [00:01<00:10]\r 10%|█ | 2/20 [00:02<00:09]\nValueError: no\n\n"


def test_the_last_lines_are_those_that_people_read(tmp_path: Path) -> None:
    log = tmp_path / "train.log"
    log.write_text("x" * 50_000 + "\n" + LOG)
    assert last_lines(log)[-1] == "ValueError: no" and not any("/20 [" in line for line in last_lines(log))
    assert progress_in(log) == (2, 20)


def test_a_failure_says_status_lines_and_log(tmp_path: Path) -> None:
    log = tmp_path / "train.log"
    log.write_text(LOG)
    said = end_of(log, 2, "the training")
    assert said == f"the training ended with status 2:\n  ValueError: no\nThe whole log: {log}"
    assert summary(said) == f"the training ended with status 2: ValueError: no (The whole log: {log})"
    assert "signal SIGKILL" in end_of(log, -9, "the training")


def test_a_log_that_is_not_there_has_said_nothing(tmp_path: Path) -> None:
    assert "(nothing)" in end_of(tmp_path / "none", 1, "it")
    assert progress_in(tmp_path / "none") is None
