"""The flags that choose tokens and layers select what a naive implementation selects."""

from __future__ import annotations

from fractions import Fraction
from math import floor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llava_steering_plugin.modes.mores_selection import TokenSelection, parse_layers

PROPERTY = settings(max_examples=200, deadline=None, derandomize=True)

terms = st.one_of(
    st.just("all"),
    st.integers(1, 12).map("f{}".format),
    st.integers(1, 12).map("l{}".format),
    st.integers(1, 40).map("uniform{}".format),
    st.integers(1, 100).map("{}%".format),
    st.sampled_from(["0.5%", "2.5%", "12.5%", "33.3%", "0.01%", "100.0%"]),
)
specs = st.lists(terms, min_size=1, max_size=3).map("+".join)
masks = st.integers(1, 60).flatmap(
    lambda length: st.lists(
        st.lists(st.sampled_from([True, True, True, False]), min_size=length, max_size=length), min_size=1, max_size=3
    )
)


def chosen_of_run(places: list[int], spec: str) -> set[int]:
    """The slow, obvious selection among the positions of one image."""
    chosen: set[int] = set()
    for term in spec.split("+"):
        if term == "all":
            chosen.update(places)
        elif term.startswith("f"):
            chosen.update(places[: int(term[1:])])
        elif term.startswith("l"):
            chosen.update(places[-int(term[1:]) :])
        elif term.startswith("uniform"):
            chosen.update(evenly(places, int(term.removeprefix("uniform"))))
        else:
            share = Fraction(term.removesuffix("%")) / 100
            chosen.update(evenly(places, max(1, half_up(share * len(places)))))
    return chosen


def evenly(places: list[int], count: int) -> list[int]:
    count = min(count, len(places))
    if count == 1:
        return [places[len(places) // 2]]
    return [places[half_up(Fraction(j * (len(places) - 1), count - 1))] for j in range(count)]


def half_up(value: Fraction) -> int:
    return floor(value + Fraction(1, 2))


def runs_of(row: list[bool]) -> list[list[int]]:
    runs: list[list[int]] = []
    for position, there in enumerate(row):
        if there and position and row[position - 1]:
            runs[-1].append(position)
        elif there:
            runs.append([position])
    return runs


def expected_mask(rows: list[list[bool]], spec: str, per_row: bool) -> list[list[bool]]:
    result = []
    for row in rows:
        everywhere = [position for position, there in enumerate(row) if there]
        runs = [everywhere] if per_row and everywhere else runs_of(row)
        chosen = set().union(*(chosen_of_run(run, spec) for run in runs))
        result.append([position in chosen for position in range(len(row))])
    return result


@PROPERTY
@given(rows=masks, spec=specs, per_row=st.booleans())
def test_every_spec_selects_what_the_slow_oracle_selects(rows: list[list[bool]], spec: str, per_row: bool) -> None:
    selected = TokenSelection.parse(spec).mask(torch.tensor(rows), per_row=per_row)
    assert selected.tolist() == expected_mask(rows, spec, per_row)


@PROPERTY
@given(length=st.integers(1, 3000), count=st.integers(1, 3000))
def test_uniform_selects_exactly_as_many_tokens_as_asked_for_and_both_ends(length: int, count: int) -> None:
    selected = TokenSelection.parse(f"uniform{count}").mask(torch.ones(1, length, dtype=torch.bool))[0]
    assert int(selected.sum()) == min(count, length)
    assert count == 1 or (bool(selected[0]) and bool(selected[-1]))
    gaps = selected.nonzero().flatten().diff()
    assert not len(gaps) or int(gaps.max() - gaps.min()) <= 1


@pytest.mark.parametrize(
    ("spec", "tokens", "expected"),
    [
        ("1%", 576, 6),
        ("1%", 256, 3),
        ("1%", 16, 1),
        ("100%", 576, 576),
        ("uniform9", 576, 9),
        ("f4+l5", 576, 9),
        ("f4+l5", 3, 3),
        ("all", 576, 576),
    ],
)
def test_the_number_of_steered_tokens_of_an_image(spec: str, tokens: int, expected: int) -> None:
    image = torch.zeros(1, tokens + 10, dtype=torch.bool)
    image[:, 5 : tokens + 5] = True
    assert int(TokenSelection.parse(spec).mask(image).sum()) == expected


def test_every_image_of_a_row_is_counted_by_itself() -> None:
    row = torch.tensor([[0, 1, 1, 1, 0, 1, 1, 0]], dtype=torch.bool)
    assert TokenSelection.parse("f1").mask(row).tolist() == [[False, True, False, False, False, True, False, False]]


def test_rows_without_candidates_select_nothing() -> None:
    for spec in ("all", "f3", "l3", "uniform3", "uniform1", "50%"):
        assert not TokenSelection.parse(spec).mask(torch.zeros(2, 5, dtype=torch.bool)).any(), spec
        assert not TokenSelection.parse(spec).mask(torch.zeros(2, 5, dtype=torch.bool), per_row=True).any(), spec


BAD_SPECS = "+ f f0 l0 uniform0 0% 101% -1% f-1 f4+ f4,l5 first4 ALL f1.5 1e2% %".split()


@pytest.mark.parametrize("spec", ["", *BAD_SPECS])
def test_a_bad_spec_is_refused_with_the_accepted_forms_or_the_reason(spec: str) -> None:
    with pytest.raises(ValueError, match=r"none of all, fN, lN, uniformN, P%|selects nothing or more than everything"):
        TokenSelection.parse(spec)


HUGE = [kind + "9" * digits for kind in ("f", "l", "uniform") for digits in (20, 400)]


@pytest.mark.parametrize("spec", HUGE, ids=lambda spec: f"{spec[:8]}, {len(spec)}")
def test_a_huge_amount_is_the_whole_image(spec: str) -> None:
    image = torch.ones(1, 7, dtype=torch.bool)
    assert TokenSelection.parse(spec).mask(image).all()


# Layers


@PROPERTY
@given(
    total=st.integers(1, 40),
    parts=st.lists(
        st.one_of(
            st.just("all"),
            st.integers(1, 9).map("every:{}".format),
            st.integers(0, 39).map(str),
            st.tuples(st.integers(0, 39), st.integers(0, 39)).map(lambda ends: f"{min(ends)}-{max(ends)}"),
        ),
        min_size=1,
        max_size=4,
    ),
)
def test_every_layers_spec_names_what_the_slow_oracle_names(total: int, parts: list[str]) -> None:
    named: set[int] = set()
    for part in parts:
        if part == "all":
            named.update(range(total))
        elif part.startswith("every:"):
            named.update(layer for layer in range(total) if layer % int(part[6:]) == 0)
        else:
            first, _, last = part.partition("-")
            named.update(range(int(first), int(last or first) + 1))
    if any(layer >= total for layer in named):
        with pytest.raises(ValueError, match=f"the last of {total}"):
            parse_layers(",".join(parts), total)
    else:
        assert parse_layers(",".join(parts), total) == sorted(named)


@pytest.mark.parametrize("spec", ["", ",", "0,", "a", "-1", "1-", "0--3", "every:0", "every:", "every", "0.5", "ALL"])
def test_bad_layers_are_refused_with_the_accepted_forms(spec: str) -> None:
    for total in (None, 8):
        with pytest.raises(ValueError, match="none of all, N, A-B, every:K"):
            parse_layers(spec, total)


def test_layers_that_run_backwards_are_refused_with_the_right_order() -> None:
    with pytest.raises(ValueError, match="write 3-7"):
        parse_layers("7-3")


def test_a_huge_range_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match="the last of 8"):
        parse_layers("0-99999999999999", 8)
    parse_layers("0-99999999999999")
