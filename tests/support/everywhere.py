"""One model and its adapters in whatever holds it: LLaVA, a fork of it, or transformers' own class.

Run as a program in the environment of each, so that adapters can be compared between them:

    python everywhere.py MODEL JOB.json OUT.safetensors

JOB says which adapters are put on the model and asked (`ask`, a folder by name), and which are trained (`train`, a
folder by name): every adapter's logits and greedy tokens in every case are in OUT, as `<adapter>|<case>|logits` and
`|tokens`, and the model's own as those of the adapter "none". Pictures (`sight`) are cases, too: each goes through the
home's own processing of images, and what comes out is there as `pixels|<case>`. Pictures that are cut into tiles
already (`tiles`, a file of `write_tiles`) are cases of a LLaVA-1.6. The logits of adapters that are the same everywhere
are there, too, and of transformers the tokens of prompts (`template`, `messages` by name).

`RECORD_EVERYWHERE=OUT pytest tests/everywhere` keeps the logits for machines without that environment.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

IMAGE, NEW = -200, 6
# Rows that LLaVA has; a model of transformers has more.
ROWS = 700
SIDE, FEATURES = 56, 16
PICTURES = 3


def _words(count: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    found: list[int] = torch.randint(260, 600, (count,), generator=generator).tolist()
    return found


# Prompts; -200 is an image.
CASES: Mapping[str, list[int]] = {
    "one image": [1, *_words(3, 0), IMAGE, *_words(5, 1)],
    "several images": [1, *_words(2, 2), IMAGE, *_words(4, 3), IMAGE, *_words(3, 4)],
    "text": [1, *_words(12, 5)],
}
MODES: Mapping[str, dict[str, Any]] = {"mores": {"rank": 2}, "mixlora": {"factors": 8, "rank": 2}}


def pictures(count: int) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randn(PICTURES, 3, SIDE, SIDE, generator=generator)[:count]


@dataclass(frozen=True)
class Sight:
    """Pictures about which a home is asked, and how it takes them.

    Attributes:
        pictures: a file by name.
        processors: for each of LLaVA's image_aspect_ratio, the folder of transformers' processor.
        prompt: as LLaVA writes it, with <image> for the picture.
        messages: the same for a chat template, `template`.
    """

    pictures: Mapping[str, str]
    processors: Mapping[str, str]
    prompt: str
    messages: Sequence[Mapping[str, Any]]
    template: str


@dataclass(frozen=True)
class Tiles:
    """A picture that is cut into tiles.

    Attributes:
        pixels: of the tiles, the whole picture first, float32 [tiles, 3, side, side].
        size: its width and height.
        tokens: how many tokens it becomes.
    """

    pixels: Tensor
    size: tuple[int, int]
    tokens: int


# The same for pictures in tiles, each followed by the number of its picture in the file.
TILED_CASES: Mapping[str, tuple[list[int], tuple[int, ...]]] = {
    "a wide picture": (CASES["one image"], (0,)),
    "a high and a square one": (CASES["several images"], (1, 2)),
    "text": (CASES["text"], ()),
}


def write_tiles(pictures: Sequence[Tiles], file: Path) -> None:
    """Write pictures in tiles, so that every home gets the same pixels: versions of Pillow shrink otherwise."""
    from safetensors.torch import save_file

    tensors = {f"{number}|pixels": each.pixels.contiguous() for number, each in enumerate(pictures)}
    numbers = {f"{number}|numbers": torch.tensor([*each.size, each.tokens]) for number, each in enumerate(pictures)}
    save_file(tensors | numbers, file)


def read_tiles(file: Path) -> list[Tiles]:
    """Return the pictures of `write_tiles`."""
    from safetensors.torch import load_file

    tensors, found = load_file(file), []
    for number in range(len(tensors) // 2):
        width, height, tokens = tensors[f"{number}|numbers"].tolist()
        found.append(Tiles(tensors[f"{number}|pixels"], (width, height), tokens))
    return found


class Home:
    """A model in float32, called on prompts with -200 for an image, and about pictures.

    One that cuts pictures into tiles is called about pictures alone.

    Args:
        sight: pictures in files.
        tiles: pictures in tiles, for a model that cuts them so.
    """

    def __init__(self, folder: Path, sight: Sight | None = None, tiles: Sequence[Tiles] = ()):
        self.folder = folder
        self.settings = json.loads((folder / "config.json").read_text())
        self.image_token = self.settings.get("image_token_index")
        self.model = (self._llava if self.image_token is None else self._own_class)(folder).float().eval()
        self.model.requires_grad_(False)
        grid = self.settings.get("image_grid_pinpoints")
        self.calls = {case: self.call(prompt) for case, prompt in CASES.items() if grid is None}
        for case, (prompt, numbers) in TILED_CASES.items() if tiles else ():
            self.calls[case] = self.call_on_tiles(prompt, [tiles[number] for number in numbers])
        if sight is not None:
            look = self._llavas_look if self.image_token is None else self._processors_look
            for cut in sight.processors:
                for name, file in sight.pictures.items():
                    self.calls[f"{name}, {cut}"] = look(sight, cut, file)

    def _llava(self, folder: Path) -> Any:
        from llava_steering_plugin.components.model_types import of_llava_type
        from llava_steering_plugin.upstream.install import install
        from llava_steering_plugin.upstream.model.language_models import own_class, register
        from llava_steering_plugin.upstream.model.towers import own_towers

        install()
        model_type = self.settings["model_type"]
        component = of_llava_type(model_type)
        kind = own_class(model_type) or register(component, model_type)
        with own_towers():  # LLaVA-NeXT would draw a random one
            model = kind.from_pretrained(folder, torch_dtype=torch.float32)
        model.get_vision_tower().load_model()
        return model

    def _own_class(self, folder: Path) -> Any:
        import transformers

        kind = getattr(transformers, self.settings["architectures"][0])
        return kind.from_pretrained(folder, torch_dtype=torch.float32)

    def call(self, prompt: Sequence[int]) -> dict[str, Any]:
        """Return the arguments of a call for one prompt."""
        count = list(prompt).count(IMAGE)
        images = pictures(count) if count else None
        if self.image_token is None:
            return {"input_ids": torch.tensor([prompt]), "images": images}
        ids = [each for token in prompt for each in ([self.image_token] * FEATURES if token == IMAGE else [token])]
        found = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}
        return found if images is None else found | {"pixel_values": images}

    def call_on_tiles(self, prompt: Sequence[int], pictures: Sequence[Tiles]) -> dict[str, Any]:
        """Return the arguments of a call for one prompt about pictures in tiles."""
        if self.image_token is None:
            seen = {"images": [each.pixels for each in pictures], "image_sizes": [each.size for each in pictures]}
            return {"input_ids": torch.tensor([prompt])} | (seen if pictures else {"images": None})
        left, ids = list(pictures), []
        for token in prompt:
            ids += [self.image_token] * left.pop(0).tokens if token == IMAGE else [token]
        found = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}
        if not pictures:
            return found
        most = max(len(each.pixels) for each in pictures)  # as its processor fills up
        pixels = torch.zeros(len(pictures), most, *pictures[0].pixels.shape[1:])
        for row, each in zip(pixels, pictures, strict=True):
            row[: len(each.pixels)] = each.pixels
        sizes = torch.tensor([[height, width] for width, height in (each.size for each in pictures)])
        return found | {"pixel_values": pixels, "image_sizes": sizes}

    def _llavas_look(self, sight: Sight, cut: str, file: str) -> dict[str, Any]:
        from llava.mm_utils import process_images, tokenizer_image_token
        from PIL import Image
        from transformers import AutoTokenizer

        processor = self.model.get_vision_tower().image_processor
        tokenizer = AutoTokenizer.from_pretrained(self.folder, use_fast=False)
        image = Image.open(file).convert("RGB")
        grid = self.settings.get("image_grid_pinpoints")
        cutting = SimpleNamespace(image_aspect_ratio=cut, image_grid_pinpoints=grid)
        pixels = torch.as_tensor(process_images([image], processor, cutting)[0])[None]
        ids = tokenizer_image_token(sight.prompt, tokenizer, return_tensors="pt")[None]
        return {"input_ids": ids, "images": pixels} | ({} if grid is None else {"image_sizes": [image.size]})

    def _processors_look(self, sight: Sight, cut: str, file: str) -> dict[str, Any]:
        from PIL import Image
        from transformers import AutoProcessor

        processor = AutoProcessor.from_pretrained(sight.processors[cut])
        text = processor.apply_chat_template(
            sight.messages, chat_template=sight.template, tokenize=False, add_generation_prompt=True
        )
        return dict(processor(text=text, images=Image.open(file).convert("RGB"), return_tensors="pt"))

    def pixels(self) -> dict[str, Tensor]:
        """Return what the vision tower gets of each picture, as `pixels|<case>`."""
        seen = {case: call for case, call in self.calls.items() if case not in CASES and case not in TILED_CASES}
        return {f"pixels|{case}": call.get("images", call.get("pixel_values")) for case, call in seen.items()}

    @torch.no_grad()
    def answers(self, name: str) -> dict[str, Tensor]:
        """Return the logits of every position and `NEW` greedy tokens, in every case."""
        found = {}
        for case, given in self.calls.items():
            call = dict(given)
            found[f"{name}|{case}|logits"] = self.model(**call).logits[0, :, :ROWS].float().contiguous()
            first = () if self.image_token is not None else (call.pop("input_ids"),)
            made = self.model.generate(*first, **call, do_sample=False, max_new_tokens=NEW, min_new_tokens=NEW)
            found[f"{name}|{case}|tokens"] = made[0, -NEW:].contiguous()
        return found

    def train(self, name: str, folder: Path) -> dict[str, Tensor]:
        """Train an adapter, called `MODE` or `MODE with projector`, a few steps; return its answers."""
        from llava_steering_plugin import attach, remove_adapter, save_adapter
        from llava_steering_plugin.adapters.parts.image_parts import image_parameters

        torch.manual_seed(0)
        mode, _, own_projector = name.partition(" with ")
        attachment = attach(self.model, mode, **MODES[mode])
        trained = list(attachment.trained().values())
        if own_projector:
            projector = image_parameters(self.model)
            attachment.extras |= projector.keys()
            trained += [parameter.requires_grad_(True) for parameter in projector.values()]
        before = [parameter.detach().clone() for parameter in trained]
        optimiser = torch.optim.Adam(trained, lr=0.03)
        for _ in range(4):
            for case in list(self.calls)[:2]:  # about images
                call = dict(self.calls[case])
                call["labels"] = torch.where(torch.arange(call["input_ids"].shape[1]) > 4, call["input_ids"], -100)
                call["labels"][(call["labels"] == IMAGE) | (call["labels"] == self.image_token)] = -100
                self.model(**call).loss.backward()
            optimiser.step()
            optimiser.zero_grad()
        assert any(not torch.equal(now, then) for now, then in zip(trained, before, strict=True))
        for parameter in self.model.parameters():
            parameter.requires_grad_(False)
        save_adapter(self.model, folder)
        found = self.answers(name)
        remove_adapter(self.model)
        return found

    def ask(self, name: str, folder: Path) -> dict[str, Tensor]:
        """Return the answers with a saved adapter."""
        from llava_steering_plugin import load_adapter, remove_adapter

        load_adapter(self.model, folder)
        found = self.answers(name)
        remove_adapter(self.model)
        return found

    @torch.no_grad()
    def fixed(self) -> dict[str, Tensor]:
        """Return the logits behind each prompt with an adapter of each mode whose values are drawn from a seed."""
        from llava_steering_plugin import attach, remove_adapter

        found = {}
        for mode, settings in MODES.items():
            generator = torch.Generator().manual_seed(3)
            attachment = attach(self.model, mode, **settings)
            for _, parameter in sorted(attachment.parameters().items()):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
            for case, prompt in CASES.items():
                found[f"fixed {mode}|{case}"] = self.model(**self.call(prompt)).logits[0, -1, :ROWS].contiguous()
            remove_adapter(self.model)
        return found

    def prompts(self, folder: Path, template: str, messages: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return the tokens of prompts that a chat template writes, as `prompt|<name>`; -200 for an image."""
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(folder)
        found = {}
        for name, said in messages.items():
            text = tokenizer.apply_chat_template(
                said, chat_template=template, tokenize=False, add_generation_prompt=True
            )
            ids = tokenizer(text).input_ids
            found[f"prompt|{name}"] = torch.tensor([IMAGE if each == self.image_token else each for each in ids])
        return found


def run(home: Home, ask: Mapping[str, str], train: Mapping[str, str]) -> dict[str, Tensor]:
    """Ask and train all adapters of a job; return all answers."""
    found = home.answers("none") | home.pixels()
    for name, folder in ask.items():
        found |= home.ask(name, Path(folder))
    for name, folder in train.items():
        found |= {f"here: {key}": value for key, value in home.train(name, Path(folder)).items()}
    return found


def main() -> None:
    from safetensors.torch import save_file

    model, job, out = map(Path, sys.argv[1:])
    described = json.loads(job.read_text())
    tiles = read_tiles(Path(described["tiles"])) if "tiles" in described else []
    home = Home(model, Sight(**described["sight"]) if described.get("sight") else None, tiles)
    found = run(home, described["ask"], described["train"]) | (
        home.fixed() if home.calls.keys() >= CASES.keys() else {}
    )
    if home.image_token is not None and "messages" in described:
        found |= home.prompts(model, described["template"], described["messages"])
    save_file(found, out)


if __name__ == "__main__":
    main()
