"""Learned choices of tokens on a whole LLaVA: recomputed, saved, loaded, in a pool, and no dearer than fixed ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gradient_runs import RUNS, gradients
from quick_runs import SCRIPTS  # noqa: F401 - puts `benchmarks` on the path of this process
from steered import PROMPT, generate, ids_of, logits_of, pictures, strengthen

from llava_steering_plugin import AdapterPool, attach, load_adapter, remove_adapter, save_adapter
from llava_steering_plugin.adapters.attachment import Attachment, required
from llava_steering_plugin.diagnostics.steering.one_model import chosen_tokens, steered_model
from llava_steering_plugin.modes.mores import MoReS

pytest_plugins = ["steered_fixtures"]

TOKENS = ("f1", "uniform4", "all")
CHOICE = MoReS(rank=2, tokens=",".join(TOKENS), modality="vis+text", dropout=0.1)
OF_VISUAL = ("all", "f1", "uniform4", "f1")  # the choice of each layer, in the tests below


def chosen(attachment: Attachment) -> Attachment:
    """Makes each layer choose as `OF_VISUAL` says; text stays with the first selection in every layer."""
    with torch.no_grad():
        for number, spec in enumerate(OF_VISUAL):
            scores = attachment.parameters()[f"layers.{number}.choices.vis.steer_scores"]
            scores.copy_(torch.tensor([float(each == spec) for each in TOKENS]))
            attachment.parameters()[f"layers.{number}.choices.text.steer_scores"].zero_()
    return attachment


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.__name__)
def test_gradient_checkpointing_gives_the_gradients_of_the_plain_run(model: Any, run: Callable[[Any], None]) -> None:
    chosen(strengthen(attach(model, CHOICE), size=0.05))
    plain = gradients(model, run, "off")
    scores = [name for name in plain if name.endswith("steer_scores")]
    assert len(scores) == 8
    assert all(plain[name].any() for name in scores if not name.startswith("layers.3."))
    for checkpointing in ("reentrant", "not reentrant"):
        again = gradients(model, run, checkpointing)
        assert plain.keys() == again.keys()
        for name, gradient in plain.items():
            torch.testing.assert_close(again[name], gradient, atol=1e-6, rtol=1e-6, msg=f"{checkpointing}: {name}")


def test_a_saved_adapter_loads_with_its_choices_and_its_card_says_them(model: Any, tmp_path: Path) -> None:
    chosen(strengthen(attach(model, CHOICE)))
    before = logits_of(model, ids_of(PROMPT), pictures(1))
    assert chosen_tokens(steered_model(model)) == {"vis": list(OF_VISUAL), "text": ["f1"] * 4}
    save_adapter(model, tmp_path / "pets")
    remove_adapter(model)
    load_adapter(model, tmp_path / "pets")
    assert torch.equal(logits_of(model, ids_of(PROMPT), pictures(1)), before)
    card = (tmp_path / "pets" / "README.md").read_text()
    assert "| chosen tokens, vis | `all: layers.0; f1: layers.1, layers.3; uniform4: layers.2` |" in card
    assert "| chosen tokens, text | `f1: layers.0, layers.1, layers.2, layers.3` |" in card


def test_rows_of_one_batch_have_the_answers_that_their_adapters_give_alone(model: Any, tmp_path: Path) -> None:
    modes = {"choice": CHOICE, "other": MoReS(tokens="all,f1", rank=1), "fixed": MoReS(tokens="all", rank=2)}
    prompt, alone = ids_of(PROMPT), {}
    for seed, (name, mode) in enumerate(modes.items()):
        attachment = strengthen(attach(model, mode), seed)
        if name == "choice":
            chosen(attachment)
        alone[name] = generate(model, prompt, pictures(1), output_scores=False)
        save_adapter(model, tmp_path / name)
        remove_adapter(model)
    pool = AdapterPool(model)
    try:
        for name in modes:
            pool.load(name, tmp_path / name)
        together = generate(model, prompt.repeat(3, 1), pictures(1).repeat(3, 1, 1, 1), adapter_names=list(modes))
    finally:
        pool.remove()
    assert {name: [row] for name, row in zip(modes, together, strict=True)} == alone
    assert len({str(rows) for rows in alone.values()}) == 3, "adapters that answer alike would show nothing"


def test_in_evaluation_a_choice_launches_no_more_than_a_fixed_selection() -> None:
    """Of several selections a pass computes one; the scores are read before it, once for all passes."""
    from benchmarks.launches import counts_of

    fixed, learned = (list(counts_of(MoReS(tokens=tokens)).values()) for tokens in ("all", "all,f1"))
    for phase in ("prefill", "decode step"):
        assert [each[phase] for each in learned] == [each[phase] for each in fixed]


def test_a_plan_counts_the_scores(model: Any) -> None:
    plain = attach(model, MoReS(tokens="all", rank=2)).summary().mode
    remove_adapter(model)
    summary = attach(model, MoReS(tokens="all,f1,l2", rank=2)).summary()
    assert summary.mode == plain + 4 * 3
    assert required(model).trained().keys() == required(model).parameters().keys()
