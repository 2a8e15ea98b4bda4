"""Changes of what an adapter's weights hold: the JSON in its header, and its tensors. See `mutations.py`."""

from __future__ import annotations

import json
import math
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

WEIGHTS, COPY, LLAVA_COPY = "adapter_model.safetensors", "llava_steering_config.json", "config.json"
CONFIG, LLAVA = "llava_steering", "llava_config"

Draw = random.Random


def split(data: bytes) -> tuple[dict[str, Any], bytes]:
    """Return the header of a safetensors file, and the bytes behind it."""
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def join(header: dict[str, Any] | bytes, rest: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode(errors="surrogatepass")
    return struct.pack("<Q", len(text)) + text + rest


def change_text(folder: Path, key: str, change: Callable[[str], str]) -> None:
    """Change one of the texts in the header of the weights."""
    header, rest = split((folder / WEIGHTS).read_bytes())
    header["__metadata__"][key] = change(header["__metadata__"][key])
    (folder / WEIGHTS).write_bytes(join(header, rest))


def change_json(folder: Path, key: str, change: Callable[[Any], object]) -> None:
    """Change one of the configs in the header of the weights, in place."""

    def changed(text: str) -> str:
        data = json.loads(text)
        change(data)
        return json.dumps(data)

    change_text(folder, key, changed)


def change_tensors(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    data = (folder / WEIGHTS).read_bytes()
    tensors = {name: value.clone() for name, value in load(data).items()}
    change(tensors)
    whole = {name: value.contiguous().clone() for name, value in tensors.items()}
    (folder / WEIGHTS).write_bytes(save(whole, split(data)[0]["__metadata__"]))


def some_bytes(draw: Draw, data: bytes, begin: int, end: int) -> bytes:
    changed = bytearray(data)
    for _ in range(draw.randint(1, 4)):
        place = draw.randrange(begin, end)
        changed[place] = draw.choice((changed[place] ^ 1 << draw.randrange(8), draw.randrange(256), 0, 255))
    return bytes(changed)


# JSON

NUMBERS: tuple[Any, ...] = (
    -1, 0, 1, 2, 3, 10, 200_000, 2**31, 2**32, 2**63 - 1, 2**63, 10**100, 10**400, 0.5, -0.0, 1e-310, 1e38, 1e308,
    math.inf, -math.inf, math.nan,
)  # fmt: skip
TEXTS = (
    "", " ", "\0", "\ud800", "é", "x" * 9_000, "x" * 200_000, "all", "__base__", "../../etc", "mores",
    "mixlora", "morse",
    "1%", "0.0000001%", "uniform" + "9" * 400, "f" + "9" * 20, "l3+f1", "0-99999999", "every:" + "9" * 30, "none",
    ",".join(["0"] * 100_000), "q_proj," * 2_000, "llava_llama", "v9",
)  # fmt: skip
OTHERS: tuple[Any, ...] = (None, True, False, [], [1], {}, {"a": 1}, [[]], [{"a": [None]}], [0] * 1000)


def places(data: Any) -> list[tuple[Any, Any]]:
    """Return every place in a JSON value, as a container and a key."""
    found = []
    for key, value in list(data.items() if isinstance(data, dict) else enumerate(data)):
        found.append((data, key))
        if isinstance(value, (dict, list)):
            found += places(value)
    return found


def set_somewhere(draw: Draw, data: Any, values: tuple[Any, ...]) -> None:
    container, key = draw.choice(places(data))
    container[key] = draw.choice(values)


def values(draw: Draw, folder: Path) -> None:
    def change(data: Any) -> None:
        simple = [(each, key) for each, key in places(data) if not isinstance(each[key], (dict, list))]
        container, key = draw.choice(simple)
        same = TEXTS if isinstance(container[key], str) else NUMBERS
        container[key] = draw.choice(same)

    change_json(folder, CONFIG, change)


def types(draw: Draw, folder: Path) -> None:
    change_json(folder, CONFIG, lambda data: set_somewhere(draw, data, OTHERS + NUMBERS[:4] + TEXTS[:5]))


def keys(draw: Draw, folder: Path) -> None:
    def change(data: Any) -> None:
        container, key = draw.choice([place for place in places(data) if isinstance(place[0], dict)])
        kind = draw.randrange(4)
        if kind == 3:
            container[draw.choice(("speed", "", "rank ", "__class__", "x" * 5000))] = draw.choice(OTHERS + NUMBERS)
            return
        value = container.pop(key)
        if kind == 1:
            container[draw.choice((key.upper(), key + " ", "", "\ud800", key[1:]))] = value
        elif kind == 2:
            for number in range(draw.choice((3, 300, 30_000))):
                container[f"{key}{number}"] = value

    change_json(folder, CONFIG, change)


def texts(draw: Draw, folder: Path) -> None:
    deep = draw.choice((70, 900, 5_000, 200_000))
    insides: tuple[str, ...] = (
        "9" * draw.choice((100, 4_301, 100_000)), "[" * deep + "]" * deep,
        '{"a":' * deep + "1" + "}" * deep, "[" * deep,
        "1e999", "-Infinity", "NaN", '"\\ud800"', "{", "", "[" + "[]," * 200_000 + "1]", '"' + "x" * 3_000_000 + '"',
    )  # fmt: skip

    def change(text: str) -> str:
        inside, kind = draw.choice(insides), draw.randrange(4)
        if kind == 0:
            return inside
        if kind == 1:
            place = draw.randrange(len(text))
            return text[:place] + inside + text[place:]
        data = json.loads(text)
        container, key = draw.choice(places(data))
        container[key] = "HERE"
        return json.dumps(data).replace('"HERE"', inside)

    change_text(folder, draw.choice((CONFIG, CONFIG, LLAVA)), change)


LLAVA_KEYS = (
    "image_aspect_ratio", "image_grid_pinpoints", "mm_use_im_start_end", "mm_use_im_patch_token",
    "mm_vision_select_layer", "mm_vision_select_feature", "mm_patch_merge_type", "tokenizer_model_max_length",
    "tokenizer_padding_side", "mm_hidden_size",
)  # fmt: skip


def llava_settings(draw: Draw, folder: Path) -> None:
    def change(data: Any) -> None:
        for _ in range(draw.randint(1, 3)):
            data[draw.choice((*LLAVA_KEYS, *data))] = draw.choice(OTHERS + NUMBERS + TEXTS)
        if draw.random() < 0.2:
            data.clear()

    change_json(folder, LLAVA, change)
    if draw.random() < 0.3:  # an adapter of version 0.1: LLaVA's config in config.json alone
        header, rest = split((folder / WEIGHTS).read_bytes())
        text = header["__metadata__"].pop(LLAVA)
        (folder / WEIGHTS).write_bytes(join(header, rest))
        (folder / LLAVA_COPY).write_bytes(some_bytes(draw, text.encode(errors="surrogatepass"), 0, len(text)))


COMMON = ("q_proj", "released", "sequence", "vis", "text", 4, 1e-30)


def settings(draw: Draw, folder: Path) -> None:
    def change(data: Any) -> None:
        for _ in range(draw.randint(1, 2)):
            key = draw.choice(list(data["settings"]))
            choices: tuple[Any, ...] = NUMBERS if draw.random() < 0.6 else TEXTS
            data["settings"][key] = draw.choice((*choices, *COMMON))

    change_json(folder, CONFIG, change)


# Tensors


def names_of_tensors(draw: Draw, folder: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        name, kind = draw.choice(list(tensors)), draw.randrange(5)
        value = tensors[name]
        if kind < 3:
            del tensors[name]
        odd = ("", "adapter.", "base.", "base..weight", "base.dtype", "base.model.forward", "base.model.layers.0", "é",
               "base.model.embed_tokens.weight", "base.lm_head.weight", "base.model.norm.weight", "lm_head.weight",
               "added_tokens.input", "fingerprint.more", "x" * 5_000, name + ".", "base." + name)  # fmt: skip
        if kind in (1, 3):
            tensors[draw.choice(odd)] = value
        elif kind == 2:
            tensors[draw.choice(list(tensors))] = value
        elif kind == 4:
            for number in range(300):
                tensors[f"adapter.layers.{number}"] = value[:1]

    change_tensors(folder, change)


def shapes(draw: Draw, folder: Path) -> None:
    header, rest = split((folder / WEIGHTS).read_bytes())
    name = draw.choice([name for name in header if name != "__metadata__"])
    if draw.random() < 0.5:
        entry = header[name]
        odd: tuple[Any, ...] = ([10**9, 0], [0], [2**62, 2**62, 0], [-1], [1.5], None, [1] * 70, [2**63], [True], "8")
        width, count = {"F32": 4, "I64": 8, "F16": 2, "F64": 8}.get(entry["dtype"], 4), math.prod(entry["shape"])
        fitting = ([count], [1, count], [count, 1], [*entry["shape"], 1], list(reversed(entry["shape"])))
        entry["shape"] = draw.choice(odd + fitting)
        if draw.random() < 0.3:
            begin = draw.choice((0, 1, len(rest), 2**63, -8, 0.5, None, "0"))
            entry["data_offsets"] = [begin, begin] if draw.random() < 0.5 else [0, count * width]
        (folder / WEIGHTS).write_bytes(join(header, rest))
        return

    def change(tensors: dict[str, Tensor]) -> None:
        value = tensors[name]
        tensors[name] = draw.choice((value[:0], value[:1], torch.cat([value, value]), value.unsqueeze(0), value.sum(),
                                     value.flatten(), torch.zeros(10**6, 0).to(value.dtype)))  # fmt: skip

    change_tensors(folder, change)


DTYPES = (torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.int32, torch.bool, torch.uint8, torch.int8,
          torch.float8_e4m3fn, torch.complex64)  # fmt: skip


def dtypes(draw: Draw, folder: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        for name in draw.sample(list(tensors), draw.randint(1, len(tensors))):
            tensors[name] = tensors[name].to(draw.choice(DTYPES))

    change_tensors(folder, change)


def values_of_tensors(draw: Draw, folder: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        part = draw.choice(("fingerprint", "adapter", "adapter", "adapter", "base", "added", "."))
        chosen = [name for name in tensors if part in name] or list(tensors)
        size = draw.choice((math.nan, math.inf, 1e300, 1e38, 1e30, 1e10, 65_504.0, 1e5, 0.0, 1e-40, -1.0))
        for name in draw.sample(chosen, draw.randint(1, len(chosen))):
            value = tensors[name].double()
            if draw.random() < 0.3:
                value.view(-1)[draw.randrange(value.numel()) :][:1] = size
            elif draw.random() < 0.3:
                value = value * size
            else:
                value = torch.full_like(value, size)
            same = tensors[name].dtype
            integers = not same.is_floating_point
            tensors[name] = value.nan_to_num().clamp(-(2**62), 2**62).long() if integers else value.to(
                draw.choice((same, same, torch.float64))
            )  # fmt: skip

    change_tensors(folder, change)
