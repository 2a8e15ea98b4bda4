"""A training says at its start what the mode remarks on its settings, once."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from tiny_llava import IMAGE_SIDE, PATCH, TinyLlava
from training_runs import train_flags, train_in_process


@pytest.mark.parametrize("tokens", ["1%", "all"])
def test_a_share_that_is_a_single_token_of_an_image_is_warned_of_once_and_trained(
    tiny: TinyLlava, tmp_path: Path, caplog: pytest.LogCaptureFixture, tokens: str
) -> None:
    flags: dict[str, object] = {"tuning_mode": "mores", "mores_tokens": tokens, "max_steps": 2}
    with caplog.at_level(logging.WARNING):
        history = train_in_process(train_flags(tiny, tmp_path / "run", flags))
    assert sum("loss" in entry for entry in history) == 2
    said = [record.getMessage() for record in caplog.records if "--mores_tokens" in record.getMessage()]
    image = (IMAGE_SIDE // PATCH) ** 2
    assert len(said) == (tokens == "1%")
    assert all(text.startswith(f"--mores_tokens 1% steers only 1 of the {image} tokens of an image.") for text in said)
