"""Loading leaves model and tokenizer as they were wherever it fails.

It covers `adapters/parts/original.py` and `adapters/fit/quantised.py`.

Wherever: an error is raised in turn at every call that the package makes while it loads, to its own functions, to
torch, to transformers and to the tokenizer.
"""

from __future__ import annotations

import copy
import gc
import inspect
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from steered import PROMPT, ids_of, load_llava, logits_of, pictures, strengthen
from tiny_llava import TinyLlava
from torch import Tensor, nn

import llava_steering_plugin
from llava_steering_plugin import AdapterPool, attach, load_adapter, save_adapter
from llava_steering_plugin.adapters.save_load import describe
from llava_steering_plugin.adapters.stored.config import AdapterConfig
from llava_steering_plugin.errors import SteeringError
from llava_steering_plugin.modes.base import Mode
from llava_steering_plugin.modes.mixlora import MixLoRA
from llava_steering_plugin.modes.mores import MoReS

PACKAGE = str(Path(llava_steering_plugin.__file__).parent)
MODES: dict[str, Mode] = {"mores": MoReS(rank=2, tokens="all"), "mixlora": MixLoRA(factors=4, rank=2, start_layer=3)}
ADDED = {"[PAD]": 700, "<im_start>": 701, "<im_end>": 702}

# What cannot fail; the rest of the package relies on it, too.
BOOKKEEPING = ("list.", "dict.", "set.", "str.", "tuple.", "lock.", "device.")

# Where a call is made, and of what.
Call = tuple[str, int, str]


class Refused(Exception):
    """What is raised at a call; nothing else raises it."""


# The package makes a SteeringError of what other packages raise, and safetensors a ValueError.
REFUSED = (Refused, SteeringError, ValueError)


def calls(action: Callable[[], object], stop: tuple[Call, int] | None = None) -> list[Call]:
    """The calls that the package makes during the action. With `stop`, its n-th call of that kind is refused."""
    made: list[Call] = []
    left = stop[1] if stop is not None else 0

    def watch(frame: Any, event: str, argument: Any) -> None:
        nonlocal left
        caller = frame.f_back if event == "call" else frame
        if event not in ("call", "c_call") or caller is None or not caller.f_code.co_filename.startswith(PACKAGE):
            return
        name = frame.f_code.co_qualname if event == "call" else argument.__qualname__
        if name.startswith(BOOKKEEPING) or (event == "call" and frame.f_code.co_flags & inspect.CO_GENERATOR):
            return
        call = (caller.f_code.co_filename.removeprefix(PACKAGE), caller.f_lineno, name)
        made.append(call)
        if stop is not None and call == stop[0]:
            left -= 1
            if not left:
                raise Refused(str(call))

    gc.collect()
    gc.disable()  # it would call finalisers from any line, and not from the same one the next time
    with torch.enable_grad():  # a context manager of torch's that is refused its end leaves gradients off
        sys.setprofile(watch)
        try:
            action()
        finally:
            sys.setprofile(None)
            gc.enable()
    return made


class Packed(nn.Linear):
    """Stands for a linear that a loader has quantised: a subclass whose weight cannot take the adapter's."""


def make(tiny: TinyLlava, base: str) -> Any:
    """A base as it is, or one whose projector is packed and whose vocabulary was grown before."""
    model = load_llava(tiny.llava)
    if base != "plain":
        projector = model.get_model().mm_projector
        for number in (0, 2):
            linear = projector[number]
            projector[number] = Packed(linear.in_features, linear.out_features)
            projector[number].load_state_dict(linear.state_dict())
        model.resize_token_embeddings(703)
    return model


@pytest.fixture(scope="module")
def folders(tiny: TinyLlava, patched_llava: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Adapters with all that an adapter may have: modules, a trained projector, and tokens of its own."""
    root = tmp_path_factory.mktemp("adapters")
    for name, mode in MODES.items():
        model = load_llava(tiny.llava)
        attachment = strengthen(attach(model, mode))
        config = describe(attachment)
        model.resize_token_embeddings(703)
        with torch.no_grad():
            for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
                layer.weight[700:].normal_()
            for parameter in model.get_model().mm_projector.parameters():
                parameter.mul_(1.5)
        attachment.extras |= {name for name, _ in model.named_parameters() if "mm_projector" in name}
        attachment.config = AdapterConfig(config.mode, config.settings, config.base, "v0", dict(ADDED))
        save_adapter(model, root / name)
        attachment.config = config
        save_adapter(model, root / f"{name} for a pool")
        load_adapter(load_llava(tiny.llava), root / name, a_tokenizer(tiny))  # what is imported on the way is there now
    return {folder.name: folder for folder in root.iterdir()}


def a_tokenizer(tiny: TinyLlava) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny.llava, use_fast=False)


def traces(model: Any, tokenizer: Any) -> Any:
    """All that loading an adapter changes, but for values: hooks, children, methods, sizes, tokens."""
    parts = [
        (name, id(part), type(part), len(part._forward_hooks), len(part._forward_pre_hooks), part.extra_repr())
        for name, part in model.named_modules()
    ]
    parameters = [(name, id(value), value.data_ptr(), value.shape) for name, value in model.named_parameters()]
    sizes = model.config.vocab_size, model.vocab_size
    return parts, parameters, sorted(model.__dict__), sizes, len(tokenizer), tokenizer.get_added_vocab()


def values_of(model: Any) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(model: Any, values: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, values[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(("mode", "base"), [("mores", "plain"), ("mixlora", "packed and grown")])
def test_wherever_loading_fails_model_and_tokenizer_are_as_they_were(
    tiny: TinyLlava, folders: dict[str, Path], mode: str, base: str
) -> None:
    model, tokenizer, spare = make(tiny, base), a_tokenizer(tiny), make(tiny, base)
    given = tokenizer if base == "plain" else None  # trying tokens out on a copy of it takes most of the time
    before, values = traces(model, tokenizer), values_of(model)
    answer = logits_of(model, ids_of(PROMPT), pictures(1))
    made = calls(lambda: load_adapter(spare, folders[mode], copy.deepcopy(given)))
    assert {"add_tokens", "Original.__init__", "hang"} <= {name for _, _, name in made}
    for point in Counter(made).items():  # the last of the calls of one kind: most is done by then
        with pytest.raises(REFUSED):
            calls(lambda: load_adapter(model, folders[mode], given), point)
        assert traces(model, tokenizer) == before, point
        assert same(model, values), point
    assert torch.equal(logits_of(model, ids_of(PROMPT), pictures(1)), answer)
    load_adapter(model, folders[mode], given)
    assert traces(model, tokenizer) != before


def test_wherever_a_pool_fails_to_load_an_adapter_it_holds_and_answers_what_it_did(
    tiny: TinyLlava, folders: dict[str, Path]
) -> None:
    model, tokenizer = make(tiny, "plain"), a_tokenizer(tiny)
    pool = AdapterPool(model, tokenizer)
    pool.load("first", folders["mores for a pool"])
    before, values = traces(model, tokenizer), values_of(model)
    answers = [logits_of(model, ids_of(PROMPT), pictures(1), adapter_names=name) for name in pool.names()]
    second = folders["mixlora for a pool"]
    made = calls(lambda: pool.load("second", second))
    pool.unload("second")
    for point in Counter(made).items():  # the last of the calls of one kind: most is done by then
        with pytest.raises(REFUSED):
            calls(lambda: pool.load("second", second), point)
        assert pool.names() == ["__base__", "first"], point
        assert traces(model, tokenizer) == before, point
    assert same(model, values)
    for name, answer in zip(pool.names(), answers, strict=True):
        assert torch.equal(logits_of(model, ids_of(PROMPT), pictures(1), adapter_names=name), answer)
    pool.load("second", second)
    assert not torch.equal(logits_of(model, ids_of(PROMPT), pictures(1), adapter_names="second"), answers[1])
