"""Samples that LLaVA cannot be trained on, one of each kind and more, with the kind of defect that each has."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image
from tiny_llava import TinyLlava

PICTURE = "00.png"


def turns(*texts: object, first: str = "<image>\nWhat color is it?") -> list[dict[str, object]]:
    """A conversation of these answers, each after a question."""
    said: list[dict[str, object]] = []
    for number, text in enumerate(texts):
        said += [{"from": "human", "value": "And now?" if number else first}, {"from": "gpt", "value": text}]
    return said


def pictured(name: object, **changed: object) -> dict[str, object]:
    return {"id": "bad", "image": name, "conversations": turns("It is red."), **changed}


def said(*pairs: tuple[object, object]) -> dict[str, object]:
    """A sample without a picture, of (role, text)."""
    return {"id": "bad", "conversations": [{"from": role, "value": text} for role, text in pairs]}


# Written into the folder of images by `write_pictures`, by name: size and mode.
SIZES = {
    "1x1.png": (1, 1),
    "3x3.png": (3, 3),
    "1x3.png": (1, 3),
    "3x1.png": (3, 1),
    "2x3.png": (2, 3),
    "200000x2.png": (200_000, 2),
}
ASKED, ANSWERED = ("human", "What is red?"), ("gpt", "It is red.")
BAD: Mapping[str, tuple[Any, str]] = {
    "null": (None, "not_an_object"),
    "number": (7, "not_an_object"),
    "list": ([pictured(PICTURE)], "not_an_object"),
    "no-conversations": ({"id": "bad", "image": PICTURE}, "no_turns"),
    "no-turns": (pictured(PICTURE, conversations=[]), "no_turns"),
    "turns-null": (pictured(PICTURE, conversations=None), "no_turns"),
    "turns-text": (pictured(PICTURE, conversations="<image> What?"), "no_turns"),
    "turn-text": (pictured(PICTURE, conversations=["<image>\nWhat?", "It is red."]), "turn"),
    "turn-null": (pictured(PICTURE, conversations=[*turns("Red."), None]), "turn"),
    "role-bot": (said(ASKED, ("bot", "It is red.")), "role"),
    "role-system": (said(("system", "Be kind."), ASKED, ANSWERED), "role"),
    "role-capital": (said(("Human", "What is red?"), ANSWERED), "role"),
    "role-null": (said((None, "What is red?"), ANSWERED), "role"),
    "role-missing": (pictured(PICTURE, conversations=[{"value": "<image>\nWhat?"}, *turns("Red.")[1:]]), "role"),
    "role-list": (said((["human"], "What is red?"), ANSWERED), "role"),
    "two-humans": (said(ASKED, ASKED, ANSWERED), "order"),
    "two-answers": (said(ASKED, ANSWERED, ANSWERED), "order"),
    "two-answers-first": (said(ANSWERED, ANSWERED, ASKED, ANSWERED), "order"),
    "answer-null": (pictured(PICTURE, conversations=turns(None)), "text"),
    "answer-number": (pictured(PICTURE, conversations=turns(4)), "text"),
    "answer-list": (pictured(PICTURE, conversations=turns(["It is red."])), "text"),
    "answer-missing": (pictured(PICTURE, conversations=[*turns("x")[:1], {"from": "gpt"}]), "text"),
    "question-null": (said(("human", None), ANSWERED), "text"),
    "half-a-pair": (said(ASKED, ("gpt", "It is \ud83d red.")), "unicode"),
    "answer-empty": (pictured(PICTURE, conversations=turns("")), "no_answer"),
    "answers-blank": (pictured(PICTURE, conversations=turns(" ", "\n")), "no_answer"),
    "question-only": (said(ASKED), "no_answer"),
    "answer-only": (said(ANSWERED), "no_answer"),
    "image-null": (pictured(None), "image_name"),
    "image-empty": (pictured(""), "image_name"),
    "image-list": (pictured([PICTURE, "01.png"]), "image_name"),
    "image-list-of-one": (pictured([PICTURE]), "image_name"),
    "image-number": (pictured(7), "image_name"),
    "image-object": (pictured({"path": PICTURE}), "image_name"),
    "image-missing": (pictured("nothing-here.png"), "image_missing"),
    "image-below-a-file": (pictured("00.png/00.png"), "image_missing"),
    "image-nul": (pictured("00\0.png"), "image_unreadable"),
    "image-half-a-pair": (pictured("\ud83d.png"), "image_unreadable"),
    "image-no-utf-8": (pictured("\udcff.png"), "image_missing"),
    "image-name-too-long": (pictured("a" * 5000), "image_unreadable"),
    "image-with-a-line-end": (pictured("00\n.png"), "image_missing"),
    "image-folder": (pictured("."), "image_unreadable"),
    "image-pipe": (pictured("pipe.png"), "image_unreadable"),
    "image-of-0-bytes": (pictured("empty.png"), "image_unreadable"),
    "image-truncated": (pictured("truncated.png"), "image_unreadable"),
    "image-truncated-jpeg": (pictured("truncated.jpg"), "image_unreadable"),
    "image-of-text": (pictured("text.png"), "image_unreadable"),
    "image-bomb": (pictured("bomb.png"), "image_unreadable"),
    **{f"image-{name[:-4]}": (pictured(name), "image_size") for name in SIZES},
    "two-marks-in-turns": (
        pictured(PICTURE, conversations=[*turns("Red."), *turns("Red.")]),
        "image_marks",
    ),
    "two-marks-in-one": (
        pictured(PICTURE, conversations=turns("Red.", first="<image>\n<image>\nWhich is red?")),
        "image_marks",
    ),
    "mark-in-the-answer": (pictured(PICTURE, conversations=turns("It is <image>.")), "image_marks"),
    "picture-without-mark": (pictured(PICTURE, conversations=turns("Red.", first="What?")), "image_marks"),
    "mark-in-the-turn-left-out": (
        pictured(PICTURE, conversations=[{"from": "gpt", "value": "<image>"}, *turns("Red.", first="What?")]),
        "image_marks",
    ),
    "mark-without-picture": (said(("human", "<image>\nWhat color is it?"), ANSWERED), "image_marks"),
    "mark-last-without-picture": (said(("human", "What color is it?\n<image>"), ANSWERED), "image_marks"),
}

# Odd, and read rightly by LLaVA: nothing may refuse them.
ODD: Mapping[str, dict[str, object]] = {
    "no-id": {"image": PICTURE, "conversations": turns("It is red.")},
    "first-turn-not-human": said(("gpt", "Hello."), ASKED, ANSWERED),
    "trailing-question": said(ASKED, ANSWERED, ASKED),
    "mark-inside-a-text": said(("human", "In <image> of RSS, what is a link?"), ("gpt", "<image> has one.")),
    "mark-at-the-end": pictured(PICTURE, conversations=turns("Red.", first="What?\n<image>")),
    "question-empty": pictured(PICTURE, conversations=turns("Red.", first="<image>")),
    "one-answer-empty": pictured(PICTURE, conversations=turns("Red.", "")),
    "more-keys": pictured(PICTURE, source="somewhere", score=3.5),
    "dots-in-the-path": pictured("../images/00.png"),
    "other-scripts": said(("human", "赤は何ですか 🔴"), ("gpt", "それは赤です。")),
    **{
        f"mode-{name}": pictured(f"{name}.{kind}")
        for name, kind in {
            "cmyk": "jpg",
            "palette": "png",
            "transparent": "png",
            "animated": "gif",
            "i16": "png",
            "bilevel": "png",
            "grey": "png",
            "2x2": "png",
            "3x40": "png",
            "40x2": "png",
        }.items()
    },
}


def write_pictures(tiny: TinyLlava, folder: Path) -> Path:
    """A folder `images` below `folder`: the tiny LLaVA's pictures as links, and those that `BAD` and `ODD` name."""
    images = folder / "images"
    images.mkdir()
    for picture in tiny.images.iterdir():
        (images / picture.name).symlink_to(picture)
    for name, size in SIZES.items():
        Image.new("RGB", size, (200, 30, 30)).save(images / name)
    whole = Image.effect_noise((64, 64), 90)
    for name in ("truncated.png", "truncated.jpg"):
        whole.convert("RGB").save(images / name)
        os.truncate(images / name, (images / name).stat().st_size // 2)
    (images / "empty.png").touch()
    (images / "text.png").write_text("no picture")
    os.mkfifo(images / "pipe.png")
    Image.new("1", (20_000, 20_000)).save(images / "bomb.png")
    whole.convert("CMYK").save(images / "cmyk.jpg")
    whole.convert("P").save(images / "palette.png")
    whole.convert("RGBA").save(images / "transparent.png")
    whole.save(images / "animated.gif", save_all=True, append_images=[whole.rotate(90)])
    Image.new("I;16", (64, 48), 40_000).save(images / "i16.png")
    whole.convert("1").save(images / "bilevel.png")
    whole.save(images / "grey.png")
    for width, height in ((2, 2), (3, 40), (40, 2)):
        Image.new("RGB", (width, height), (30, 30, 200)).save(images / f"{width}x{height}.png")
    return images


def good_samples(tiny: TinyLlava) -> list[Any]:
    """The samples of the tiny LLaVA."""
    return list(json.loads(tiny.data.read_text()))


def write_data(folder: Path, samples: list[Any], name: str = "data.json") -> Path:
    path = folder / name
    path.write_text(json.dumps(samples))
    return path
