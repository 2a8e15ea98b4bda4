"""transformers' own LLaVAs carry adapters as LLaVA does (`hooks/families.py`), with nothing of LLaVA installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from placeholders import IMAGE, KINDS, Kind, labelled, visual
from steered import strengthen
from torch import Tensor

from llava_steering_plugin import (
    AdapterPool,
    attach,
    disable_adapter,
    load_adapter,
    remove_adapter,
    save_adapter,
    token_map,
)
from llava_steering_plugin.errors import ArgumentsError, TokenMapError
from llava_steering_plugin.hooks.families import family_of
from llava_steering_plugin.hooks.owner import owner_of
from llava_steering_plugin.modes.base import Mode
from llava_steering_plugin.modes.mixlora import MixLoRA
from llava_steering_plugin.modes.mores import MoReS

MODES: list[Mode] = [MoReS(rank=2, tokens="all"), MixLoRA(factors=8, rank=2, balance=0.3)]
_made: dict[str, Kind] = {}


@pytest.fixture(params=sorted(KINDS))
def kind(request: pytest.FixtureRequest) -> Iterator[Kind]:
    """A model of each class; the same one for all tests, which leave it as it was."""
    if request.param not in _made:
        _made[request.param] = KINDS[request.param]()
    found = _made[request.param]
    before = {name: value.clone() for name, value in found.model.state_dict().items()}
    yield found
    if owner_of(found.model) is not None:
        remove_adapter(found.model)
    found.model.eval().requires_grad_(True).zero_grad(set_to_none=True)
    found.model.load_state_dict(before)


@pytest.fixture(params=MODES, ids=lambda mode: mode.name)
def mode(request: pytest.FixtureRequest) -> Mode:
    found: Mode = request.param
    return found


@torch.no_grad()
def logits(kind: Kind, batch: dict[str, Tensor], **rest: object) -> Tensor:
    found: Tensor = kind.model(**batch, **rest).logits
    return found


def generated(kind: Kind, batch: dict[str, Tensor], **how: object) -> list[list[int]]:
    """Exactly five tokens."""
    answers = kind.model.generate(**batch, max_new_tokens=5, min_new_tokens=5, **({"do_sample": False} | how))
    found: list[list[int]] = answers[:, -5:].tolist()
    return found


def test_nothing_of_llava_is_there() -> None:
    assert importlib.util.find_spec("llava") is None


def test_a_forward_is_the_one_with_an_explicit_token_map(kind: Kind, mode: Mode) -> None:
    assert family_of(kind.model).name == "placeholder"
    batch = labelled(kind.batch())
    plain = kind.model(**batch)
    strengthen(attach(kind.model, mode))
    found = kind.model(**batch)
    prompt = batch["attention_mask"].bool() & ((batch["labels"] != -100).cumsum(1) == 0)
    with token_map(visual(batch), batch["attention_mask"], prompt):
        expected = kind.model(**batch)
    assert torch.equal(found.logits, expected.logits) and torch.equal(found.loss, expected.loss)
    with token_map(torch.zeros_like(visual(batch)), batch["attention_mask"], prompt):
        as_text = kind.model(**batch)
    there = batch["attention_mask"].bool()
    assert (found.logits - plain.logits)[there].abs().max() > 0.1
    if isinstance(mode, MoReS):
        assert torch.equal(as_text.logits, plain.logits)
    positional = kind.model(batch["input_ids"], **{key: batch[key] for key in batch if key != "input_ids"})
    assert torch.equal(positional.logits, found.logits)


def test_padding_on_the_left_changes_no_answer(kind: Kind, mode: Mode) -> None:
    strengthen(attach(kind.model, mode), size=0.1)
    batch = kind.batch()
    together = generated(kind, batch)
    with_logits = logits(kind, batch)
    images = {key: batch[key] for key in batch if key not in ("input_ids", "attention_mask")}
    for row, answer in enumerate(together):
        there = batch["attention_mask"][row].bool()
        alone = {"input_ids": batch["input_ids"][row : row + 1, there]}
        alone["attention_mask"] = torch.ones_like(alone["input_ids"])
        alone |= {key: value.chunk(2)[row] for key, value in images.items()}
        assert generated(kind, alone) == [answer]
        torch.testing.assert_close(logits(kind, alone)[0], with_logits[row, there], atol=1e-4, rtol=1e-4)
    with pytest.raises(ArgumentsError, match="padded on the right"):
        generated(kind, kind.batch("right"))


def test_a_generation_is_the_same_with_a_cache_and_without(kind: Kind, mode: Mode) -> None:
    batch = kind.batch()
    plain = generated(kind, batch)
    attachment = strengthen(attach(kind.model, mode), size=0.1)
    # MixLoRA chooses factors by the prompt alone, and a step without a cache would see the new tokens, too.
    if isinstance(mode, MoReS):
        ids, attention, rest = batch["input_ids"], batch["attention_mask"], dict(batch)
        for _ in range(5):
            following = logits(kind, rest | {"input_ids": ids, "attention_mask": attention})[:, -1].argmax(-1)
            ids = torch.cat([ids, following.unsqueeze(1)], 1)
            attention = torch.cat([attention, torch.ones(2, 1, dtype=torch.long)], 1)
        assert generated(kind, batch) == ids[:, -5:].tolist()
    assert attachment is owner_of(kind.model)
    beams = generated(kind, batch, num_beams=2)
    several = generated(kind, batch, do_sample=True, num_return_sequences=2, top_k=1)
    assert several == [answer for answer in generated(kind, batch) for _ in range(2)]
    with token_map(visual(batch), batch["attention_mask"]):
        assert generated(kind, batch, num_beams=2) == beams
    with disable_adapter(kind.model):
        assert generated(kind, batch) == plain


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_gradients_of_the_plain_run(kind: Kind, mode: Mode, reentrant: bool) -> None:
    batch, found = labelled(kind.batch()), []
    for checkpointing in (False, True):
        kind.model.requires_grad_(False).train()
        attachment = strengthen(attach(kind.model, mode), size=0.05)
        if checkpointing:
            kind.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        try:
            kind.model(**batch).loss.backward()
        finally:
            kind.model.gradient_checkpointing_disable()
        found.append({name: parameter.grad for name, parameter in attachment.trained().items()})
        remove_adapter(kind.model)
    plain, again = found
    assert sum(bool(gradient.any()) for gradient in plain.values() if gradient is not None) > len(plain) // 2
    for name, gradient in plain.items():
        assert gradient is not None and again[name] is not None, name
        torch.testing.assert_close(again[name], gradient, atol=1e-6, rtol=1e-6, msg=name)


def test_it_is_saved_loaded_pooled_and_removed_to_the_bit(kind: Kind, mode: Mode, tmp_path: Path) -> None:
    batch = kind.batch()
    before, keys = {name: value.clone() for name, value in kind.model.state_dict().items()}, set(vars(kind.model))
    plain = logits(kind, batch)
    strengthen(attach(kind.model, mode))
    steered, answer = logits(kind, batch), generated(kind, batch)
    assert not torch.equal(steered, plain)
    save_adapter(kind.model, tmp_path)
    remove_adapter(kind.model)

    def as_before() -> bool:
        now = kind.model.state_dict()
        same = now.keys() == before.keys() and all(torch.equal(value, before[name]) for name, value in now.items())
        return same and set(vars(kind.model)) == keys and torch.equal(logits(kind, batch), plain)

    assert as_before()
    load_adapter(kind.model, tmp_path)
    assert torch.equal(logits(kind, batch), steered)
    remove_adapter(kind.model)
    assert as_before()
    with AdapterPoolOn(kind) as pool:
        pool.load("one", tmp_path)
        mixed = logits(kind, batch, adapter_names=["one", "__base__"])
        torch.testing.assert_close(mixed[0], steered[0], atol=1e-4, rtol=1e-4)
        assert torch.equal(mixed[1], plain[1]) and torch.equal(logits(kind, batch), plain)
        assert generated(kind, batch, adapter_names=["__base__", "one"])[1] == answer[1]
    assert as_before()


class AdapterPoolOn:
    """A pool that gives its model back."""

    def __init__(self, kind: Kind):
        self.pool = AdapterPool(kind.model)

    def __enter__(self) -> AdapterPool:
        return self.pool

    def __exit__(self, *failure: object) -> None:
        self.pool.remove()


def test_ready_made_embeddings_need_a_token_map(kind: Kind, mode: Mode) -> None:
    batch = kind.batch()
    strengthen(attach(kind.model, mode))
    embeds = kind.model.get_input_embeddings()(batch["input_ids"])
    given = {"inputs_embeds": embeds, "attention_mask": batch["attention_mask"]}
    with pytest.raises(TokenMapError, match="unknown which positions are visual"):
        kind.model(**given)
    with pytest.raises(TokenMapError, match="unknown which positions are visual"):
        kind.model.generate(**given, max_new_tokens=2)
    with token_map(visual(batch), batch["attention_mask"]):
        kind.model(**given)


def test_a_trained_projector_has_llavas_names_on_disk_and_comes_back(tmp_path: Path) -> None:
    from safetensors import safe_open

    kind = KINDS["LlavaNext"]()
    batch = kind.batch()
    plain = logits(kind, batch)
    attachment = strengthen(attach(kind.model, MoReS(rank=2, tokens="all")))
    projector = dict(kind.model.model.multi_modal_projector.named_parameters(prefix="model.multi_modal_projector"))
    attachment.extras |= {*projector, "model.image_newline"}
    with torch.no_grad():
        for name in attachment.extras:
            kind.model.get_parameter(name).mul_(1.5)
    steered = logits(kind, batch)
    save_adapter(kind.model, tmp_path)
    with disable_adapter(kind.model):
        assert torch.equal(logits(kind, batch), plain)
    remove_adapter(kind.model)
    assert torch.equal(logits(kind, batch), plain)

    (weights,) = tmp_path.glob("*.safetensors")
    with safe_open(weights, "pt") as file:
        names = {name for name in file.keys() if name.startswith("base.")}
    assert names == {
        "base.model.image_newline",
        *(f"base.model.mm_projector.{layer}.{part}" for layer in (0, 2) for part in ("weight", "bias")),
    }
    load_adapter(kind.model, tmp_path)
    assert torch.equal(logits(kind, batch), steered)
    remove_adapter(kind.model)


def test_image_tokens_among_the_padding_are_no_images() -> None:
    kind = KINDS["Llava"]()
    batch = kind.batch()
    attach(kind.model, MoReS(rank=2, tokens="all"))
    batch["input_ids"][0, 0] = IMAGE
    tokens = family_of(kind.model).tokens((), batch)
    assert tokens is not None and not tokens.visual[0, 0] and torch.equal(tokens.visual[1], visual(batch)[1])
