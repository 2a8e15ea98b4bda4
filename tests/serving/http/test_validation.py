"""The fields and images of a request are checked before a model sees them, over real HTTP; the worker lives on."""

from __future__ import annotations

import base64
import gc
import io
import json
import re
import struct
import weakref
import zlib
from contextlib import suppress
from typing import Any

import pytest
from PIL import Image, ImageFile, UnidentifiedImageError
from serving_fixtures import Client, Question, body, encoded

from llava_steering_plugin.serving.generation.images import decode_image
from llava_steering_plugin.serving.http.limits import Limits
from llava_steering_plugin.serving.http.protocol import Refused
from llava_steering_plugin.serving.http.validation import check_request

pytest_plugins = ["serving_fixtures"]

pytestmark = pytest.mark.usefixtures("unharmed")


EPS = base64.b64encode(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n").decode()


def bomb() -> str:
    """A PNG of 8 KB that unpacks to 30,000 x 30,000 pixels."""

    def part(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(1 << 20), 9)
    return base64.b64encode(b"\x89PNG\r\n\x1a\n" + part(b"IHDR", header) + part(b"IDAT", pixels)).decode()


@pytest.mark.parametrize(
    "changes",
    [
        {"model": None},
        {"prompt": None},
        {"stop": None},
        {"stop": ""},
        {"model": 7},
        {"model": ["cats"]},
        {"prompt": {"text": "hello"}},
        {"prompt": "half \ud800"},
        {"stop": ["</s>"]},
        {"stop": "x" * 257},
        {"images": "iVBORw0"},
        {"images": [7]},
        {"images": {}},
        {"temperature": "hot"},
        {"temperature": -1},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"temperature": True},
        {"top_p": 1.5},
        {"max_new_tokens": "12"},
        {"max_new_tokens": 1.5},
        {"max_new_tokens": -1},
        {"max_new_tokens": 0},
        {"max_new_tokens": 10**400},
    ],
    ids=lambda changes: str(changes)[:40],
)
def test_missing_and_mistyped_fields_are_a_422_that_names_them(strict: Client, changes: dict[str, Any]) -> None:
    status, text = strict.refused(None, data=json.dumps(body(**changes)))
    assert status == 422
    assert repr(next(iter(changes))) in text


def test_all_that_is_wrong_with_the_fields_is_said_at_once(strict: Client) -> None:
    _, text = strict.refused({"temperature": "x"})
    assert all(f"'{key}'" in text for key in ("model", "prompt", "stop", "temperature"))


@pytest.mark.parametrize(
    "name", ["nobody", "", "../../etc/passwd", "__base__", "cats\0", "llava_steering_plugin", "C" * 9999]
)
def test_an_unknown_model_is_a_404_and_no_path(strict: Client, name: str) -> None:
    assert strict.refused(body(model=name))[0] == 404


def test_images_that_are_none_or_are_damaged_are_a_400(strict: Client) -> None:
    picture = io.BytesIO()
    Image.effect_noise((200, 200), 90).convert("RGB").save(picture, "PNG")
    whole = picture.getvalue()
    damaged = {
        "no base64": "not base64 at all!",
        "no image": base64.b64encode(b"hello" * 100).decode(),
        "empty": "",
        "cut off": base64.b64encode(whole[: len(whole) // 2]).decode(),
        "a header alone": base64.b64encode(whole[:30]).decode(),
        "flipped bits": base64.b64encode(whole[:100] + bytes(300) + whole[400:]).decode(),
        "a format that runs other programs": EPS,
    }
    answers = {what: strict.refused(body(images=[image])) for what, image in damaged.items()}
    assert {what: status for what, (status, _) in answers.items()} == dict.fromkeys(damaged, 400)
    assert all("Image 1 is" in text for _, text in answers.values())


def test_images_that_are_too_large_or_too_many_or_do_not_match_the_prompt_are_a_400(
    strict: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = encoded(Image.new("RGB", (9, 9)))
    large = encoded(Image.new("RGB", (400, 300)))
    unpacked: list[tuple[int, int]] = []
    load = ImageFile.ImageFile.load

    def noting(image: ImageFile.ImageFile) -> Any:
        unpacked.append(image.size)
        return load(image)

    monkeypatch.setattr(ImageFile.ImageFile, "load", noting)
    for images in ([large], [bomb()], [small] * 2, []):
        assert strict.refused(body(images=images))[0] == 400
    assert strict.refused(body(images=[small] * 3, prompt="<image>" * 3))[0] == 400
    assert strict.post(body(images=[small])).status_code == 200
    assert set(unpacked) == {(9, 9)}, "the bomb was unpacked"


@pytest.mark.parametrize("size", [(1, 1), (3, 3), (3, 2), (90, 1), (90, 3)])
def test_a_picture_that_image_processors_misread_is_a_400(strict: Client, size: tuple[int, int]) -> None:
    """They take a height of 1 or 3 for colour channels; where LLaVA pads, the longer side becomes the height."""
    status, text = strict.refused(body(images=[encoded(Image.new("RGB", size))]))
    assert (status, text) == (400, "Image 1 has too few pixels: it needs at least 4 in height.")


def test_small_pictures_that_are_read_rightly_are_answered(strict: Client) -> None:
    for size in ((2, 2), (4, 4), (3, 5)):
        assert strict.post(body(images=[encoded(Image.new("RGB", size))])).status_code == 200


@pytest.mark.parametrize("size", [(30_000, 1), (1, 30_000), (601, 100), (200, 1)])
def test_a_strip_whose_square_or_whose_enlargement_would_take_all_memory_is_a_400(
    strict: Client, size: tuple[int, int]
) -> None:
    """Upstream pads to a square, or enlarges until the short side has the vision tower's width."""
    status, text = strict.refused(body(images=[encoded(Image.new("RGB", size))]))
    assert status == 400 and "longer than 600 pixels, or more than 100 times as long as wide" in text


def test_a_photo_and_a_panorama_pass_the_limits_that_a_worker_has_by_default() -> None:
    for size in ((6000, 4000), (12_000, 3000), (1000, 11)):
        asked = check_request(body(images=[encoded(Image.new("RGB", size))]), Limits(), lambda _: "cats", True)
        assert len(asked.asked.images) == 1


def test_an_image_above_pils_own_limit_is_refused_with_that_limit() -> None:
    for pixels, said in ((1_000_000_000, "178,956,970"), (100_000_000, "100,000,000")):
        with pytest.raises(Refused, match=f"more than {said} pixels"):
            check_request(body(images=[bomb()]), Limits(image_pixels=pixels), lambda _: "cats", True)


@pytest.mark.parametrize("size", [(2000, 2000), (30_000, 1)])
def test_a_refused_image_is_freed_at_once(size: tuple[int, int]) -> None:
    """It may have megabytes, and Python looks for circles only now and then."""

    class Text(str):
        """Text that tells when it has gone."""

    image = Text(encoded(Image.new("RGB", size)))
    gone = weakref.ref(image)
    data = body(images=[image])
    gc.disable()
    try:
        with suppress(Refused):
            check_request(data, Limits(image_pixels=90_000), lambda _: "cats", True)
            pytest.fail("it was taken")
        del data, image
        assert gone() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "1", "CMYK"])
def test_pictures_in_other_modes_than_rgb_are_answered_like_the_same_pictures_in_rgb(strict: Client, mode: str) -> None:
    image = Image.effect_noise((40, 60), 90).convert("RGB").convert(mode)
    picture = encoded(image, "JPEG" if mode == "CMYK" else "PNG")
    plain = encoded(Image.open(io.BytesIO(base64.b64decode(picture))).convert("RGB"))
    answers = []
    for images in ([picture], [plain]):
        response = strict.post(body(images=images))
        states = [json.loads(part) for part in response.content.split(b"\0") if part]
        assert {state["error_code"] for state in states} == {0}
        answers.append(states[-1]["text"])
    assert answers[0] == answers[1]


def test_a_picture_waits_its_turn_as_it_came_and_not_unpacked() -> None:
    """A grey or CMYK JPEG of 40 million pixels has 2 MB, and as a PNG in RGB tens of them."""
    pictures = [encoded(Image.effect_noise((900, 600), 90).convert(mode), "JPEG") for mode in ("L", "CMYK", "RGB")]
    data = body(images=pictures, prompt="<image>" * 3)
    assert check_request(data, Limits(), lambda _: "cats", True).asked.images == tuple(map(base64.b64decode, pictures))


def test_the_model_is_given_pictures_in_rgb_and_none_of_a_format_that_runs_other_programs() -> None:
    picture = encoded(Image.effect_noise((40, 60), 90), "JPEG")
    given = decode_image(base64.b64decode(picture))
    assert given.mode == "RGB"
    assert given.tobytes() == Image.open(io.BytesIO(base64.b64decode(picture))).convert("RGB").tobytes()
    with pytest.raises(UnidentifiedImageError):
        decode_image(base64.b64decode(EPS))


def test_a_prompt_beyond_the_context_is_told_both_lengths(client: Client) -> None:
    [state] = client.states("cats", Question("word " * 9000))
    assert re.search(r"has 27,0\d\d tokens; this model takes 2,047\. Please start a new one\.$", state["text"])
