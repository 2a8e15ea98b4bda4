"""Measure where on one image a model looks, where MoReS moves it, and which parts of the image its answer needs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llava_steering_plugin.diagnostics.image.answer_score import AnswerScore, differentiable_tower
from llava_steering_plugin.diagnostics.modality.one_model import answer_ids
from llava_steering_plugin.diagnostics.positions import ForcedPass, forced_pass
from llava_steering_plugin.errors import ArgumentsError, SteeringError
from llava_steering_plugin.hooks.decoder import find_decoder
from llava_steering_plugin.inference.asking.answering import BatchAnswers
from llava_steering_plugin.inference.asking.forced import force_answer
from llava_steering_plugin.inference.asking.questions import Question
from llava_steering_plugin.inference.models import AnsweringModel
from llava_steering_plugin.inference.patch_grid import (
    PatchGrid,
    chosen_window,
    over_patches,
    patch_grid,
    window_numbers,
    windows_of,
)
from llava_steering_plugin.inference.words import Word, group_words
from llava_steering_plugin.measures.effect import GRADIENTS, NONE, OCCLUSION, STEPS, integrated_gradients, occlusion
from llava_steering_plugin.measures.modality import Kind, answer_queries
from llava_steering_plugin.measures.patches import Updates, find_sinks, measure_attention, watched_updates
from llava_steering_plugin.modes.joint import part_names
from llava_steering_plugin.pool.pool import BASE

# By default, windows are as small as they can be with so many passes.
PASSES = 200
# Windows that are hidden at once, in rows of one batch.
AT_ONCE = 4
# Called with the number of passes done, and how many there are.
Tick = Callable[[int, int], None]


@dataclass(frozen=True)
class EffectOptions:
    """Settings for the map of effects.

    Attributes:
        kind: one of `measures.effect.EFFECTS`.
        window: side of an occluded window in patches; None: chosen by `PASSES`.
    """

    kind: str
    window: int | None = None


def measure_image(
    opened: AnsweringModel,
    adapter: str,
    answering: BatchAnswers,
    question: Question,
    given: str | None,
    size: tuple[int, int],
    options: EffectOptions,
    tick: Tick,
) -> dict[str, Any]:
    """Measure one model on one image and question, ready for JSON.

    Args:
        adapter: the name in the pool of `opened` that is asked.
        given: the answer; None: the model's own, greedy.
        size: width and height of the image.

    Raises:
        ArgumentsError: the answer is empty, or the question is too long for the model.
        SteeringError: attention cannot be read, or the image's tokens are no grid.
    """
    model, tokenizer = opened.loaded.pool.model, opened.loaded.tokenizer
    pixels = answering.pixels([question])
    answer = given if given is not None else answer_ids(answering.generated([question]), tokenizer)[0]
    forced = force_answer(tokenizer, answering.template(question), answering.said(question), answer)
    this_pass = forced_pass(model, forced, pixels, adapter)
    ids = forced.ids[forced.answer :]
    words = group_words(tokenizer, ids)
    if not words:
        raise ArgumentsError("its answer is empty. Give one with --answer.")
    images = pixels["images"]
    images = images if isinstance(images, Tensor) else torch.stack(list(images))
    visual = (this_pass.kinds[0] == Kind.IMAGE).nonzero().flatten()
    tiles = images.shape[1] if images.dim() == 5 else 1
    grid = patch_grid(size, len(visual), tiles, model, opened.loaded.processor)
    score = AnswerScore(model, this_pass, size, images.dtype, adapter)
    with watched_updates(opened.loaded.pool.modules(adapter)) as updates:
        attention, output = _attention(model, this_pass, visual)
    chance = score.of_logits(output.logits)
    if not bool(attention.isfinite().all() and chance.isfinite().all()):
        raise ArgumentsError("the model computes NaN or infinite numbers.")
    return {
        "answer": tokenizer.decode(ids, skip_special_tokens=True).strip(),
        "log_probability": rounded(chance)[0],
        "conversation": answering.template(question),
        "grid": {"rows": grid.rows, "columns": grid.columns, "box": [float(edge) for edge in grid.box]},
        "tokens": {"image": len(visual), "shown": grid.rows * grid.columns},
        **_words(attention, words, this_pass, grid),
        "effect": _effect(score, images, grid, options, tick),
        "update": _update(updates, opened, adapter, visual, grid),
    }


def _attention(model: Any, this_pass: ForcedPass, visual: Tensor) -> tuple[Tensor, Any]:
    """Return the attention of all text behind the image to its tokens, float64 [layers, text, tokens]."""
    queries = torch.arange(this_pass.kinds.shape[1]) > int(visual[-1])
    return measure_attention(model, this_pass.forward, queries, visual)


def _words(attention: Tensor, words: list[Word], this_pass: ForcedPass, grid: PatchGrid) -> dict[str, Any]:
    """Return the maps of the words, and the sinks."""
    patches = slice(grid.first, grid.first + grid.rows * grid.columns)
    start = int((this_pass.kinds[0] == Kind.IMAGE).nonzero()[-1]) + 1
    asked = answer_queries(this_pass.kinds)[0][start:]
    asking = (this_pass.kinds[0][start:] == Kind.PROMPT) & ~asked
    of_answer, of_question = attention[:, asked], attention[:, asking]
    by_word = torch.stack([of_answer[:, list(word.tokens)].mean(1) for word in words])
    means = by_word.mean(1)
    sinks = find_sinks(means[:, patches], of_question.mean(0)[:, patches]).view(grid.rows, grid.columns)
    return {
        "words": [
            {
                "text": word.text,
                "tokens": len(word.tokens),
                "on_image": rounded(mean.sum()),
                "attention": _map(mean[patches], grid),
                "attention_by_layer": [_map(layer[patches], grid) for layer in layers],
            }
            for word, layers, mean in zip(words, by_word, means, strict=True)
        ],
        "sinks": sinks.nonzero().tolist(),
    }


def _effect(score: AnswerScore, images: Tensor, grid: PatchGrid, options: EffectOptions, tick: Tick) -> dict[str, Any]:
    """Return the map of effects."""
    if options.kind == NONE:
        return {"left_out": "--effect none"}
    window = 1 if options.kind == GRADIENTS else options.window or chosen_window(grid, PASSES)
    count = windows_of(grid, window)
    windows = window_numbers(grid, window, score.size, images, score.model).to(images.device)
    passes = STEPS if options.kind == GRADIENTS else count + 1
    done = 0

    def counted(pixels: Tensor) -> Tensor:
        nonlocal done
        found = score(pixels)
        done = min(done + len(pixels), passes)
        tick(done, passes)
        return found

    if options.kind == OCCLUSION:
        values, more = occlusion(counted, images.float(), windows, AT_ONCE), {}
    else:
        score.model.requires_grad_(False)
        try:
            with differentiable_tower(score.model):
                values, gap = integrated_gradients(counted, images.float(), windows)
                more = {"gap": float(f"{gap:.4g}")}
        except RuntimeError as error:
            raise SteeringError(
                f"no gradients reach the pixels of this model ({error}). Use --effect occlusion."
            ) from error
    return {
        "kind": options.kind,
        "window": window,
        "passes": passes,
        **more,
        "values": _map(over_patches(grid, window, values[:count]).flatten(), grid),
    }


def _update(updates: Updates, opened: AnsweringModel, adapter: str, visual: Tensor, grid: PatchGrid) -> dict[str, Any]:
    """Return the relative size of MoReS' updates by layer; null for patches that it does not steer."""
    pool = opened.loaded.pool
    if not updates.by_layer:
        if "mores" in part_names(pool.details(adapter).mode):
            return {"left_out": "this MoReS adapter steers text only"}
        return {"left_out": f"only MoReS moves hidden states of patches; this is {_called(opened, adapter)}"}
    numbers = {layer.path: number for number, layer in enumerate(find_decoder(pool.model)[1].layers)}
    layers = sorted((numbers[path], *found) for path, found in updates.by_layer.items())
    maps = []
    for _, positions, norms in layers:
        everywhere = torch.full((int(visual[-1]) + 1,), float("nan"), dtype=torch.float64)
        everywhere[positions] = norms
        maps.append(everywhere[visual][grid.first : grid.first + grid.rows * grid.columns])
    return {
        "layers": [number for number, *_ in layers],
        "values": _map(torch.stack(maps).nanmean(0), grid),
        "values_by_layer": [_map(each, grid) for each in maps],
    }


def _called(opened: AnsweringModel, adapter: str) -> str:
    if adapter != BASE:
        return f"an adapter of {opened.kind}"
    return "a LoRA" if opened.kind == "lora" else "a base"


def _map(values: Tensor, grid: PatchGrid) -> list[list[float | None]]:
    """Return the values of patches as rows."""
    return [rounded(row) for row in values.view(grid.rows, grid.columns)]


def rounded(values: Tensor) -> Any:
    """Return numbers as JSON keeps them, with four digits; null for those that are not defined."""
    if values.dim() == 0:
        value = float(values)
        return float(f"{value:.4g}") if value == value else None
    return [rounded(each) for each in values.detach().cpu()]
