"""Linears that are called on one tensor work together, and compute what each would alone.

Covers `modes/mixlora_together.py` and `modes/mixlora_shared.py`.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from routed import LONG, SHORT, SMALL, adapted, batch, everything, routed, small_llama
from torch import Tensor
from transformers import LlamaForCausalLM

from llava_steering_plugin import AdapterPool, save_adapter, token_map
from llava_steering_plugin.errors import TokenMapError
from llava_steering_plugin.modes.base import ForwardPass
from llava_steering_plugin.modes.mixlora import MixLoRA, RoutedLinear
from llava_steering_plugin.modes.mixlora_together import Together

GROUPS = [["q_proj", "k_proj", "v_proj"], ["gate_proj", "up_proj"]]


@pytest.fixture(scope="module")
def base() -> LlamaForCausalLM:
    return small_llama()


def called(together: Together[str], *calls: tuple[str, Tensor]) -> list[list[str]]:
    """Who was worked for in each call of one pass that made something."""
    this_pass, made = everything(1, 1), list[list[str]]()
    for name, inputs in calls:
        together.share(name, inputs, torch.float32, this_pass, lambda members: made.append(list(members)))
    return made


def test_the_second_pass_knows_what_the_first_has_seen_and_not_more() -> None:
    together, one, other = Together[str](), torch.ones(2), torch.ones(2)
    calls = [("q", one), ("k", one), ("o", other), ("v", one)]
    assert called(together, *calls) == [["q"], ["k"], ["o"], ["v"]], "equal tensors are not one tensor"
    assert called(together, *calls) == [["q", "k"], ["o"], ["v"]]


def test_a_pass_keeps_to_what_was_known_when_it_began_because_checkpointing_repeats_it() -> None:
    together, one, this_pass = Together[str](), torch.ones(2), everything(1, 1)
    made: list[list[str]] = []
    for name in ("q", "k", "q", "k"):
        inputs = one if len(made) < 2 else one.clone()
        together.share(name, inputs, torch.float32, this_pass, lambda members: made.append(list(members)))
    assert made == [["q"], ["k"], ["q"], ["k"]]


def test_a_tensor_that_was_written_into_is_another_one() -> None:
    together, one = Together[str](), torch.ones(2)
    called(together, ("q", one), ("k", one))
    this_pass, made = everything(1, 1), list[list[str]]()
    together.share("q", one, torch.float32, this_pass, lambda members: made.append(list(members)))
    one.add_(1)
    together.share("k", one, torch.float32, this_pass, lambda members: made.append(list(members)))
    assert made == [["q", "k"], ["k"]]


def test_what_is_known_goes_through_json() -> None:
    together, again, one = Together[str](), Together[str](), torch.ones(2)
    called(together, ("q", one), ("k", one))
    names = {"q": "layers.0.q", "k": "layers.0.k"}
    again.load(json.loads(json.dumps(together.state(names))), names)
    assert again.known == together.known == {"q": ("q", "k")}
    again.load([["gone", "layers.0.k"], ["gone"]], names)
    assert again.known == {"k": ("k",)}


def logits_of(model: Any, **named: Any) -> Tensor:
    ids, attention = batch(SHORT, LONG)
    with torch.inference_mode(), token_map(torch.zeros_like(ids), attention):
        logits: Tensor = model(ids, attention_mask=attention, **named).logits
    return logits


def alone(linears: list[RoutedLinear]) -> None:
    for linear in linears:
        linear.together = Together()


@pytest.mark.parametrize("settings", [{}, {"conditional": False}, {"variant": "released"}, {"routing": "sequence"}])
def test_together_linears_give_and_choose_what_they_do_alone(base: LlamaForCausalLM, settings: dict[str, Any]) -> None:
    with adapted(base, **settings) as attachment:
        linears: Any = list(attachment.modules.values())
        together = linears[0].together
        first, second = logits_of(base), logits_of(base)
        leaves = [[path.rpartition(".")[2] for path in group] for group in groups(attachment, together)]
        assert leaves == GROUPS * 2
        alone(linears)
        torch.testing.assert_close(first, logits_of(base), atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(second, first, atol=1e-6, rtol=1e-6)


def groups(attachment: Any, together: Together[Any]) -> list[list[str]]:
    return together.state({module: path for path, module in attachment.modules.items()})


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("balance", [0.0, 0.5])
@pytest.mark.parametrize("reentrant", [None, True, False])
def test_together_all_gradients_are_those_of_each_alone(
    base: LlamaForCausalLM, dropout: float, balance: float, reentrant: bool | None
) -> None:
    with adapted(base, dropout=dropout, balance=balance) as attachment:
        model: Any = base
        model.train().requires_grad_(False)
        for parameter in attachment.trained().values():
            parameter.requires_grad_(True)
        model.enable_input_require_grads()
        if reentrant is not None:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        found = []
        for known in (False, True, True):
            linears: Any = list(attachment.modules.values())
            if not known:
                alone(linears)
            elif linears[0].together is not linears[1].together:
                together: Together[Any] = Together()
                for linear in linears:
                    linear.together = together
            torch.manual_seed(1)
            ids, attention = batch(SHORT, LONG, side="right")
            with token_map(torch.zeros_like(ids), attention):
                loss = model(ids, attention_mask=attention, labels=ids).loss
            loss.backward()
            found.append({name: value.grad.clone() for name, value in attachment.trained().items()})
            model.zero_grad(set_to_none=True)
        model.gradient_checkpointing_disable()
        model.disable_input_require_grads()
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, msg=name)
        torch.testing.assert_close(found[2][name], gradient, msg=name)


def test_a_decode_step_takes_what_a_prefill_without_some_linears_has_left() -> None:
    """A linear that the prefill did not call works alone, and says that it has no choice."""
    mode = MixLoRA(**SMALL)
    one, other = (routed(mode) for _ in range(2))
    one.together = other.together = Together()
    one.together.known = {one: (one, other)}
    prefill, token = everything(2, 5), torch.randn(2, 1, 12)
    one(torch.zeros(2, 5, 10), torch.randn(2, 5, 12), prefill)
    prefill.kept.pop(other)
    step = ForwardPass(*[torch.ones(2, 1, dtype=torch.bool)] * 3, True, prefill.kept)
    one(torch.zeros(2, 1, 10), token, step)
    with pytest.raises(TokenMapError, match="came without its prefill"):
        other(torch.zeros(2, 1, 10), token, step)


@pytest.mark.parametrize("inference", [True, False])
def test_decode_steps_compute_on_the_tensor_that_each_linear_is_called_on(inference: bool) -> None:
    """Also where linears that shared one until then are called on another, or on a changed one."""
    mode = MixLoRA(**SMALL)
    linears = [routed(mode).eval() for _ in range(2)]
    linears[0].together = linears[1].together = Together()
    with torch.inference_mode(inference), torch.no_grad():
        prefill, prompt = everything(2, 5), torch.randn(2, 5, 12)
        for _ in range(2):  # the second one knows that they go together
            for linear in linears:
                linear(torch.zeros(2, 5, 10), prompt, prefill)
        chosen = [prefill.kept[linear] for linear in linears]

        def check(*tokens: Tensor) -> None:
            step = ForwardPass(*[torch.ones(2, 1, dtype=torch.bool)] * 3, True, prefill.kept)
            for linear, token, choice in zip(linears, tokens, chosen, strict=True):
                a, b = linear.routed_a[choice.a], linear.routed_b[choice.b]
                expected = ((token @ a.mT) @ b) * mode.scale
                torch.testing.assert_close(linear(torch.zeros(2, 1, 10), token, step), expected)

        one, other = torch.randn(2, 2, 1, 12).unbind()
        check(one, one)
        check(other, other)
        check(one, other)
        check(other.to(torch.float64).float(), one)  # of new tensors
        for row in (0, 1):
            one[row].mul_(2)
            check(one, one)


def test_in_a_pool_the_rows_of_each_adapter_share_too(base: LlamaForCausalLM, tmp_path: Any) -> None:
    with adapted(base) as attachment:
        save_adapter(base, tmp_path / "one")
        with torch.no_grad():
            for parameter in attachment.parameters().values():
                parameter.mul_(-0.5)
        save_adapter(base, tmp_path / "two")
    pool = AdapterPool(base)
    try:
        for name in ("one", "two"):
            pool.load(name, tmp_path / name)
        apart = [logits_of(base, adapter_names=name)[row] for row, name in enumerate(("one", "two"))]
        for _ in range(2):
            both = logits_of(base, adapter_names=["one", "two"])
            torch.testing.assert_close(both, torch.stack(apart), atol=1e-5, rtol=1e-5)
        for adapter in pool._adapters.values():
            linears: Any = list(adapter.modules.values())
            assert len(linears[0].together.known) == 4
    finally:
        pool.remove()


def test_parameters_that_are_cut_over_ranks_are_used_while_their_own_linear_runs_only(base: LlamaForCausalLM) -> None:
    """ZeRO-3 marks them with `ds_id`."""
    with adapted(base) as attachment:
        logits_of(base)
        expected = logits_of(base)
        for parameter in attachment.parameters().values():
            parameter.ds_id = 0  # type: ignore[attr-defined]
        seen: list[int] = []
        import llava_steering_plugin.modes.mixlora as mixlora

        plain = mixlora.shared
        mixlora.shared = lambda linears, *rest: (seen.append(len(linears)), plain(linears, *rest))[1]  # type: ignore
        try:
            torch.testing.assert_close(logits_of(base), expected, atol=1e-6, rtol=1e-6)
        finally:
            mixlora.shared = plain
    assert set(seen) == {1}
