"""Pictures of several rows in LLaVA-NeXT, which drops rows that `modalities` has no entry for.

Covers `serving/generation/batch.py` and `diagnostics/image/answer_score.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import next_llava
import pytest
import torch
from next_llava import NextLlava
from PIL import Image
from serving_fixtures import PROMPT, TEXT_PROMPT, Question
from serving_fixtures import made as answers

from llava_steering_plugin.components.picture_layouts import grid_of
from llava_steering_plugin.diagnostics.image.answer_score import AnswerScore
from llava_steering_plugin.diagnostics.positions import forced_pass
from llava_steering_plugin.inference.asking.forced import ForcedAnswer
from llava_steering_plugin.inference.base_model import load_base
from llava_steering_plugin.inference.images import image_arguments
from llava_steering_plugin.serving.generation.making import Maker
from llava_steering_plugin.serving.generation.prompts import Prompts
from llava_steering_plugin.serving.generation.slots import Slots

TILES = {
    "image_aspect_ratio": "anyres_max_9",
    "mm_patch_merge_type": "spatial",
    "image_grid_pinpoints": list(map(list, grid_of(next_llava.GRID, 56))),
}


@pytest.fixture(scope="module", params=["one tile", "tiles"])
def base(
    request: pytest.FixtureRequest, made: NextLlava, adapters: dict[str, Path], patched_llava: Path
) -> Iterator[Any]:
    """A LLaVA with a pool of one adapter, whose pictures are cut into tiles or not."""
    opened = load_base(str(made.llava), device="cpu", only_llava=True)
    opened.pool.model.float().eval()
    opened.pool.load("pets", str(adapters["llava"]))
    with pytest.MonkeyPatch.context() as patch:
        for name, value in TILES.items() if request.param == "tiles" else ():
            patch.setattr(opened.pool.model.config, name, value, raising=False)
        yield opened


@pytest.fixture(scope="module")
def pictures(made: NextLlava) -> list[Path]:
    return sorted(made.tiny.images.iterdir())[:3]


def test_requests_that_share_a_batch_answer_as_each_alone(base: Any, pictures: list[Path]) -> None:
    prompts = Prompts(base.pool, base.tokenizer, base.processor)
    worker = SimpleNamespace(open_slots=lambda slots, batch, told: Slots(Maker(prompts, batch), slots, batch, told))
    seen = [Question(PROMPT, picture).asked(name) for picture in pictures for name in ("pets", "__base__")]
    requests = [*seen, Question(TEXT_PROMPT).asked("pets")]
    alone = [answers(worker, request)[0] for request in requests]
    assert len({text for text, _ in alone}) > 1 and all(end.finish_reason != "error" for _, end in alone)
    passes: list[int] = []
    handle = base.pool.model.lm_head.register_forward_hook(lambda _, args, scores: passes.append(len(scores)))
    together = answers(worker, *requests, batch=len(requests))
    handle.remove()
    assert together == alone and max(passes) == len(requests)


def test_windows_of_a_picture_are_scored_as_each_alone(base: Any, pictures: list[Path]) -> None:
    from llava.mm_utils import tokenizer_image_token

    model, picture = base.pool.model, Image.open(pictures[0]).convert("RGB")
    ids = tokenizer_image_token(PROMPT, base.tokenizer)
    given = image_arguments([picture], base.processor, model)
    given["images"] = [each.float() for each in given["images"]]
    this_pass = forced_pass(model, ForcedAnswer([*ids, 300, 301], True, range(1, 1), len(ids)), given, "pets")
    score = AnswerScore(model, this_pass, picture.size, torch.float32, "pets")
    windows = torch.stack(list(given["images"])).repeat(3, *[1] * given["images"][0].dim())
    windows[1, ..., :20], windows[2, ..., 20:] = 0, 0
    with torch.inference_mode():
        alone = torch.cat([score(each[None]) for each in windows])
        together = score(windows)
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)
    assert len(set(alone.tolist())) == 3
