"""Take real pictures with English captions from a package of Debian: the stamps of Tux Paint (GPL-2).

Most are photographs of one thing. The letters, coins and cartoons of a drawing program are left out.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from experiments.stages import Context, StageError

PACKAGE = "tuxpaint-stamps-default"
INSTALLED = Path("/usr/share/tuxpaint/stamps")
LEFT_OUT = {"symbols", "cartoon"}  # folders
LONGEST = 70  # characters of a caption: longer ones tell stories
SIDE = 224  # pixels, what the encoder sees
HELD_OUT = 40
FEWEST = 100
QUESTION = "What is in the picture?"


@dataclass(frozen=True)
class Captioned:
    """A picture, as a path below its folder, and what it shows."""

    image: str
    caption: str


def prepare(stage: Context, stamps: Path | None, seed: int) -> dict[str, Any]:
    """Write pictures, and the data of all trainings and of the test, into the stage's folder.

    Args:
        stamps: a folder of stamps; None: those that are installed, else those of the package, fetched by apt-get.
        seed: draws the test's pictures, and the permutations.

    Raises:
        StageError: there are none, and none can be fetched.
    """
    source = stamps or (INSTALLED if INSTALLED.is_dir() else _fetch(stage))
    found = list(captioned(source))
    if len(found) < FEWEST:
        raise StageError(f"{source} has {len(found)} pictures with English captions; {FEWEST} are needed")
    for place, one in enumerate(found):
        write_square(source / one.image, stage.folder / "pictures" / one.image)
        stage.report(place + 1, len(found))
    shutil.rmtree(stage.folder / "package", ignore_errors=True)
    drawn = random.Random(seed)
    drawn.shuffle(found)
    for name, part in (("held-out", found[:HELD_OUT]), ("train", found[HELD_OUT:])):
        others = permuted([one.caption for one in part], drawn)
        _write(stage.folder / f"{name}.json", part, [one.image for one in part])
        _write(stage.folder / f"{name}-shuffled.json", part, [part[other].image for other in others])
    captions = [one.caption for one in part]
    first = permuted(captions, drawn, others)
    _write(stage.folder / "train-first.json", part, [part[other].image for other in first])
    return {"trained": len(found) - HELD_OUT, "held_out": HELD_OUT}


def captioned(stamps: Path) -> Iterator[Captioned]:
    """Yield the pictures of things that have a caption: the first line of the text file beside them."""
    for file in sorted(stamps.rglob("*.png")):
        path, text = file.relative_to(stamps), file.with_suffix(".txt")
        if LEFT_OUT.intersection(path.parts) or not text.is_file():
            continue
        caption = text.read_text(encoding="utf-8").partition("\n")[0].strip()
        if 0 < len(caption) <= LONGEST:
            yield Captioned(path.as_posix(), caption)


def permuted(captions: Sequence[str], drawn: random.Random, taken: Sequence[int] | None = None) -> list[int]:
    """Return a permutation that gives no caption the picture of an equal caption, its own included.

    Args:
        captions: of all pictures.
        drawn: draws it.
        taken: another permutation, which it differs from at every place.

    Raises:
        StageError: there is none that trading finds, for too many captions are equal.
    """

    def fits(picture: int, place: int) -> bool:
        return captions[picture] != captions[place] and (taken is None or taken[place] != picture)

    order = list(range(len(captions)))
    drawn.shuffle(order)
    for place, caption in enumerate(captions):
        if not fits(order[place], place):
            # Trade with one that suits both.
            fitting = [other for other in range(len(order)) if fits(order[other], place) and fits(order[place], other)]
            if not fitting:
                raise StageError(f"too many pictures have the caption {caption!r}: no other pictures are left for them")
            other = drawn.choice(fitting)
            order[place], order[other] = order[other], order[place]
    return order


def read(file: Path) -> list[Captioned]:
    """Return the pictures and captions of a data file."""
    return [Captioned(each["image"], each["conversations"][1]["value"]) for each in json.loads(file.read_text())]


def write_square(source: Path, target: Path) -> None:
    """Write a picture in the middle of a white square of `SIDE` pixels; what is transparent becomes white."""
    picture = Image.open(source).convert("RGBA")
    picture.thumbnail((SIDE, SIDE))
    square = Image.new("RGBA", (SIDE, SIDE), "white")
    square.alpha_composite(picture, ((SIDE - picture.width) // 2, (SIDE - picture.height) // 2))
    target.parent.mkdir(parents=True, exist_ok=True)
    square.convert("RGB").save(target)


def _write(file: Path, texts: Sequence[Captioned], images: Sequence[str]) -> None:
    samples = [
        {
            "id": str(place),
            "image": image,
            "conversations": [
                {"from": "human", "value": f"<image>\n{QUESTION}"},
                {"from": "gpt", "value": text.caption},
            ],
        }
        for place, (text, image) in enumerate(zip(texts, images, strict=True))
    ]
    file.write_text(json.dumps(samples, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _fetch(stage: Context) -> Path:
    """Fetch the package, and unpack it in the stage's folder: nothing is installed."""
    if not (shutil.which("apt-get") and shutil.which("dpkg-deb")):
        raise StageError(
            f"there is no apt-get, which fetches {PACKAGE}: give the folder of its stamps with --stamps (in the "
            "package usr/share/tuxpaint/stamps)"
        )
    try:
        stage.run(["apt-get", "download", PACKAGE])
    except StageError:  # a bare machine has no list of packages yet
        stage.run([*([] if os.geteuid() == 0 else ["sudo", "-n"]), "apt-get", "update"])
        stage.run(["apt-get", "download", PACKAGE])
    (package,) = stage.folder.glob(f"{PACKAGE}_*.deb")
    stage.run(["dpkg-deb", "-x", package.name, "package"])
    package.unlink()
    return stage.folder / "package" / INSTALLED.relative_to("/")
