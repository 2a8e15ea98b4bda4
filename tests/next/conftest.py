"""What is tested here needs a checkout of LLaVA-NeXT: `scripts/setup.sh --next CHECKOUT` makes .venv-next for it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import next_llava
import pytest
from next_llava import NextLlava
from tiny_llava import TinyLlava
from training_runs import train_in_process, upstream_globals_restored

# Of each base: the flags that make its training the one of LLaVA-NeXT's scripts.
TRAININGS: dict[str, dict[str, object]] = {
    "llava": {},
    "llama": next_llava.ANYRES,
    "qwen": next_llava.ANYRES,
}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    # The name of an argument of its loader; reading the file imports nothing.
    copies = next((value for value in config.stash._storage.values() if hasattr(value, "pristine")), None)
    builder = copies.pristine / "llava/model/builder.py" if copies is not None else None
    if builder is not None and "overwrite_config" in builder.read_text():
        return
    reason = (
        "needs LLaVA-NeXT, and here is LLaVA or none: `scripts/setup.sh --next CHECKOUT` makes .venv-next, and "
        "LLAVA_NEXT=CHECKOUT scripts/test.sh runs these tests in it"
    )
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def made(tiny: TinyLlava, tmp_path_factory: pytest.TempPathFactory) -> NextLlava:
    return next_llava.build(tiny, tmp_path_factory.mktemp("next") / "made")


@pytest.fixture(scope="session")
def adapters(made: NextLlava, patched_llava: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One adapter for each base, trained by LLaVA-NeXT's own train() on images, several images, a video and text."""
    found = {}
    for base, overrides in TRAININGS.items():
        found[base] = tmp_path_factory.mktemp("adapters") / base
        frames = {"frames_upbound": next_llava.FRAMES, "force_sample": True}
        given = {"max_steps": 4, "learning_rate": 1e-2, "gradient_checkpointing": base != "qwen"}
        train_in_process(next_llava.flags(made, getattr(made, base), found[base], {**frames, **given, **overrides}))
    return found


@pytest.fixture(scope="module")
def model(made: NextLlava, patched_llava: Path) -> Iterator[Any]:
    """Its LLaVA over a Qwen, with a token for the ends of lines."""
    with upstream_globals_restored():
        from llava.model.language_model.llava_qwen import LlavaQwenForCausalLM

        seeing = json.loads((made.tiny.llava / "config.json").read_text())
        own = {key: value for key, value in seeing.items() if key.startswith("mm_")}
        config = LlavaQwenForCausalLM.config_class.from_pretrained(made.qwen)
        config.update({**own, "mm_patch_merge_type": "spatial_unpad", "attn_implementation": "eager"})
        model = LlavaQwenForCausalLM(config).eval()
        model.get_vision_tower().load_model()
        yield model
