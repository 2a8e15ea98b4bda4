"""Measure the steering of one MoReS adapter over answers: how large it is, and what is lost where it is off."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from llava_steering_plugin.adapters.attachment import required
from llava_steering_plugin.diagnostics.positions import forced_pass
from llava_steering_plugin.diagnostics.records import KEY, Records
from llava_steering_plugin.errors import ArgumentsError
from llava_steering_plugin.hooks.decoder import find_decoder
from llava_steering_plugin.inference.asking.forced import force_answer
from llava_steering_plugin.inference.asking.greedy import answer_greedily, pixels_of
from llava_steering_plugin.inference.asking.prompts import said
from llava_steering_plugin.inference.asking.questions import Question
from llava_steering_plugin.inference.training_samples import TrainingSamples
from llava_steering_plugin.inference.tunable import TunableModel
from llava_steering_plugin.measures.steering import steerings, watched_norms, without_layer, without_layers
from llava_steering_plugin.modes.mores import SteeredLayer, Steering

NO_ANSWER = "no token of its answer is within the length that the model reads."


@dataclass(frozen=True)
class SteeredModel:
    """The steering of a model by the numbers of its layers.

    Attributes:
        layers: the `SteeredLayer` of each steered layer.
        steerings: by the layer's number and the modality, "vis" or "text".
    """

    layers: Mapping[int, nn.Module]
    steerings: Mapping[tuple[int, str], Steering]


def steered_model(model: Any) -> SteeredModel:
    """Return the steering of a model that carries a MoReS adapter, or a joint one with MoReS as a part.

    Raises:
        SteeringError: it carries no adapter.
    """
    numbers = {layer.path: number for number, layer in enumerate(find_decoder(model)[1].layers)}
    modules = required(model).modules
    steered = steerings(modules)
    found = {(numbers[path], modality): each for (path, modality), each in steered.items()}
    layers = {numbers[path]: modules[path] for path, _ in steered}
    return SteeredModel(dict(sorted(layers.items())), dict(sorted(found.items())))


def chosen_tokens(steered: SteeredModel) -> dict[str, list[str]]:
    """Return which tokens are steered, as `--mores_tokens` writes them, by modality; in the order of the layers."""
    found: dict[str, list[str]] = {}
    for number, modality in steered.steerings:
        layer = steered.layers[number]
        assert isinstance(layer, SteeredLayer)
        found.setdefault(modality, []).append(layer.selection(modality).spec)
    return found


@dataclass(frozen=True)
class Prepared:
    """An answer that can be passed through the model any number of times.

    Attributes:
        loss: runs a pass, and returns the mean negative log-likelihood of the answer's tokens; NaN without any.
        answer: what it says; None: the data say it.
    """

    loss: Callable[[], float]
    answer: str | None


# Prepares the answer of a key; a text says why it has to be left out.
Prepare = Callable[[Any], Prepared | str]


def measure_steering(steered: SteeredModel, keys: Sequence[Any], prepare: Prepare, records: Records) -> Iterator[int]:
    """Measure the answers that `records` lacks, and yield the number of those that are done.

    Args:
        keys: of the answers: question ids, or the numbers of samples.
    """
    done = sum(key in records for key in keys)
    yield done
    for key in keys:
        if key not in records:
            prepared = prepare(key)
            records.add({KEY: key} | ({"left_out": prepared} if isinstance(prepared, str) else _of(steered, prepared)))
            done += 1
            yield done


def _of(steered: SteeredModel, prepared: Prepared) -> dict[str, Any]:
    """Return the record of one answer, without its key."""
    named = {(str(number), modality): each for (number, modality), each in steered.steerings.items()}
    with watched_norms(named) as norms:
        loss = prepared.loss()
    if math.isnan(loss):
        return {"left_out": NO_ANSWER, "answer": prepared.answer}
    with without_layers(steered.layers.values()):
        off = prepared.loss()
    without = {}
    for number, layer in steered.layers.items():
        with without_layer(layer):
            without[str(number)] = prepared.loss()
    return {
        "answer": prepared.answer,
        "loss": loss,
        "off": off,
        "without": without,
        "norms": {" ".join(place): [each.mean(), each.spread(), each.tokens()] for place, each in norms.items()},
    }


def questions_prepared(
    opened: TunableModel,
    questions: Sequence[Question],
    given: Mapping[Any, str] | None,
    images: Path,
    template: str,
    max_new_tokens: int,
) -> Prepare:
    """Return a function that prepares the answer to the question of an id.

    Args:
        given: the answers, by question id; None: the model's own, generated greedily.
        template: the name of one of LLaVA's conversation templates.
    """
    by_id = {question.id: question for question in questions}

    def prepare(key: Any) -> Prepared | str:
        question = by_id[key]
        pixels = pixels_of(opened, [images / name for name in question.images])
        answer: str | list[int] = (
            answer_greedily(opened, question, template, pixels, max_new_tokens) if given is None else given[key]
        )
        forced = force_answer(opened.tokenizer, template, said(question, opened.model.config), answer)
        try:
            this_pass = forced_pass(opened.model, forced, pixels)
        except ArgumentsError as error:
            return str(error)
        text = answer if isinstance(answer, str) else opened.tokenizer.decode(answer, skip_special_tokens=True)
        return Prepared(lambda: float(this_pass.forward().loss), text.strip())

    return prepare


def samples_prepared(samples: TrainingSamples) -> Prepare:
    """Return a function that prepares the answers of the training sample of a number."""

    def prepare(key: Any) -> Prepared | str:
        score = samples.scored(key)
        return Prepared(lambda: score().loss, None)

    return prepare


def save_bases(steered: SteeredModel, file: Path) -> None:
    """Keep the subspaces of an adapter, so that they can be compared without a model."""
    with torch.no_grad():
        bases = {" ".join(map(str, place)): each.basis() for place, each in steered.steerings.items()}
    save_file({name: basis.cpu().contiguous() for name, basis in bases.items()}, file)


def load_bases(file: Path) -> dict[tuple[int, str], Tensor]:
    """Return the subspaces of an adapter, float32 [rank, D] each, by the layer's number and the modality."""
    found = {}
    for name, basis in load_file(file).items():
        layer, _, modality = name.partition(" ")
        found[int(layer), modality] = basis
    return dict(sorted(found.items()))
