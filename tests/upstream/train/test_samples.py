"""What LLaVA's templates and image processors tell the checks of samples."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from llava_steering_plugin.training.data.sample_checks import style_of


def test_the_styles_of_versions_are_those_of_llavas_templates(
    patched_llava: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llava import conversation

    from llava_steering_plugin.upstream.train.samples import template_style

    usual = conversation.default_conversation
    for version in (*conversation.conv_templates, "unknown", "v0.5"):
        # As train() does.
        if version in ("v0", "v0.5"):
            template = usual
        else:
            template = conversation.conv_templates.get(version, conversation.conv_templates["vicuna_v1"])
        monkeypatch.setattr(conversation, "default_conversation", template)
        assert template_style() == style_of(version), version
        monkeypatch.setattr(conversation, "default_conversation", usual)
        assert template_style(version) == style_of(version), version


def test_an_edge_is_that_of_the_image_processor() -> None:
    from llava_steering_plugin.upstream.train.samples import _shorter_edge

    assert _shorter_edge(SimpleNamespace(size={"shortest_edge": 224})) == 224
    assert _shorter_edge(SimpleNamespace(size={"height": 384, "width": 384})) == _shorter_edge(None) == 336
