"""Measure one image with a model and its base, and write what came out: measurements, a table, a picture."""

from __future__ import annotations

import base64
import gc
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from llava_steering_plugin.adapters.stored.folder import PEFT_CONFIG
from llava_steering_plugin.adapters.stored.locate import find
from llava_steering_plugin.diagnostics.image.one_model import EffectOptions, measure_image
from llava_steering_plugin.diagnostics.pictures.overlays import draw_image
from llava_steering_plugin.diagnostics.results import weights_of, write_tables
from llava_steering_plugin.errors import ArgumentsError
from llava_steering_plugin.inference.asking.answering import AnswerOptions, BatchAnswers
from llava_steering_plugin.inference.asking.questions import Question
from llava_steering_plugin.inference.images import read_image
from llava_steering_plugin.inference.models import AnsweringModel, base_of_lora, open_model
from llava_steering_plugin.measures.patches import SINK
from llava_steering_plugin.pool.pool import BASE

# Side of the picture in the JSON: small enough to read as text, large enough for a page.
THUMBNAIL = 512

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class ImageRequest:
    """Holds what is asked of one run.

    Attributes:
        name, path: of the model.
        image: the file of the picture.
        question: without LLaVA's mark of an image.
        answer: the answer to measure; None: each model's own.
        effect: how the map of effects is made.
        conversation: LLaVA's template; None: the adapter's own, for its base too.
        max_new_tokens: the longest answer.
        base: where the base is, if it has moved.
        how: `device`, `load_4bit`, `load_8bit`.
        output: the folder of everything that is written.
    """

    name: str
    path: str
    image: Path
    question: str
    answer: str | None
    effect: EffectOptions
    conversation: str | None
    max_new_tokens: int
    base: str | None
    how: Mapping[str, Any]
    output: Path


@dataclass(frozen=True)
class _Shown:
    """One model of the picture: its name, what it is, and how it is asked."""

    name: str
    kind: str
    path: str
    opened: AnsweringModel
    adapter: str
    conversation: str | None


def run_image(request: ImageRequest, progress: Progress) -> list[Path]:
    """Measure the model, and its base before it if it has one; return the files of the result.

    Raises:
        SteeringError: a model cannot be loaded or measured.
    """
    picture = read_image(request.image)
    models = []
    for shown in _opened(request):
        models.append(_measured(request, shown, picture, progress))
        del shown  # before the next model is loaded
    document = _document(request, picture, models)
    target = request.output / "image"
    return [*write_tables(document, image_rows(models), target), *draw_image(document, target)]


def image_rows(models: Sequence[Mapping[str, Any]]) -> Iterator[list[Any]]:
    """Yield the rows of image.csv, the heading first: one for each model, map and patch, and layer of an update.

    The layer is empty where the map is the mean over layers, or of the whole model.
    """
    yield ["model", "map", "of", "layer", "row", "column", "value"]
    for model in models:
        maps: list[tuple[str, str, Any, Any]] = [
            ("attention", word["text"], "", word["attention"]) for word in model["words"]
        ]
        if "values" in model["effect"]:
            maps.append(("effect", model["effect"]["kind"], "", model["effect"]["values"]))
        if "values" in model["update"]:
            update = model["update"]
            maps.append(("update", "mores", "", update["values"]))
            layers = zip(update["layers"], update["values_by_layer"], strict=True)
            maps += [("update", "mores", number, values) for number, values in layers]
        for kind, of, layer, values in maps:
            for row, line in enumerate(values):
                for column, value in enumerate(line):
                    yield [model["name"], kind, of, layer, row, column, "" if value is None else value]


def _measured(request: ImageRequest, shown: _Shown, picture: Image.Image, progress: Progress) -> dict[str, Any]:
    """Measure one model."""
    asking = AnswerOptions(1, shown.conversation, {"max_new_tokens": request.max_new_tokens, "do_sample": False})
    answering = BatchAnswers(shown.opened.loaded, request.image.parent, asking)
    question = Question(0, request.question, (request.image.name,), shown.adapter)

    def tick(done: int, total: int) -> None:
        progress(shown.name, done, total)

    try:
        found = measure_image(
            shown.opened, shown.adapter, answering, question, request.answer, picture.size, request.effect, tick
        )
    except ArgumentsError as error:
        raise ArgumentsError(f"{shown.name} cannot be measured: {error}") from error
    return {"name": shown.name, "kind": shown.kind, "path": shown.path, "base": shown.opened.base, **found}


def _opened(request: ImageRequest) -> Iterator[_Shown]:
    """Yield the base and then the model; a base alone. They share one model in memory, but for a LoRA."""
    before = "base" if request.name != "base" else "its base"
    peft = Path(request.path).expanduser() / PEFT_CONFIG
    if find(request.path) is None and peft.is_file():
        where = request.base or base_of_lora(peft)
        yield _Shown(before, "base", where, open_model(where, None, dict(request.how)), BASE, request.conversation)
        gc.collect()  # model and pool refer to each other, and the LoRA's model needs the memory
    opened = open_model(request.path, request.base, dict(request.how))
    conversation = request.conversation or opened.loaded.pool.details(opened.adapter).conversation
    if opened.adapter != BASE:
        yield _Shown(before, "base", opened.base, opened, BASE, conversation)
    yield _Shown(request.name, opened.kind, request.path, opened, opened.adapter, conversation)


def _document(request: ImageRequest, picture: Image.Image, models: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {
        "measure": "image",
        "settings": {
            "question": request.question,
            "answer": request.answer,
            "effect": request.effect.kind,
            "occlusion_window": request.effect.window,
            "conv_mode": request.conversation,
            "max_new_tokens": request.max_new_tokens,
            "sink": SINK,
            "weights": weights_of(request.path),
            "load_4bit": request.how["load_4bit"],
            "load_8bit": request.how["load_8bit"],
        },
        "image": {
            "file": request.image.name,
            "width": picture.width,
            "height": picture.height,
            "thumbnail": _thumbnail(picture),
        },
        "models": list(models),
    }


def _thumbnail(picture: Image.Image) -> str:
    """Return a small copy of a picture as a data URL."""
    small = picture.copy()
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    file = io.BytesIO()
    small.save(file, "JPEG", quality=90, subsampling=0)  # patches of a small image keep their colours
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
