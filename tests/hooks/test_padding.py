"""Rows of a batch generate what they generate alone, whatever side they are padded on, or the batch is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pooled import BASE, Batch
from steered import IMAGE, generate, pictures, words
from torch import Tensor

from llava_steering_plugin import AdapterPool, MoReS, attach, load_adapter, token_map, use_adapter
from llava_steering_plugin.errors import ArgumentsError

pytest_plugins = ["pooled_fixtures", "steered_fixtures"]

NAMES = ["cats", "pets", "dogs", "birds", BASE, "fish", "bats"]


def on_the_right(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    return ids, (ids != 0).long()


@pytest.fixture(params=["right", "left"])
def side(request: pytest.FixtureRequest, shared: Any, monkeypatch: pytest.MonkeyPatch) -> str:
    """The side on which LLaVA pads what it has spliced; its own default is the right."""
    monkeypatch.setattr(shared.config, "tokenizer_padding_side", request.param)
    return str(request.param)


@pytest.mark.usefixtures("side")
@pytest.mark.parametrize("options", [{}, {"num_beams": 2}], ids=["greedy", "beams"])
def test_rows_that_are_padded_on_the_right_answer_as_they_do_alone(pool: AdapterPool, options: dict[str, Any]) -> None:
    batch = Batch(NAMES)
    alone = [batch.generated_alone(pool.model, row, adapter_names=name, **options)[0] for row, name in enumerate(NAMES)]
    ids, attention = on_the_right(batch.rows)
    given: dict[str, Any] = {"attention_mask": attention, "adapter_names": NAMES, **options}
    assert generate(pool.model, ids, torch.cat(batch.images), **given) == alone
    with torch.inference_mode():
        by_name = pool.model.generate(inputs=ids, images=torch.cat(batch.images), max_new_tokens=6, **given)
    assert by_name[:, :6].tolist() == [row[:6] for row in alone]
    assert len({tuple(row) for row in alone}) > 4, "equal answers would show nothing"


@pytest.mark.usefixtures("side")
def test_rows_that_only_their_images_make_unequal_need_no_mask(pool: AdapterPool) -> None:
    rows = [[1, *words(7, 1), IMAGE], [1, *words(6, 2), IMAGE, IMAGE], [1, *words(8, 3)]]
    images = [pictures(1, 1), pictures(2, 2), pictures(1, 3)]
    for names in (["cats", "pets", "birds"], [BASE] * 3):
        alone = [
            generate(pool.model, torch.tensor([row]), image, adapter_names=name)[0]
            for row, image, name in zip(rows, images, names, strict=True)
        ]
        assert generate(pool.model, torch.tensor(rows), torch.cat(images), adapter_names=names) == alone


@pytest.mark.usefixtures("side")
def test_text_alone_and_names_of_a_block_are_padded_likewise(pool: AdapterPool) -> None:
    rows = [[1, *words(3, 1)], [1, *words(9, 2)]]
    ids, attention = on_the_right(rows)
    with use_adapter(pool.model, "pets"):
        alone = [generate(pool.model, torch.tensor([row]), None)[0] for row in rows]
        assert generate(pool.model, ids, None, attention_mask=attention) == alone


def test_an_adapter_alone_on_its_model_answers_batches_likewise(model: Any, folders: dict[str, Path]) -> None:
    assert model.config.tokenizer_padding_side == "right"
    load_adapter(model, folders["pets"])
    batch = Batch(["pets"] * 3)
    alone = [batch.generated_alone(model, row)[0] for row in range(3)]
    ids, attention = on_the_right(batch.rows)
    assert generate(model, ids, torch.cat(batch.images), attention_mask=attention) == alone


def test_padding_without_a_mask_is_refused_with_its_rows(pool: AdapterPool) -> None:
    for rows in ([[1, 300, 301, 302], [1, 300, 0, 0]], [[1, 300, 301, 302], [0, 0, 1, 300]]):
        with pytest.raises(ArgumentsError, match=r"row\(s\) 1 of the batch .* no attention_mask"):
            generate(pool.model, torch.tensor(rows), None, adapter_names="cats")
    # One row is what upstream makes of it; and where the padding token ends answers, nothing is known to be padding.
    generate(pool.model, torch.tensor([[1, 300, 0, 0]]), None, adapter_names="cats")
    rows = [[1, 300, 301, 302], [1, 300, 2, 2]]
    generate(pool.model, torch.tensor(rows), None, adapter_names="cats", pad_token_id=2)


def test_a_plain_model_whose_output_repeats_the_prompt_refuses_padding_on_the_right(tiny: Any) -> None:
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(tiny.llm, torch_dtype=torch.float32).eval()
    attach(plain, MoReS(rank=1, tokens="all"))
    ids = torch.tensor([[1, 300, 301, 302], [1, 300, 0, 0]])
    for given in ({"attention_mask": (ids != 0).long()}, {}):
        with pytest.raises(ArgumentsError, match=r'row\(s\) 1 .*padded on the right.*padding_side = "left"'):
            plain.generate(ids, max_new_tokens=2, **given)
    left = torch.tensor([[1, 300, 301, 302], [0, 0, 1, 300]])
    mask = (left != 0).long()
    with token_map(visual=torch.zeros_like(left), attention=mask):
        assert plain.generate(left, attention_mask=mask, max_new_tokens=2, do_sample=False).shape == (2, 6)
