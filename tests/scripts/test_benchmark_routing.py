"""The measurement of routing over the turns of a chat: what it compares is what training and a chat really choose."""

from __future__ import annotations

from typing import Any

import torch
from steered import IMAGE, ids_of, pictures, strengthen, words

from llava_steering_plugin import attach
from llava_steering_plugin.modes.mixlora import MixLoRA

pytest_plugins = ["steered_fixtures"]


def test_answers_are_the_runs_of_supervised_positions_and_each_gets_a_row_of_its_own() -> None:
    from benchmarks.routing import answers_in, rows_of

    labels = torch.tensor([-100, -100, 5, 6, -100, 7])
    assert answers_in(labels) == [slice(2, 4), slice(5, 6)]
    assert rows_of(labels).tolist() == [
        [-100, -100, 5, 6, -100, 7],
        [-100, -100, 5, 6, -100, -100],
        [-100, -100, -100, -100, -100, 7],
    ]


def test_a_row_is_routed_and_answered_as_a_generation_from_its_prompt(model: Any) -> None:
    from benchmarks.routing import look
    from benchmarks.shared.choices import choices

    attachment = strengthen(attach(model, MixLoRA(factors=8, rank=2)))
    question, second, pixels = [1, *words(2), IMAGE, *words(4, seed=1)], words(3, seed=2), pictures(1)

    def generated(prompt: list[int], count: int) -> list[int]:
        with torch.inference_mode():
            how = {"do_sample": False, "min_new_tokens": count, "max_new_tokens": count}
            answer: list[int] = model.generate(ids_of(prompt), images=pixels, **how)[0].tolist()
        return answer[-count:]

    first_answer = generated(question, 2)
    prompt = question + first_answer + second
    with choices(attachment.modules) as of_chat:
        second_answer = generated(prompt, 3)
    ids = torch.tensor(prompt + second_answer)
    labels = torch.full_like(ids, -100)
    for start, answer in ((len(question), first_answer), (len(prompt), second_answer)):
        labels[start : start + len(answer)] = torch.tensor(answer)
    chosen, said = look(model, ids, labels, pixels)
    assert torch.equal(chosen[0], chosen[1]), "training chooses by the first question alone"
    assert torch.equal(chosen[2], torch.cat(list(of_chat.values())))
    assert not torch.equal(chosen[2], chosen[0])
    assert (said[1][0], said[2][1]) == (first_answer, second_answer)


def test_figures_are_those_of_a_constructed_case() -> None:
    from benchmarks.routing import summary

    def sets(*rows: tuple[int, int]) -> torch.Tensor:
        """One router that chose two of four factors, by row."""
        return torch.stack([torch.zeros(1, 4, dtype=torch.bool).index_fill(1, torch.tensor(row), True) for row in rows])

    labels = torch.tensor([-100, 7, -100, 8])
    right, wrong = [7], [0]
    found = [
        (labels, sets((0, 1), (0, 1), (0, 1)), [[right, [8]], [right, [8]], [right, [8]]]),
        (labels, sets((2, 3), (2, 3), (0, 3)), [[wrong, [8]], [wrong, [8]], [wrong, [9]]]),
    ]
    first, second = summary(found)
    assert (first.number, first.conversations, first.same_sets, first.kept, first.others) == (1, 2, 1, 1, 0)
    assert (first.right_as_trained, first.right_in_chat, first.same_answers) == (0.5, 0.5, 1)
    assert (second.same_sets, second.kept, second.others) == (0.5, 0.75, 0.25)
    assert (second.right_as_trained, second.right_in_chat, second.same_answers) == (1, 0.5, 0.5)
