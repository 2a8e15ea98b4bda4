"""One model and its adapters in whatever holds it: LLaVA, a fork of it, or transformers' own class.

Run as a program in the environment of each, so that adapters can be compared between them:

    python everywhere.py MODEL JOB.json OUT.safetensors

JOB says which adapters are put on the model and asked (`ask`, a folder by name), and which are trained (`train`, a
folder by name): every adapter's logits and greedy tokens in every case are in OUT, as `<adapter>|<case>|logits` and
`|tokens`, and the model's own as those of the adapter "none". The logits of adapters that are the same everywhere are
there, too, and of transformers the tokens of prompts (`template`, `messages` by name).

`RECORD_EVERYWHERE=OUT pytest tests/everywhere` keeps the logits for machines without that environment.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
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


class Home:
    """A model in float32, called on prompts with -200 for an image."""

    def __init__(self, folder: Path):
        self.image_token = json.loads((folder / "config.json").read_text()).get("image_token_index")
        self.model = (self._llava if self.image_token is None else self._own_class)(folder).float().eval()
        self.model.requires_grad_(False)

    def _llava(self, folder: Path) -> Any:
        from steered import load_llava

        from llava_steering_plugin.upstream.install import install
        from llava_steering_plugin.upstream.model.towers import own_towers

        install()
        with own_towers():  # LLaVA-NeXT would draw a random one
            return load_llava(folder)

    def _own_class(self, folder: Path) -> Any:
        from transformers import LlavaForConditionalGeneration

        return LlavaForConditionalGeneration.from_pretrained(folder, torch_dtype=torch.float32)

    def call(self, prompt: Sequence[int]) -> dict[str, Any]:
        """Return the arguments of a call for one prompt."""
        count = list(prompt).count(IMAGE)
        images = pictures(count) if count else None
        if self.image_token is None:
            return {"input_ids": torch.tensor([prompt]), "images": images}
        ids = [each for token in prompt for each in ([self.image_token] * FEATURES if token == IMAGE else [token])]
        found = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}
        return found if images is None else found | {"pixel_values": images}

    @torch.no_grad()
    def answers(self, name: str) -> dict[str, Tensor]:
        """Return the logits of every position and `NEW` greedy tokens, in every case."""
        found = {}
        for case, prompt in CASES.items():
            call = self.call(prompt)
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
            for case in ("one image", "several images"):
                call = self.call(CASES[case])
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
    found = home.answers("none")
    for name, folder in ask.items():
        found |= home.ask(name, Path(folder))
    for name, folder in train.items():
        found |= {f"here: {key}": value for key, value in home.train(name, Path(folder)).items()}
    return found


def main() -> None:
    from safetensors.torch import save_file

    model, job, out = map(Path, sys.argv[1:])
    described = json.loads(job.read_text())
    home = Home(model)
    found = run(home, described["ask"], described["train"]) | home.fixed()
    if home.image_token is not None:
        found |= home.prompts(model, described["template"], described["messages"])
    save_file(found, out)


if __name__ == "__main__":
    main()
