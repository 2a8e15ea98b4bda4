"""The numbers of `--tuning_mode peft` are those of PEFT's own model: logits, gradients, and what PEFT's loader reads.

Covers `modes/peft/mode.py` and `modes/peft/layers.py`.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from baselines import BASELINES, baseline, by_peft, moved
from steered import IGNORED, PROMPT, ids_of, logits_of, pictures, words

from llava_steering_plugin import attach, disable_adapter, load_adapter, remove_adapter, save_adapter
from llava_steering_plugin.modes.joint import joint
from llava_steering_plugin.modes.mores import MoReS

pytest_plugins = ["steered_fixtures"]


def gradients_of(model: Any, parameters: dict[str, Any]) -> dict[str, torch.Tensor]:
    ids = ids_of([*PROMPT, *words(6, 3)])
    labels = ids.clone()
    labels[:, : len(PROMPT)] = IGNORED
    loss = model(input_ids=ids, images=pictures(1), labels=labels, attention_mask=torch.ones_like(ids)).loss
    found = torch.autograd.grad(loss, [*parameters.values()])
    return dict(zip(parameters, found, strict=True))


@pytest.mark.parametrize("name", BASELINES)
def test_logits_and_gradients_are_those_of_pefts_own_model_with_the_adapter_that_was_saved(
    model: Any, frozen: Any, tmp_path: Path, name: str
) -> None:
    model.requires_grad_(False)
    attachment = attach(model, baseline(name))
    plain = logits_of(frozen, ids_of(PROMPT), pictures(1))
    assert torch.equal(logits_of(model, ids_of(PROMPT), pictures(1)), plain), "fresh ones are the identity"
    moved(attachment.parameters().values())
    save_adapter(model, tmp_path / "pets")
    here = logits_of(model, ids_of(PROMPT), pictures(1))
    ours = gradients_of(model, attachment.parameters())

    tuned = by_peft(copy.deepcopy(frozen).requires_grad_(False), tmp_path / "pets")
    theirs = {
        n.removeprefix("base_model.model.model.").replace(".default", ""): p
        for n, p in tuned.named_parameters()
        if ".default" in n
    }
    assert theirs.keys() == attachment.parameters().keys()
    assert torch.equal(here, logits_of(tuned, ids_of(PROMPT), pictures(1)))
    assert not torch.allclose(here, plain, atol=1e-3)
    for path, gradient in gradients_of(tuned, theirs).items():
        torch.testing.assert_close(ours[path], gradient, msg=path)
        assert gradient.any(), path


@pytest.mark.parametrize("name", BASELINES)
def test_a_saved_adapter_loads_and_its_removal_gives_the_base_back(model: Any, tmp_path: Path, name: str) -> None:
    before = {key: value.clone() for key, value in model.state_dict().items()}
    moved(attach(model, baseline(name)).parameters().values())
    save_adapter(model, tmp_path / "pets")
    here = logits_of(model, ids_of(PROMPT), pictures(1))
    remove_adapter(model)
    assert model.state_dict().keys() == before.keys()
    assert not [key for key, value in model.state_dict().items() if not torch.equal(value, before[key])]
    load_adapter(model, tmp_path / "pets")
    assert torch.equal(logits_of(model, ids_of(PROMPT), pictures(1)), here)
    described = json.loads((tmp_path / "pets" / "adapter_config.json").read_text())
    assert described["peft_type"] == BASELINES[name][0].upper()


def test_beside_mores_in_a_joint_mode_it_is_saved_by_our_format_alone_and_loads(model: Any, tmp_path: Path) -> None:
    attachment = attach(model, joint(MoReS(rank=2, tokens="all"), baseline("dora")))
    plain = logits_of(model, ids_of(PROMPT), pictures(1))
    moved(attachment.parameters().values())
    save_adapter(model, tmp_path / "pets")
    here = logits_of(model, ids_of(PROMPT), pictures(1))
    with disable_adapter(model):
        assert torch.equal(logits_of(model, ids_of(PROMPT), pictures(1)), plain)
    remove_adapter(model)
    assert load_adapter(model, tmp_path / "pets").mode.name == "mores+peft"
    assert torch.equal(logits_of(model, ids_of(PROMPT), pictures(1)), here)
    assert not torch.allclose(here, plain, atol=1e-3)
    assert not (tmp_path / "pets" / "adapter_config.json").exists()
