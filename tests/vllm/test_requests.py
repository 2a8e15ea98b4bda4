"""Adapters are checked where requests come in: what is wrong is said, nothing of it reaches the engine, others go on.

Covers `vllm/requests.py`, `vllm/adapter.py`, `vllm/base.py`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_files import change_settings, change_tensors, header_of, set_header
from steered import strengthen
from vllm_fixtures import NEW, Engine, Shared, differing

from llava_steering_plugin import attach, remove_adapter, save_adapter
from llava_steering_plugin.adapters.stored.folder import EXTRA, HEADER, WEIGHTS
from llava_steering_plugin.errors import AdapterError
from llava_steering_plugin.modes.base import Mode
from llava_steering_plugin.modes.mixlora import MixLoRA
from llava_steering_plugin.modes.mores import MoReS
from llava_steering_plugin.vllm.adapter import marked, read_marked, unmarked
from llava_steering_plugin.vllm.copies import digest_of

pytest.importorskip("vllm", reason="needs vLLM: scripts/setup.sh --vllm makes .venv-vllm")


def saved(shared: Shared, mode: Mode, folder: Path, *extras: str) -> Path:
    """An adapter of the reference model; `extras` are parameters of the model that it brings."""
    model = shared.reference.model
    attachment = strengthen(attach(model, mode), size=0.1)
    attachment.extras |= set(extras)
    try:
        save_adapter(model, folder)
    finally:
        remove_adapter(model)
    return folder


def with_a_projector_of_another_width(shared: Shared, folder: Path) -> Path:
    linear = "model.multi_modal_projector.linear_2"
    saved(shared, MoReS(), folder, f"{linear}.weight", f"{linear}.bias")
    names = [f"{EXTRA}model.mm_projector.2.{leaf}" for leaf in ("weight", "bias")]
    return change_tensors(folder, lambda tensors: tensors.update({name: tensors[name][:-1].clone() for name in names}))


def with_added_token(shared: Shared, folder: Path) -> Path:
    copy = Path(shutil.copytree(shared.adapters["all-1"], folder))
    config = json.loads(header_of(copy)[HEADER]) | {"added_tokens": {"<new>": 702}}
    set_header(copy, **{HEADER: json.dumps(config)})
    rows = {f"added_tokens.{part}": torch.zeros(1, 64) for part in ("input", "output")}
    return change_tensors(copy, lambda tensors: tensors.update(rows))


def of_another_base(shared: Shared, folder: Path) -> Path:
    copy = Path(shutil.copytree(shared.adapters["all-1"], folder))
    return change_tensors(copy, lambda tensors: tensors["fingerprint.rows"].mul_(1.5))


def cut_short(shared: Shared, folder: Path) -> Path:
    copy = Path(shutil.copytree(shared.adapters["all-1"], folder))
    with (copy / WEIGHTS).open("r+b") as file:
        file.truncate(3000)
    return copy


def of_a_larger_base(shared: Shared, folder: Path) -> Path:
    copy = Path(shutil.copytree(shared.adapters["all-1"], folder))
    config = json.loads(header_of(copy)[HEADER])
    config["base"] |= {"hidden_size": 4096, "num_layers": 32}
    set_header(copy, **{HEADER: json.dumps(config)})
    return copy


PROJECTOR = "model.multi_modal_projector.linear_1.weight"
BAD: dict[str, tuple[Callable[[Shared, Path], Path], str]] = {
    "mixlora": (lambda shared, to: saved(shared, MixLoRA(factors=4, rank=2), to), "MixLoRA, which chooses"),
    "text": (lambda shared, to: saved(shared, MoReS(modality="vis+text"), to), "steers vis.text"),
    "rank": (lambda shared, to: saved(shared, MoReS(rank=16), to), "--max-lora-rank 16"),
    "projector": (lambda shared, to: saved(shared, MoReS(), to, PROJECTOR), "brings parts of the model"),
    "projector's width": (with_a_projector_of_another_width, r"linear_2.weight is \[63, 64\] where .* \[64, 64\]"),
    "tokens": (with_added_token, "adds tokens to the vocabulary .<new>."),
    "other base": (of_another_base, "the embedding rows that identify the base differ"),
    "larger base": (of_a_larger_base, "32 layers of width 4096"),
    "cut short": (cut_short, "damaged or cut short"),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_cannot_run_is_refused_and_the_engine_lives(
    kind: str, engine: Engine, shared: Shared, tmp_path: Path
) -> None:
    from vllm.exceptions import VLLMValidationError
    from vllm.lora.request import LoRARequest

    make, said = BAD[kind]
    request = LoRARequest("bad", 99, str(make(shared, tmp_path / "bad")))
    for load in (
        lambda: engine.llm.llm_engine.add_lora(request),
        lambda: engine.answers(shared.prompts[:1], [request]),
    ):
        with pytest.raises(VLLMValidationError, match=said):
            load()
    assert engine.answers(shared.prompts[:1], [shared.request("all-4")]) == shared.expected["all-4"][:1]


def test_all_problems_are_said_at_once(engine: Engine, shared: Shared, tmp_path: Path) -> None:
    from vllm.exceptions import VLLMValidationError
    from vllm.lora.request import LoRARequest

    folder = saved(shared, MoReS(rank=16, modality="vis+text"), tmp_path, PROJECTOR)
    with pytest.raises(VLLMValidationError) as found:
        engine.llm.llm_engine.add_lora(LoRARequest("bad", 99, str(folder)))
    assert all(part in str(found.value) for part in ("vis+text", "--max-lora-rank 16", "brings parts"))


def replaced(folder: Path, source: Path) -> None:
    for file in source.iterdir():
        shutil.copyfile(file, folder / file.name)


def test_an_adapter_that_was_trained_again_answers_as_the_new_one(
    engine: Engine, shared: Shared, tmp_path: Path
) -> None:
    from vllm.lora.request import LoRARequest

    folder = tmp_path / "pets"
    shutil.copytree(shared.adapters["all-1"], folder)
    count = len(shared.prompts)

    def answers(number: int, **how: Any) -> list[list[int]]:
        request = LoRARequest("pets", number, str(folder), **how)
        return engine.answers(shared.prompts, [request] * count)

    old, new = shared.expected["all-1"], shared.expected["all-4"]
    assert 2 * differing(old, new) >= count
    assert answers(70) == old
    replaced(folder, shared.adapters["all-4"])
    # The same number means the same adapter to vLLM, until it is told to load it again.
    assert answers(70) == old
    assert answers(70, load_inplace=True) == new
    assert answers(71) == new
    replaced(folder, shared.adapters["all-1"])
    assert answers(72) == old
    request = LoRARequest("pets", 70, str(folder), load_inplace=True)
    engine.llm.llm_engine.add_lora(request)
    assert answers(70) == old and not request.load_inplace


def test_a_slot_is_filled_again_though_the_folder_is_gone(engine: Engine, shared: Shared, tmp_path: Path) -> None:
    from vllm.lora.request import LoRARequest

    folder = tmp_path / "gone"
    shutil.copytree(shared.adapters["uniform9-3"], folder)
    request = LoRARequest("gone", 80, str(folder))
    expected = shared.expected["uniform9-3"]
    assert engine.answers(shared.prompts[:1], [request]) == expected[:1]
    shutil.rmtree(folder)
    names = list(shared.adapters)[: engine.SLOTS + 2]  # more than vLLM keeps in memory
    for name in names:
        assert engine.answers(shared.prompts[:1], [shared.request(name)]) == shared.expected[name][:1]
    assert engine.answers(shared.prompts[1:], [request] * (len(expected) - 1)) == expected[1:]


def asked(engine: Engine, shared: Shared, request: Any, name: str) -> None:
    """Let the engine have a request for the first prompt; `finished` makes the answer."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True)
    engine.llm.llm_engine.add_request(name, shared.prompts[0].for_vllm, sampling, lora_request=request)


def finished(engine: Engine) -> dict[str, list[int]]:
    """What all requests are answered that the engine has."""
    found = {}
    while engine.llm.llm_engine.has_unfinished_requests():
        for output in engine.llm.llm_engine.step():
            if output.finished:
                found[output.request_id.partition("-")[0]] = list(output.outputs[0].token_ids)
    return found


def test_an_adapter_that_is_replaced_while_its_requests_run_and_wait_harms_nobody(
    engine: Engine, shared: Shared, tmp_path: Path
) -> None:
    from vllm.lora.request import LoRARequest

    folder, old, new = tmp_path / "pets", shared.expected["all-1"][0], shared.expected["all-4"][0]
    assert old != new
    shutil.copytree(shared.adapters["all-1"], folder)
    request = LoRARequest("pets", 90, str(folder))
    asked(engine, shared, request, "running")
    while not engine.llm.llm_engine.step():  # until its first token
        pass
    asked(engine, shared, request, "waiting")
    replaced(folder, shared.adapters["all-4"])
    engine.llm.llm_engine.add_lora(LoRARequest("pets", 90, str(folder), load_inplace=True))
    answers = finished(engine)
    assert len(answers["running"]) == len(answers["waiting"]) == len(old)  # with one or the other
    assert engine.answers(shared.prompts[:1], [request]) == [new]
    # And back to what it was, which is new again.
    replaced(folder, shared.adapters["all-1"])
    engine.llm.llm_engine.add_lora(LoRARequest("pets", 90, str(folder), load_inplace=True))
    assert engine.answers(shared.prompts[:1], [request]) == [old]


@pytest.mark.parametrize("change", ["replaced", "deleted"])
def test_a_folder_that_changes_before_its_turn_comes_answers_as_it_was_checked(
    change: str, engine: Engine, shared: Shared, tmp_path: Path
) -> None:
    from vllm.lora.request import LoRARequest

    folder = tmp_path / "pets"
    # An adapter that no other test has loaded.
    copy = Path(shutil.copytree(shared.adapters["all-1"], folder))
    change_tensors(copy, lambda tensors: [value.mul_(1.5) for name, value in tensors.items() if "steer_shift" in name])
    expected = shared.reference.answers(shared.prompts[:1], folder)
    asked(engine, shared, LoRARequest("pets", 92 + (change == "deleted"), str(folder)), "waiting")
    replaced(folder, shared.adapters["all-4"]) if change == "replaced" else shutil.rmtree(folder)
    assert finished(engine) == {"waiting": expected[0]}


def test_a_folder_that_is_not_there_is_refused_and_the_engine_lives(engine: Engine, shared: Shared) -> None:
    from vllm.exceptions import LoRAAdapterNotFoundError
    from vllm.lora.request import LoRARequest

    with pytest.raises(LoRAAdapterNotFoundError, match=r"pets.*/nowhere/pets"):
        engine.answers(shared.prompts[:1], [LoRARequest("pets", 95, "/nowhere/pets")])
    assert engine.answers(shared.prompts[:1], [None]) == shared.expected[None][:1]


def test_the_mark_in_a_path_is_the_hash_of_its_contents(shared: Shared, tmp_path: Path) -> None:
    folder = tmp_path / "a#b"
    shutil.copytree(shared.adapters["all-1"], folder)
    digest = digest_of(folder)
    assert unmarked(marked(folder, digest)) == (str(folder), digest)
    assert unmarked(str(folder)) == (str(folder), None)
    assert read_marked(folder, digest)[1] == digest
    change_settings(folder, dropout=0.25)  # in the header alone
    assert digest_of(folder) != digest
    with pytest.raises(AdapterError, match="holds another adapter than the one that was checked"):
        read_marked(folder, digest)


def test_a_folder_that_changes_while_it_is_read_is_refused(
    shared: Shared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llava_steering_plugin.adapters.stored.folder import AdapterFolder

    folder = tmp_path / "changing"
    shutil.copytree(shared.adapters["all-1"], folder)
    read = AdapterFolder.read

    def and_replace(self: AdapterFolder, *args: Any) -> Any:
        found = read(self, *args)
        replaced(folder, shared.adapters["all-4"])
        return found

    monkeypatch.setattr(AdapterFolder, "read", and_replace)
    with pytest.raises(AdapterError, match="changed while it was read"):
        read_marked(folder)
