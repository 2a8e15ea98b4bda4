"""Rows whose logits become NaN or infinite while a model generates harm no others, and say so.

Holds for `hooks/finite_rows.py` and what `pool/pool.py` and `serving/model_worker.py` make of it.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from pooled import BASE, Batch
from steered import NEW, PROMPT, generate, ids_of, pictures
from transformers import LogitsProcessorList, MinLengthLogitsProcessor

from llava_steering_plugin import AdapterPool, attach, disable_adapter, remove
from llava_steering_plugin.errors import NotFiniteError, NotFiniteWarning
from llava_steering_plugin.hooks.finite_rows import FiniteRows
from llava_steering_plugin.modes.mores import MoReS

pytest_plugins = ["steered_fixtures", "pooled_fixtures"]

WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampled": {"do_sample": True, "temperature": 0.7, "top_p": 0.9},
    "beams": {"num_beams": 3, "do_sample": False},
    "sampled beams": {"num_beams": 2, "do_sample": True},
    "several": {"do_sample": True, "num_return_sequences": 2},
    "contrastive": {"penalty_alpha": 0.6, "top_k": 4},
    "penalised": {"do_sample": True, "repetition_penalty": 1.3, "bad_words_ids": [[300], [301]]},
}
GOOD = ids_of(PROMPT)


def breaking(pool: AdapterPool, name: str) -> None:
    """Let an adapter that is loaded overflow at run time, as half precision does with inputs that were not tried."""
    for module in pool._adapters[name].modules.values():
        for parameter in module.parameters():
            parameter.data.fill_(torch.inf)


@pytest.fixture
def broken(pool: AdapterPool) -> Iterator[AdapterPool]:
    breaking(pool, "dogs")
    yield pool


@pytest.mark.parametrize("way", WAYS)
def test_the_good_rows_of_a_batch_are_answered_as_without_the_broken_one(
    broken: AdapterPool, shared: Any, way: str
) -> None:
    names = ["cats", "dogs", BASE, "pets"]
    rows, images = GOOD.repeat(4, 1), pictures(4)
    with pytest.warns(NotFiniteWarning, match="no answer in rows .*with the adapter 'dogs'") as caught:
        together = generate(shared, rows, images, adapter_names=names, **WAYS[way])
    found = [each.message for each in caught if isinstance(each.message, NotFiniteWarning)]
    assert len(found) == 1 and found[0].rows
    with pytest.raises(NotFiniteError, match="no answer: the logits became NaN or infinite with the adapter 'dogs'"):
        generate(shared, GOOD, pictures(1), adapter_names="dogs", **WAYS[way])
    # A sound adapter in the place of the broken one: the draws of the other rows are the same then.
    with warnings.catch_warnings():
        warnings.simplefilter("error", NotFiniteWarning)
        sound = generate(shared, rows, images, adapter_names=["cats", BASE, BASE, "pets"], **WAYS[way])
    times = len(together) // 4
    assert together[: times * 1] == sound[: times * 1] and together[times * 2 :] == sound[times * 2 :]


def test_a_broken_row_ends_at_once(broken: AdapterPool, shared: Any) -> None:
    with pytest.warns(NotFiniteWarning) as caught, torch.inference_mode():
        output = shared.generate(
            GOOD.repeat(2, 1),
            images=pictures(2),
            adapter_names=["cats", "dogs"],
            max_new_tokens=NEW,
            min_new_tokens=NEW,
        )
    end = shared.generation_config.eos_token_id
    assert end not in output[0].tolist() and len(set(output[0].tolist())) > 2
    assert output[1].tolist() == [1, end, *[0] * (NEW - 1)], "the end, and then padding"
    assert [each.message.rows for each in caught if isinstance(each.message, NotFiniteWarning)] == [(1,)]


def test_rows_of_unequal_length_are_named_rightly(broken: AdapterPool, shared: Any) -> None:
    """The batch of `pooled`: with no, one and two images."""
    batch = Batch(["cats", "dogs", BASE, "pets", "dogs"])
    with pytest.warns(NotFiniteWarning) as caught:
        together = batch.generated(shared, adapter_names=batch.names, do_sample=False)
    assert [each.message.rows for each in caught if isinstance(each.message, NotFiniteWarning)] == [(1, 4)]
    for row in (0, 2, 3):
        assert [together[row]] == batch.generated_alone(shared, row, adapter_names=batch.names[row], do_sample=False)


def test_one_adapter_on_a_model_is_an_error_and_its_base_answers(model: Any) -> None:
    attachment = attach(model, MoReS(tokens="all"))
    plain = generate(model, GOOD, pictures(1), do_sample=True)
    for parameter in attachment.parameters().values():
        parameter.data.fill_(torch.nan)
    for options in ({"do_sample": True}, {"do_sample": False}):
        with pytest.raises(NotFiniteError, match="with the adapter"):
            generate(model, GOOD, pictures(1), **options)
    with disable_adapter(model):
        assert generate(model, GOOD, pictures(1), do_sample=True) == plain
    remove(model)


def test_processors_of_the_caller_are_kept(pool: AdapterPool, shared: Any) -> None:
    ids = torch.tensor([[1, 300, 301]])
    mine = LogitsProcessorList([MinLengthLogitsProcessor(9, shared.generation_config.eos_token_id)])
    plain = generate(shared, ids, None, adapter_names="cats", do_sample=True)
    assert generate(shared, ids, None, adapter_names="cats", do_sample=True, logits_processor=mine) == plain
    assert len(mine) == 1, "the caller's own list must not change"
    seen: list[int] = []

    def note(input_ids: Any, scores: Any) -> Any:
        seen.append(len(scores))
        return scores

    generate(shared, ids, None, adapter_names="cats", logits_processor=[note])
    assert seen == [1] * NEW


def test_forbidden_tokens_are_no_fault_and_other_scores_stay_to_the_bit() -> None:
    scores = torch.randn(5, 9)
    scores[0, :8] = -torch.inf
    scores[1, 2], scores[2, 3], scores[3] = torch.nan, torch.inf, -torch.inf
    rows = FiniteRows(4)
    given = scores.clone()
    found = rows(torch.zeros(5, 1), given)
    assert torch.equal(given, scores) or torch.equal(given.isnan(), scores.isnan())
    assert torch.equal(found[[0, 4]], scores[[0, 4]])
    assert found[1:4].argmax(1).tolist() == [4, 4, 4] and bool(torch.isfinite(found[1:4]).all())
    assert rows.broken(None) == ([1, 2, 3], False)
    assert bool((rows(torch.zeros(5, 2), torch.zeros(5, 9))[1:4].argmax(1) == 4).all()), "a row that has ended stays so"


def test_threads_do_not_see_each_others_rows(broken: AdapterPool, shared: Any) -> None:
    outcomes: dict[str, Any] = {}

    def ask(name: str) -> None:
        try:
            with torch.inference_mode():
                outcomes[name] = shared.generate(GOOD, images=pictures(1), adapter_names=name, max_new_tokens=NEW)
        except NotFiniteError as error:
            outcomes[name] = error

    threads = [threading.Thread(target=ask, args=(name,)) for name in ("cats", "dogs", "pets", BASE)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert isinstance(outcomes.pop("dogs"), NotFiniteError)
    assert len(outcomes) == 3 and all(isinstance(each, torch.Tensor) for each in outcomes.values())
