"""A model built with flash attention gives the attention of the eager model, and is as it was afterwards.

The layers are transformers' own flash layers: they import flash-attn only when they call it, so that only the check
for the package, at their construction, is passed by.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from steered import load_llava, strengthen
from tiny_llava import TinyLlava
from torch import Tensor
from transformers import PreTrainedModel

from llava_steering_plugin import attach, remove, token_map
from llava_steering_plugin.measures.attention import attention_taken
from llava_steering_plugin.measures.flash import without_flash
from llava_steering_plugin.measures.modality import Kind, measure_shares
from llava_steering_plugin.modes.mores import MoReS

SMALL = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 50}
PRESENT = {
    "whole": torch.ones(2, 12).long(),
    "left": torch.tensor([[0] * 5 + [1] * 7, [1] * 12]),
    "right": torch.tensor([[1] * 12, [1] * 7 + [0] * 5]),
}
pytestmark = pytest.mark.skipif(
    not hasattr(PreTrainedModel, "_check_and_enable_flash_attn_2"), reason="this transformers has no flash classes"
)


@pytest.fixture(autouse=True)
def without_the_check(monkeypatch: pytest.MonkeyPatch) -> None:
    def allow(cls: Any, config: Any, *_: Any, **__: Any) -> Any:
        config._attn_implementation = "flash_attention_2"
        return config

    monkeypatch.setattr(PreTrainedModel, "_check_and_enable_flash_attn_2", classmethod(allow))
    for kind in ("mistral", "qwen2"):  # a constant that transformers takes from the package, where it is installed
        module = importlib.import_module(f"transformers.models.{kind}.modeling_{kind}")
        monkeypatch.setattr(module, "_flash_supports_window_size", True, raising=False)


def built(kind: str, attention: str, **settings: Any) -> Any:
    """A model of transformers with random weights, the same for every attention."""
    config = getattr(transformers, f"{kind}Config")(**SMALL, **settings)
    config._attn_implementation = attention
    torch.manual_seed(0)
    return getattr(transformers, f"{kind}ForCausalLM")(config).eval()


def weights_of(model: Any, present: Tensor) -> dict[tuple[int, int], Tensor]:
    """The attention of every position that is no padding, by layer and row."""
    torch.manual_seed(1)
    embeds = torch.randn(*present.shape, SMALL["hidden_size"])
    taken = {}

    def take(layer: int, row: int, weights: Tensor) -> None:
        taken[layer, row] = weights.double()

    with torch.inference_mode(), attention_taken(model, present.bool(), take):
        model(inputs_embeds=embeds, attention_mask=present, use_cache=False)
    return taken


def state_of(model: Any) -> list[Any]:
    """Everything that a model is made of but the values of its tensors."""
    return [(type(module), {**vars(module)}) for module in model.modules()] + [copy.deepcopy(vars(model.config))]


@pytest.mark.parametrize("padding", PRESENT)
@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("Llama", {}),
        ("Llama", {"num_key_value_heads": 2}),
        ("Mistral", {"num_key_value_heads": 2}),
        ("Qwen2", {"num_key_value_heads": 2}),
        ("Phi", {}),  # it has no SDPA class
    ],
    ids=["Llama", "grouped", "Mistral", "Qwen2", "Phi"],
)
def test_flash_layers_show_the_attention_of_eager_ones(kind: str, settings: dict[str, Any], padding: str) -> None:
    flash = built(kind, "flash_attention_2", **settings)
    assert "Flash" in str(flash)
    before = state_of(flash)
    found = weights_of(flash, PRESENT[padding])
    expected = weights_of(built(kind, "eager", **settings), PRESENT[padding])
    assert found.keys() == expected.keys()
    assert len(found) == 6
    for place, weights in expected.items():
        torch.testing.assert_close(found[place], weights, rtol=0, atol=1e-6)
    assert state_of(flash) == before


def test_a_sliding_window_is_as_wide_as_that_of_flash_attention() -> None:
    # flash-attn's window of 4 sees 4 positions before the query; transformers' eager mask of 5 does.
    for present in PRESENT.values():
        found = weights_of(built("Mistral", "flash_attention_2", sliding_window=4, num_key_value_heads=4), present)
        expected = weights_of(built("Mistral", "eager", sliding_window=5, num_key_value_heads=4), present)
        for place, weights in expected.items():
            torch.testing.assert_close(found[place], weights, rtol=0, atol=1e-6)
        assert all(int((weights > 0).sum(-1).max()) == 5 for weights in found.values())

    window = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2}
    qwen = built("Qwen2", "flash_attention_2", num_key_value_heads=4, **window)
    wide = [int((weights > 0).sum(-1).max()) for (_, row), weights in weights_of(qwen, PRESENT["whole"]).items()]
    assert wide == [5, 5, 5, 5, 12, 12]


def test_the_logits_of_the_pass_are_those_of_the_eager_model_and_padding_gets_none_of_them() -> None:
    flash, eager = built("Llama", "flash_attention_2"), built("Llama", "eager")
    embeds = torch.randn(2, 12, SMALL["hidden_size"])
    for present in PRESENT.values():
        given = {"inputs_embeds": embeds, "attention_mask": present}
        with torch.inference_mode(), without_flash(flash):
            logits = flash(**given).logits
        expected = eager(**given).logits
        torch.testing.assert_close(logits[present.bool()], expected[present.bool()], rtol=0, atol=1e-5)
        assert torch.isfinite(logits).all()


def test_generation_in_the_block_is_that_of_the_eager_model() -> None:
    flash, eager = built("Llama", "flash_attention_2"), built("Llama", "eager")
    ids = torch.randint(3, 50, (2, 12))
    given = {"attention_mask": PRESENT["left"], "max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    with without_flash(flash):
        assert torch.equal(flash.generate(ids, **given), eager.generate(ids, **given))


def test_an_exception_in_the_block_puts_everything_back() -> None:
    flash = built("Llama", "flash_attention_2")
    before = state_of(flash)
    with pytest.raises(RuntimeError, match="in the pass"), without_flash(flash):
        assert state_of(flash) != before
        raise RuntimeError("in the pass")
    assert state_of(flash) == before
    with pytest.raises(NameError, match="flash_attn_func"):  # the layers are real: they call what is not installed here
        flash(torch.ones(1, 3).long())


def test_models_without_flash_attention_are_left_alone_and_a_config_that_names_it_names_pytorchs_in_the_block() -> None:
    model = built("Llama", "eager")
    before = state_of(model)
    with without_flash(model):
        assert state_of(model) == before
    # Later versions of transformers read the name at every call, and have no flash layers.
    model.config._attn_implementation = "flash_attention_2"
    with without_flash(model):
        assert model.config._attn_implementation == "sdpa"
    assert model.config._attn_implementation == "flash_attention_2"


def test_a_tuned_llava_with_flash_attention_under_accelerate_and_checkpointing_is_measured_like_an_eager_one(
    tiny: TinyLlava, patched_llava: Any
) -> None:
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    kinds = torch.tensor([[0] + [2] * 3 + [3] * 9 + [2] + [4] * 4])
    found = []
    for attention in ("flash_attention_2", "eager"):
        model = load_llava(tiny.llava, attn_implementation=attention)
        strengthen(attach(model, MoReS(rank=2, tokens="all")))
        if attention != "eager":  # as the loader does with a model on several GPUs, or in 4 bits
            for module in model.model.layers.modules():
                add_hook_to_module(module, AlignDevicesHook("cpu"))
        model.gradient_checkpointing_enable()
        torch.manual_seed(0)
        embeds = torch.randn(*kinds.shape, model.config.hidden_size)
        forward: Callable[[], Any] = lambda model=model, embeds=embeds: model(inputs_embeds=embeds)  # noqa: E731
        with torch.no_grad(), token_map(kinds == Kind.IMAGE):
            (shares,) = measure_shares(model.train(), forward, kinds)
        found.append(shares.shares)
        remove(model)
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-6)
