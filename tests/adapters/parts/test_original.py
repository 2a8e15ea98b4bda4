"""The base is the base again: to the bit while an adapter is off, and in every part once it is removed.

Whatever the adapter brings: a trained projector, tokens of its own, an image_newline, other image settings
(`adapters/parts/original.py`, `adapters/parts/vocabulary.py`, `adapters/parts/image_parts.py`).
"""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from own_parts import KINDS, ROW, ask, base, equal, save, tokenizer_of
from snapshots import differences, snapshot
from steered import generate, ids_of, logits_of, pictures, strengthen, words
from tiny_llava import TinyLlava

from llava_steering_plugin import AdapterPool, attach, disabled, load_adapter, remove, save_adapter
from llava_steering_plugin.adapters.parts.image_parts import image_parameters
from llava_steering_plugin.adapters.stored.locate import read
from llava_steering_plugin.errors import SteeringError, TokenMapError
from llava_steering_plugin.modes.mores import MoReS

pytestmark = pytest.mark.usefixtures("patched_llava")


@pytest.fixture(scope="module")
def folders(tiny: TinyLlava, patched_llava: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("own parts")
    return {kind: save(tiny, kind, root / kind, seed) for seed, kind in enumerate(KINDS)}


@pytest.mark.parametrize("kind", KINDS)
def test_a_base_is_the_base_while_its_adapter_is_off_and_once_it_is_removed(
    tiny: TinyLlava, folders: dict[str, Path], kind: str
) -> None:
    model, tokenizer = base(tiny, kind), tokenizer_of(tiny)
    before, answers = snapshot(model, tokenizer), ask(model, kind)
    load_adapter(model, folders[kind], tokenizer)
    on, tuned = snapshot(model, tokenizer), ask(model, kind)
    assert not torch.equal(tuned["logits"][..., :700], answers["logits"][..., :700])
    with disabled(model):
        assert equal(ask(model, kind), answers)
    assert equal(ask(model, kind), tuned)
    assert differences(on, snapshot(model, tokenizer)) == [], "switching it off changes nothing of the model"
    remove(model)
    assert differences(before, snapshot(model, tokenizer)) == []
    assert equal(ask(model, kind), answers)


def test_adapters_that_come_and_go_leave_nothing_behind(tiny: TinyLlava, folders: dict[str, Path]) -> None:
    order = ["projector", "tokens", "settings", "modules", "tokens", "projector", "modules"]
    fresh = {}
    for kind in set(order):
        model = base(tiny, kind)
        load_adapter(model, folders[kind], tokenizer_of(tiny))
        fresh[kind] = ask(model, kind)
    model, tokenizer = base(tiny, "modules"), tokenizer_of(tiny)
    before = snapshot(model, tokenizer)
    for kind in order:
        load_adapter(model, folders[kind], tokenizer)
        assert equal(ask(model, kind), fresh[kind]), kind
        remove(model)
        assert differences(before, snapshot(model, tokenizer)) == [], kind


@pytest.mark.parametrize("change", ["half", "bfloat16", "double", "train"])
@pytest.mark.parametrize("kind", ["all", "tokens in rows that the base has"])
def test_what_is_done_to_the_model_meanwhile_holds_for_the_base_too(
    tiny: TinyLlava, folders: dict[str, Path], kind: str, change: str
) -> None:
    plain, model = base(tiny, kind), base(tiny, kind)
    load_adapter(model, folders[kind])
    with disabled(model):
        ask(model, kind)
    for each in (plain, model):
        getattr(each, change)()
    with disabled(model):
        assert equal(ask(model, kind), ask(plain, kind))
    remove(model)
    assert differences(snapshot(plain), snapshot(model)) == []


def test_what_is_put_around_the_forward_meanwhile_is_called_once_and_the_base_answers(
    tiny: TinyLlava, folders: dict[str, Path]
) -> None:
    """accelerate puts mixed precision there, after the adapter; a call of the base ended in an endless recursion."""
    plain, model = base(tiny, "projector"), base(tiny, "projector")
    load_adapter(model, folders["projector"])
    calls, forward = [], model.forward

    def around(*args: object, **kwargs: object) -> object:
        calls.append(1)
        return forward(*args, **kwargs)

    model.forward = around
    expected = logits_of(plain, ids_of(ROW), pictures(1))
    with disabled(model):
        assert torch.equal(logits_of(model, ids_of(ROW), pictures(1)), expected)
    assert len(calls) == 1
    assert not torch.equal(logits_of(model, ids_of(ROW), pictures(1)), expected)


def test_a_projector_that_is_trained_in_place_is_not_the_bases(tiny: TinyLlava) -> None:
    model = base(tiny, "newline")
    before, answers = snapshot(model), ask(model, "newline")
    attachment = strengthen(attach(model, MoReS(rank=2, tokens="all")))
    parameters = image_parameters(model)
    assert len(parameters) == 5
    for value in (*parameters.values(), *attachment.trained().values()):
        value.requires_grad_(True)
    optimizer = torch.optim.SGD(parameters.values(), lr=0.5)
    seen = {"images": [pictures(3)], "image_sizes": [(112, 56)]}

    def loss() -> torch.Tensor:
        return model(input_ids=ids_of(ROW), labels=ids_of([-100] * 5 + ROW[5:]), **seen).loss

    loss().backward()
    alone = {name: value.grad.clone() for name, value in parameters.items() if value.grad is not None}
    model.zero_grad(set_to_none=True)
    # As for the reference model of preference tuning: in between, with gradients on and then off.
    with disabled(model):
        reference = loss()
        with torch.no_grad():
            assert torch.equal(loss(), reference)
    assert not reference.requires_grad, "nothing of the base is trained"
    total = loss() + reference.detach()
    with disabled(model):
        assert torch.equal(loss(), reference)
    total.backward()
    assert alone.keys() == parameters.keys()
    assert all(torch.equal(parameters[name].grad, value) for name, value in alone.items())
    optimizer.step()
    with disabled(model):
        assert equal(ask(model, "newline"), answers) and torch.equal(loss(), reference)
    assert not torch.equal(loss(), reference)
    for value in parameters.values():
        value.requires_grad_(False)
    remove(model)
    assert differences(before, snapshot(model)) == []


def test_gradients_of_images_go_through_the_bases_own_projector(tiny: TinyLlava, folders: dict[str, Path]) -> None:
    plain, model = base(tiny, "projector"), base(tiny, "projector")
    load_adapter(model, folders["projector"])
    features = torch.randn(1, 16, 64, generator=torch.Generator().manual_seed(1))
    found = []
    with torch.inference_mode(), disabled(model):
        ask(model, "projector")
    for each in (plain, model):
        given = features.clone().requires_grad_(True)
        with disabled(model):
            output = each.get_model().mm_projector(given)
        output.square().sum().backward()
        found.append((output.detach(), given.grad))
    assert all(torch.equal(here, there) for here, there in zip(*found, strict=True))
    assert not torch.equal(model.get_model().mm_projector(features), found[0][0])


def test_a_thread_without_the_adapter_does_not_disturb_one_with_it(tiny: TinyLlava, folders: dict[str, Path]) -> None:
    model = base(tiny, "all")
    plain = ask(model, "all")
    load_adapter(model, folders["all"])
    tuned, start = ask(model, "all"), threading.Barrier(4)

    def with_it(turn: int) -> bool:
        start.wait()
        return all(equal(ask(model, "all"), tuned) for _ in range(4))

    def without(turn: int) -> bool:
        with disabled(model):
            start.wait()
            return all(equal(ask(model, "all"), plain) for _ in range(4))

    with ThreadPoolExecutor(4) as threads:
        running = [threads.submit(each, turn) for turn in range(2) for each in (with_it, without)]
        assert [each.result() for each in running] == [True] * 4


def test_what_is_saved_is_the_adapters_also_inside_a_block_without_it(
    tiny: TinyLlava, folders: dict[str, Path], tmp_path: Path
) -> None:
    model = base(tiny, "all")
    load_adapter(model, folders["all"], tokenizer_of(tiny))
    with disabled(model):
        ask(model, "all")
        save_adapter(model, tmp_path / "copy")
    first, second = read(folders["all"]), read(tmp_path / "copy")
    assert first.config == second.config and first.folder.llava_config == second.folder.llava_config
    assert first.tensors.keys() == second.tensors.keys()
    assert all(torch.equal(value, second.tensors[name]) for name, value in first.tensors.items())


class Packed(torch.nn.Linear):
    """Stands for a linear that a loader has quantised: a subclass whose weight cannot be set in place."""


@pytest.mark.parametrize("kind", ["modules", "tokens", "projector"])
def test_a_packed_projector_is_the_bases_own_whether_the_adapter_replaces_it_or_not(
    tiny: TinyLlava, folders: dict[str, Path], kind: str
) -> None:
    model = base(tiny, kind)
    projector = model.get_model().mm_projector
    for number in (0, 2):
        linear = projector[number]
        projector[number] = Packed(linear.in_features, linear.out_features).requires_grad_(False)
        projector[number].load_state_dict(linear.state_dict())
    before, answers = snapshot(model), ask(model, kind)
    load_adapter(model, folders[kind])
    assert type(projector[0]) is (torch.nn.Linear if kind == "projector" else Packed)
    with disabled(model):
        assert equal(ask(model, kind), answers)
    remove(model)
    assert differences(before, snapshot(model)) == []


def test_tokens_that_the_base_lacks_are_refused_while_the_adapter_is_off(
    tiny: TinyLlava, folders: dict[str, Path]
) -> None:
    model = base(tiny, "tokens")
    load_adapter(model, folders["tokens"])
    marked = ids_of([1, 701, *words(3), 702])
    assert logits_of(model, marked, None).shape[-1] == 703
    with disabled(model):
        for call in (lambda: logits_of(model, marked, None), lambda: generate(model, marked, None)):
            with pytest.raises(TokenMapError, match=r"ids \[701, 702\].*the base knows 700 tokens"):
                call()


def test_a_vocabulary_that_was_resized_since_keeps_its_size(
    tiny: TinyLlava, folders: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    model, tokenizer = base(tiny, "tokens"), tokenizer_of(tiny)
    load_adapter(model, folders["tokens"], tokenizer)
    tokenizer.add_tokens(["<mine>"])
    model.resize_token_embeddings(704)
    remove(model)
    assert model.config.vocab_size == 704 and len(tokenizer) == 704
    assert "keeps its size" in caplog.text


def test_a_pool_has_a_base_of_its_own_after_an_adapter_with_its_own_projector(
    tiny: TinyLlava, folders: dict[str, Path]
) -> None:
    model = base(tiny, "projector")
    plain = ask(model, "projector")
    load_adapter(model, folders["projector"])
    tuned = ask(model, "projector")
    with pytest.raises(SteeringError, match="carries an adapter already"):
        AdapterPool(model)
    remove(model)
    pool = AdapterPool(model)
    pool.load("it", folders["projector"])
    assert equal(ask(model, "projector"), plain)
    rows, names = ids_of(ROW, ROW), ["it", "__base__"]
    together = logits_of(model, rows, pictures(1).repeat(2, 1, 1, 1), adapter_names=names)
    torch.testing.assert_close(together[0], tuned["logits"][0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(together[1], plain["logits"][0], rtol=1e-5, atol=1e-5)
    with disabled(model):
        assert equal(ask(model, "projector"), plain)
