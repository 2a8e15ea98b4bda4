"""Captions of Flickr30k: CIDEr and BLEU, by the package pycocoevalcap, which needs Java for its tokenizer.

Sources: Flickr30k (github.com/tylin/coco-caption for the measures; arXiv 1411.4555 and 1412.2306 for the split of 1,000
test images, in Karpathy's dataset_flickr30k.json).
"""

from __future__ import annotations

import contextlib
import importlib
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llava_steering_plugin.errors import DataError
from llava_steering_plugin.evaluation.benchmark import ALL, Metrics, Pair, Points, References, Wanted, percent
from llava_steering_plugin.evaluation.official_files import keyed, official, read_json, reading, text_of

PACKAGE = "pycocoevalcap"


def read_flickr30k(source: Path, wanted: Wanted) -> References:
    """Read the captions of a split (default: test); the name of the image's file is the id.

    Raises:
        DataError: the file is missing, damaged, or of another layout.
    """
    path = official(source, "dataset_flickr30k.json")
    held = read_json(path, dict, 'an object with "images"')
    split = wanted.split or "test"
    with reading(path):
        chosen = [image for image in held["images"] if image["split"] == split]
        return References(keyed(path, ((image["filename"], _captions(image)) for image in chosen)))


def _captions(image: Mapping[str, Any]) -> list[str]:
    found = [text_of(sentence, "raw") for sentence in image["sentences"]]
    if not found:
        raise ValueError(f"image {image['filename']} has no captions")
    return found


def caption_metrics(pairs: Sequence[Pair]) -> Metrics:
    """Return CIDEr and BLEU-1 to BLEU-4, times 100.

    Raises:
        DataError: the package or Java is missing.
    """
    cider, bleu = _measured(pairs)
    values: dict[str, float | int | None] = {"cider": percent(list(cider.values()))}
    values |= {f"bleu-{order}": 100 * value for order, value in enumerate(bleu, 1)}
    return {ALL: {**values, "questions": len(pairs)}}


def cider_points(pairs: Sequence[Pair]) -> Points:
    """Return the CIDEr of each image, whose mean is that of all; BLEU is no mean over images.

    Raises:
        DataError: the package or Java is missing.
    """
    return _measured(pairs)[0]


def _measured(pairs: Sequence[Pair]) -> tuple[Points, list[float]]:
    """Return the CIDEr of each image, and BLEU-1 to BLEU-4 of all."""
    problems = []
    scorers: dict[str, Any] = {}
    try:
        for name, module in (
            ("PTBTokenizer", "tokenizer.ptbtokenizer"),
            ("Bleu", "bleu.bleu"),
            ("Cider", "cider.cider"),
        ):
            scorers[name] = getattr(importlib.import_module(f"{PACKAGE}.{module}"), name)
    except ImportError:
        problems.append(f"the package {PACKAGE}: pip install 'llava-steering-plugin[scores]'")
    if shutil.which("java") is None:
        problems.append("Java, for its tokenizer: a java on the PATH, such as Debian's default-jre-headless")
    if problems:
        raise DataError(f"CIDEr and BLEU need {'; and '.join(problems)}.")
    # The package prints as it works, and standard output is for the scores.
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        tokenizer = scorers["PTBTokenizer"]()
        right = tokenizer.tokenize({pair.key: [{"caption": text} for text in pair.reference] for pair in pairs})
        said = tokenizer.tokenize({pair.key: [{"caption": pair.text}] for pair in pairs})
        bleu, _ = scorers["Bleu"](4).compute_score(right, said)
        _, cider = scorers["Cider"]().compute_score(right, said)  # in the order of `right`
    return dict(zip(right, map(float, cider), strict=True)), [float(value) for value in bleu]
