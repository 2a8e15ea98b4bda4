"""Token maps are what LLaVA's own splice lays out, whatever the images, the padding and the truncation."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from slow_splice import Batch, assert_same, check, lay_out
from steered import IGNORED, IMAGE, ids_of, load_llava, pictures, words
from tiny_llava import SIZES, VISUAL_TOKENS, TinyLlava
from torch import Tensor

from llava_steering_plugin.adapters.attachment import Attachment
from llava_steering_plugin.errors import UpstreamError
from llava_steering_plugin.hooks.scope import current, entered, opened
from llava_steering_plugin.hooks.token_map import spliced

pytest_plugins = ["steered_fixtures"]

PAD = 0


@pytest.fixture(scope="module")
def gallery(frozen: Any) -> tuple[Tensor, list[Tensor]]:
    """Five pictures, and the features that each gets when it is encoded by itself."""
    pixels = pictures(5)
    with torch.no_grad():
        return pixels, [frozen.encode_images(picture[None])[0] for picture in pixels]


segments = st.lists(st.one_of(st.integers(1, 4), st.just("image")), min_size=1, max_size=5).filter(
    lambda parts: parts.count("image") <= 3
)


@st.composite
def batches(draw: st.DrawFn, gallery: tuple[Tensor, list[Tensor]]) -> tuple[Batch, dict[str, Any]]:
    rows = []
    for parts in draw(st.lists(segments, min_size=1, max_size=3)):
        row = [1, *words(1)]
        for part in parts:
            row += [IMAGE] if part == "image" else words(part, seed=len(row))
        rows.append(row)
    length = max(map(len, rows))
    pad_left = draw(st.booleans())
    padded, present = [], []
    for row in rows:
        filling, ones = [PAD] * (length - len(row)), [1] * len(row)
        padded.append(filling + row if pad_left else row + filling)
        present.append([0] * len(filling) + ones if pad_left else ones + [0] * len(filling))
    ids = torch.tensor(padded)
    mask_dtype = draw(st.sampled_from([None, torch.bool, torch.long]))
    attention = None if mask_dtype is None else torch.tensor(present).to(mask_dtype)
    labels = None
    if draw(st.booleans()):
        labels = ids.clone()
        labels[(ids == IMAGE) | (torch.tensor(present) == 0)] = IGNORED
        for row in range(len(rows)):
            labels[row, : draw(st.integers(0, length))] = IGNORED
    numbers = []
    for row in rows:
        numbers += draw(st.lists(st.integers(0, 4), min_size=(count := max(1, row.count(IMAGE))), max_size=count))
    images = gallery[0][numbers]
    if draw(st.booleans()):
        images = list(images)
    positions = torch.arange(length).expand_as(ids).contiguous() if draw(st.booleans()) else None
    batch = Batch(ids, attention, labels, images, [gallery[1][number] for number in numbers], positions)
    return batch, {
        "tokenizer_padding_side": draw(st.sampled_from(["left", "right"])),
        "tokenizer_model_max_length": draw(st.sampled_from([2048, 2048, 3, 12, 20, 33])),
    }


@settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    # The model keeps nothing from one example to the next: each sets the whole config that matters.
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(data=st.data())
def test_any_batch_is_mapped_as_the_slow_oracle_lays_it_out(
    data: st.DataObject, model: Any, gallery: tuple[Tensor, list[Tensor]]
) -> None:
    batch, config = data.draw(batches(gallery))
    model.config.update(config)
    check(model, batch)


# The same for the cases that have names


def image_row(before: int, after: int) -> list[int]:
    return [1, *words(before), IMAGE, *words(after, seed=1)]


def test_one_image(model: Any, gallery: tuple[Tensor, list[Tensor]]) -> None:
    pixels, features = gallery
    tokens = check(model, Batch(ids_of(image_row(2, 4)), None, None, pixels[:1], features[:1]))
    assert tokens.visual.tolist() == [[False] * 3 + [True] * VISUAL_TOKENS + [False] * 4]


def test_adjacent_images_are_one_run_of_visual_tokens(model: Any, gallery: tuple[Tensor, list[Tensor]]) -> None:
    pixels, features = gallery
    ids = ids_of([1, IMAGE, IMAGE, *words(3)])
    tokens = check(model, Batch(ids, torch.ones_like(ids), ids.clone(), pixels[:2], features[:2]))
    assert tokens.visual.tolist() == [[False] + [True] * 2 * VISUAL_TOKENS + [False] * 3]


@pytest.mark.parametrize("side", ["left", "right"])
def test_truncation_through_the_middle_of_an_image(model: Any, gallery: tuple[Tensor, list[Tensor]], side: str) -> None:
    pixels, features = gallery
    model.config.update({"tokenizer_padding_side": side, "tokenizer_model_max_length": 10})
    ids = ids_of(image_row(2, 5), [1, *words(8)])
    tokens = check(model, Batch(ids, ids.bool(), ids.clone(), pixels[:2], features[:2]))
    assert tokens.visual.sum(1).tolist() == [7, 0]
    assert tokens.attention.sum(1).tolist() == [10, 9]


def test_a_text_only_batch_passes_unchanged_and_has_no_visual_token(model: Any) -> None:
    ids = ids_of([1, *words(5)], [1, *words(3), PAD, PAD])
    attention = (ids != PAD).long()
    labels = torch.where(ids != PAD, ids, IGNORED)
    labels[:, :3] = IGNORED
    call = (ids, None, attention, None, labels, None)
    unwrapped = model.prepare_inputs_labels_for_multimodal(*call)
    result, tokens = spliced(model.prepare_inputs_labels_for_multimodal, *call)
    assert result[0] is ids
    assert result[2] is attention
    assert result[5] is labels
    assert_same(result, unwrapped)
    assert not tokens.visual.any()
    assert torch.equal(tokens.attention, attention.bool())
    assert tokens.prompt.tolist() == [[True] * 3 + [False] * 3, [True] * 3 + [False] * 3]


def test_a_decode_step_has_no_map_and_passes_unchanged(model: Any) -> None:
    cache = model(input_ids=ids_of([1, *words(3)]), use_cache=True).past_key_values
    ids, attention = ids_of([300]), torch.ones(1, 5)
    result, tokens = spliced(
        model.prepare_inputs_labels_for_multimodal, ids, None, attention, cache, None, images=pictures(1)
    )
    assert tokens is None
    assert result[0] is ids
    assert result[2] is attention
    assert result[3] is cache


def test_keywords_work_as_well_as_positions(model: Any, gallery: tuple[Tensor, list[Tensor]]) -> None:
    ids = ids_of(image_row(1, 2))
    _, tokens = spliced(
        model.prepare_inputs_labels_for_multimodal,
        images=gallery[0][:1],
        labels=None,
        past_key_values=None,
        attention_mask=None,
        position_ids=None,
        input_ids=ids,
    )
    assert tokens.visual.sum() == VISUAL_TOKENS


def test_the_map_is_in_the_scope_of_a_model_with_an_adapter(
    model: Any, steered: Callable[..., Attachment], gallery: tuple[Tensor, list[Tensor]]
) -> None:
    batch = Batch(ids_of(image_row(2, 4)), None, None, gallery[0][:1], gallery[1][:1])
    unwrapped = model.prepare_inputs_labels_for_multimodal(*batch.arguments)
    attachment = steered()
    with entered(opened(attachment)) as scope:
        result = model.prepare_inputs_labels_for_multimodal(*batch.arguments)
        assert scope.tokens is not None
        assert torch.equal(scope.tokens.visual, lay_out(model, batch).visual)
    assert_same(result, unwrapped)
    assert current() is None
    assert_same(model.prepare_inputs_labels_for_multimodal(*batch.arguments), unwrapped)


def test_a_splice_with_other_arguments_is_refused_and_the_missing_ones_are_named() -> None:
    def splice(input_ids: Tensor, past_key_values: Any, images: Any) -> tuple[Any, ...]:
        return (input_ids,)

    with pytest.raises(UpstreamError, match="takes no attention_mask, labels"):
        spliced(splice, ids_of([1, 300]), None, None)


def test_a_splice_with_other_results_is_refused() -> None:
    def splice(
        input_ids: Tensor, attention_mask: Any, past_key_values: Any, labels: Any, images: Any
    ) -> tuple[Any, ...]:
        return input_ids, attention_mask, labels

    with pytest.raises(UpstreamError, match="returns 3 values"):
        spliced(splice, ids_of([1, 300]), None, None, None, None)


# Images in tiles


@pytest.fixture(scope="module")
def tiled(tiny: TinyLlava, patched_llava: Path) -> Any:
    """The tiny LLaVA as LLaVA-1.6 takes images: in tiles by their shape, without padding, rows ended by a newline."""
    model = load_llava(
        tiny.llava,
        image_aspect_ratio="anyres",
        mm_patch_merge_type="spatial_unpad",
        image_grid_pinpoints=[[56, 112], [112, 56], [112, 112], [168, 56]],
    )
    generator = torch.Generator().manual_seed(0)
    model.model.image_newline = torch.nn.Parameter(torch.randn(model.config.hidden_size, generator=generator))
    return model


@pytest.fixture
def real_images(tiny: TinyLlava) -> Iterator[list[Image.Image]]:
    files = sorted(tiny.images.glob("*.png"))[: len(SIZES)]
    opened_files = [Image.open(file) for file in files]
    yield [image.convert("RGB") for image in opened_files]
    for image in opened_files:
        image.close()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("longest", [2048, 50], ids=["whole", "truncated"])
def test_real_images_in_tiles_of_different_numbers(
    tiled: Any, real_images: list[Image.Image], side: str, labelled: bool, longest: int
) -> None:
    from llava.mm_utils import process_images

    tiled.config.update({"tokenizer_padding_side": side, "tokenizer_model_max_length": 2048})
    pixels = process_images(real_images, tiled.get_vision_tower().image_processor, tiled.config)
    assert len({tuple(image.shape) for image in pixels}) > 1, "all images got the same tiles; the test would show less"
    sizes = [image.size for image in real_images]
    features = []
    with torch.no_grad():
        for image, size in zip(pixels, sizes, strict=True):
            alone = tiled.prepare_inputs_labels_for_multimodal(
                ids_of([IMAGE, 300]), None, None, None, None, [image], [size]
            )
            features.append(alone[4][0, :-1])
    assert len({len(feature) for feature in features}) > 2
    # Two images, none (its picture goes unseen), one, and one that ends the row.
    rows = [[*image_row(1, 2), IMAGE, *words(2)], [1, *words(4)], image_row(3, 1), [1, 300, IMAGE]]
    length = max(map(len, rows))
    ids = torch.tensor([row + [PAD] * (length - len(row)) for row in rows])
    labels = torch.where((ids == PAD) | (ids == IMAGE), IGNORED, ids) if labelled else None
    assert len(features) == 5
    tiled.config.tokenizer_model_max_length = longest
    tokens = check(tiled, Batch(ids, ids != PAD, labels, pixels, features, sizes=sizes))
    whole = [len(features[0]) + len(features[1]), 0, len(features[3]), len(features[4])]
    cut = [50 - 4, 0, 50 - 4, 50 - 2]  # of what is left the words before and between the images
    assert tokens.visual.sum(1).tolist() == (whole if longest == 2048 else cut)


def test_at_decode_steps_nothing_is_looked_up_again_and_the_splice_gets_its_arguments_as_they_came(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[tuple[Any, ...]] = []

    class Forked:
        def splice(
            self, input_ids: Any, position_ids: Any, attention_mask: Any, past_key_values: Any, labels: Any, images: Any
        ) -> tuple[Any, ...]:
            calls.append((input_ids, past_key_values, images))
            return input_ids, position_ids, attention_mask, past_key_values, None, labels

    ids, cache, images = torch.ones(2, 1, dtype=torch.long), object(), object()
    looked_up: list[Any] = []
    signature = inspect.signature
    monkeypatch.setattr(inspect, "signature", lambda of: (looked_up.append(of), signature(of))[1])
    for _ in range(3):
        assert spliced(Forked().splice, ids, None, None, cache, labels=None, images=images)[1] is None
        assert spliced(Forked().splice, None, None, None, None, None, images)[1] is None
    assert calls == [(ids, cache, images), (None, None, images)] * 3
    assert len(looked_up) == 1
    assert spliced(Forked().splice, ids, None, None, None, None, images)[1] is not None, "a prompt of one token"
