"""Rows of a batch answer as alone: `serving/generation/row.py`, `serving/generation/sampling.py`.

What a request becomes: `serving/generation/prompts.py`, `serving/generation/images.py`.
How prompts are read: `pool/row_by_row.py`.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest
from serving_fixtures import NAMES, Question, made, read

from llava_steering_plugin.pool.pool import BASE
from llava_steering_plugin.serving.generation.request import NO_ANSWER, End, Event, Problem
from llava_steering_plugin.serving.generation.row import Row

pytest_plugins = ["serving_fixtures"]


def test_rows_of_all_adapters_and_the_base_say_in_one_batch_what_each_says_alone(
    worker: Any, asked: list[Question]
) -> None:
    requests = []
    for number, name in enumerate([*NAMES, BASE]):
        question = replace(asked[number % len(asked)], tokens=4 + 5 * number)
        longer = replace(question, prompt=question.prompt.replace("picture", "picture, or " * number + "picture"))
        requests += [
            question.asked(name),
            longer.asked(name, temperature=0.7 + number / 10, top_p=1 - number / 20, seed=number),
        ]
    alone = [made(worker, request)[0] for request in requests]
    passes: list[int] = []
    handle = worker.model.lm_head.register_forward_hook(lambda _, args, scores: passes.append(len(scores)))
    together = made(worker, *requests, batch=len(requests))
    handle.remove()
    assert together == alone
    assert len({text for text, _ in alone}) > len(requests) // 2, "they answer alike: nothing is shown"
    assert max(passes) > len(requests) // 2, "there was no batch"


def test_every_answer_ends_for_its_own_reason_and_counts_its_own_tokens(worker: Any, asked: list[Question]) -> None:
    long = replace(asked[0], tokens=40)
    [(text, _)] = made(worker, long.asked("cats"))
    words = text.split()
    [(_, first)] = made(worker, replace(asked[-1], tokens=1).asked("dogs"))
    requests = [
        long.asked("cats", stop=("</s>", words[2])),
        long.asked("cats", stop=()),
        replace(asked[-1], tokens=1).asked("dogs"),
        replace(asked[-1], prompt="word " * 1000).asked(BASE),
    ]
    answers = made(worker, *requests, batch=8)
    assert answers[0][0] == text[: text.index(words[2])]
    assert [end.finish_reason for _, end in answers] == ["stop", "length", "length", "error"]
    assert answers[1] == (text, End("length", answers[0][1].prompt_tokens, 40))
    assert answers[2][1] == first == End("length", first.prompt_tokens, 1)
    assert answers[3][1].problem is Problem.TOO_LONG and "tokens; this model takes" in answers[3][1].message


def test_an_answer_that_the_end_token_ends_says_so_and_the_others_go_on(
    worker: Any, asked: list[Question], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = replace(asked[0], tokens=20).asked("cats"), replace(asked[1], tokens=20).asked("birds")
    tokens = worker.tokenizer(made(worker, first)[0][0], add_special_tokens=False).input_ids
    monkeypatch.setattr(worker.model.generation_config, "eos_token_id", [2, tokens[5]])
    alone = [made(worker, request)[0] for request in (first, second)]
    assert alone[0][1].finish_reason == "stop" and 0 < alone[0][1].completion_tokens < 20
    assert made(worker, first, second, batch=2) == alone


def test_a_row_ends_at_once_and_the_others_when_they_are_complete(worker: Any, asked: list[Question]) -> None:
    async def order() -> list[str]:
        slots = worker.open_slots(1, 3, lambda: None)
        ended: list[str] = []

        async def ask(name: str, question: Question) -> None:
            await read(slots.ask(question.asked(name)))
            ended.append(name)
            if name != "dogs":
                assert slots.taken == 1, "the other one has ended, too: nothing is shown"

        await asyncio.gather(
            ask("cats", replace(asked[0], tokens=1)),
            ask("dogs", replace(asked[0], tokens=150)),
            ask("birds", replace(asked[1], tokens=2)),
        )
        return ended

    assert asyncio.run(order()) == ["cats", "birds", "dogs"]


def test_a_row_whose_numbers_overflow_fails_alone(worker: Any, shelf: Any, asked: list[Question]) -> None:
    worker.catalog.put("diverged", str(shelf / "cats"))
    try:
        for module in worker.pool._adapters["diverged"].modules.values():
            for parameter in module.parameters():
                parameter.data.fill_(float("nan"))
        requests = [asked[0].asked(name, temperature=0.9, seed=3) for name in ("cats", "diverged", BASE)]
        good = [made(worker, request)[0] for request in requests[::2]]
        answers = made(worker, *requests, batch=3)
        assert answers[::2] == good
        assert answers[1][1].problem is Problem.NOT_FINITE
    finally:
        worker.catalog.drop("diverged")


def test_rows_that_cannot_be_read_fail_alone(worker: Any, asked: list[Question]) -> None:
    """A removed adapter, a file that is no image, and a prompt with a placeholder too many."""
    good = [asked[0].asked("cats"), asked[-1].asked(BASE)]
    image = asked[0].asked("cats").images[0]
    bad = [
        asked[0].asked("removed"),
        replace(good[0], images=(b"no image",)),
        replace(good[0], prompt="<image> <image>", images=(image,)),
    ]
    answers = made(worker, bad[0], good[0], bad[1], bad[2], good[1], batch=5)
    assert [answers[1], answers[4]] == [made(worker, request)[0] for request in good]
    problems = [answers[number][1].problem for number in (0, 2, 3)]
    assert problems == [Problem.GONE, Problem.FAILED, Problem.FAILED]


def test_an_error_in_the_middle_ends_all_rows_of_its_batch_with_a_message_and_the_worker_goes_on(
    worker: Any, asked: list[Question], caplog: pytest.LogCaptureFixture
) -> None:
    passes: list[int] = []

    def fail(_: Any, args: Any, scores: Any) -> None:
        passes.extend([len(scores)] if len(scores) == 3 else [])  # prompts may be read one by one
        if len(passes) == 4:
            raise RuntimeError("out of memory")

    requests = [question.asked(name) for name, question in zip(("cats", "dogs", BASE), asked, strict=False)]
    alone = [made(worker, request)[0] for request in requests]
    handle = worker.model.lm_head.register_forward_hook(fail)
    try:
        answers = made(worker, *requests, batch=3)
    finally:
        handle.remove()
    for (text, end), (whole, _) in zip(answers, alone, strict=True):
        assert text and whole.startswith(text)
        assert (end.problem, end.message, end.completion_tokens) == (Problem.FAILED, NO_ANSWER, 4)
    assert "out of memory" in caplog.text
    assert made(worker, *requests, batch=3) == alone


def test_a_batch_that_is_too_large_for_the_memory_is_answered_row_by_row(worker: Any, asked: list[Question]) -> None:
    def fail(_: Any, args: Any, scores: Any) -> None:
        if len(scores) > 1:
            raise RuntimeError("out of memory")

    requests = [question.asked("cats") for question in asked[:3]]
    requests.append(asked[3].asked("dogs", temperature=0.9, seed=5))
    alone = [made(worker, request)[0] for request in requests]
    handle = worker.model.lm_head.register_forward_hook(fail)
    try:
        assert made(worker, *requests, batch=4) == alone
    finally:
        handle.remove()


def test_a_row_has_its_first_token_before_the_prompts_of_the_next_ones_are_read(
    worker: Any, asked: list[Question], monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[object] = []
    take = Row.take

    def noted(row: Row, token: int, ends: Any) -> None:
        order.append(row.adapter)
        take(row, token, ends)

    monkeypatch.setattr(Row, "take", noted)
    names = ["cats", "mixlora-x", BASE, "mixlora-x", "birds"]
    requests = [
        replace(asked[number], tokens=2, prompt=asked[number].prompt.replace("A chat", "A " * number + "chat")).asked(
            name
        )
        for number, name in enumerate(names)
    ]
    handle = worker.model.lm_head.register_forward_hook(lambda _, args, scores: order.append(len(scores)))
    made(worker, *requests, batch=5)
    handle.remove()
    # The two of one MixLoRA are read together: what it has chosen for them is for its decode steps.
    assert order == [1, "cats", 2, "mixlora-x", "mixlora-x", 1, BASE, 1, "birds", 5, *names]


def test_rows_of_adapters_that_read_padding_are_answered_alone_and_the_others_together(
    worker: Any, shelf: Any, asked: list[Question], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker.pool._adapters["mixlora-x"], "reads_padding", True)
    sizes: list[int] = []
    handle = worker.model.lm_head.register_forward_hook(lambda _, args, scores: sizes.append(len(scores)))
    names = ["cats", "mixlora-x", "dogs", "mixlora-x", "birds"]
    requests = [asked[number].asked(name) for number, name in enumerate(names)]
    answers = made(worker, *requests, batch=5)
    handle.remove()
    assert answers == [made(worker, request)[0] for request in requests]
    assert set(sizes) == {1, 3}, sizes


def test_an_adapter_that_is_removed_and_one_that_is_replaced_while_a_batch_runs_are_kept_to_its_end(
    worker: Any, shelf: Any, asked: list[Question]
) -> None:
    worker.catalog.put("leaving", str(shelf / "cats"))
    worker.catalog.put("changing", str(shelf / "pets"))
    requests = [replace(asked[0], tokens=30).asked(name) for name in (BASE, "leaving", "changing")]
    alone = [made(worker, request)[0] for request in requests]
    steps: list[int] = []

    def change(_: Any, args: Any, scores: Any) -> None:
        steps.append(len(scores))
        if len(steps) == 5:
            worker.catalog.drop("leaving")
            worker.catalog.put("changing", str(shelf / "fish"))

    handle = worker.model.lm_head.register_forward_hook(change)
    try:
        assert made(worker, *requests, batch=3) == alone
        handle.remove()
        assert made(worker, requests[1])[0][1].problem is Problem.GONE
        assert made(worker, requests[2])[0] == made(worker, replace(asked[0], tokens=30).asked("fish"))[0]
    finally:
        handle.remove()
        worker.catalog.drop("changing")


def test_a_row_that_nobody_wants_any_more_ends_and_the_others_do_not(worker: Any, asked: list[Question]) -> None:
    async def ask() -> tuple[Event, str, str]:
        slots = worker.open_slots(1, 3, lambda: None)
        first, second, third, waiting = (
            slots.ask(replace(asked[0], tokens=60).asked(name)) for name in ("cats", "dogs", "pets", "fish")
        )
        await second.next()
        second.cancel()
        end = [event async for event in second][-1]
        waiting.cancel()
        await asyncio.gather(read(waiting), read(first))
        return end, (await read(third))[0], (await waiting.next()).finish_reason

    end, text, reason = asyncio.run(ask())
    assert isinstance(end, End) and end.finish_reason == "cancelled" and end.completion_tokens < 60
    assert text == made(worker, replace(asked[0], tokens=60).asked("pets"))[0][0]
    assert reason == "cancelled"
