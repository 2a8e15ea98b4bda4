"""Normalise short answers as the VQA benchmarks do, before they are compared.

Source: VQA (arXiv 1505.00468) and its evaluation code (github.com/GT-Vision-Lab/VQA, `vqaEval.py`); the variant of
TextVQA's evaluation server is in github.com/facebookresearch/mmf, and in LLaVA as `llava.eval.m4c_evaluator`.
"""

from __future__ import annotations

import re
from functools import lru_cache

NUMBERS = {
    word: str(value)
    for value, word in enumerate(
        ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
    )
} | {"none": "0"}
ARTICLES = {"a", "an", "the"}
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'

# The right spellings; what is looked for is each of them without one of its apostrophes.
_CONTRACTIONS = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
    he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've
    o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
    someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've
    there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's
    what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've
    wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""


def _contractions() -> dict[str, str]:
    found = {"somebody'd": "somebodyd"}  # so it stands in the official table
    for right in _CONTRACTIONS.split():
        for place, character in enumerate(right):
            if character == "'":
                found[right[:place] + right[place + 1 :]] = right
    return found


CONTRACTIONS = _contractions()

_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_MARK = re.compile(f"[{re.escape(PUNCTUATION)}]")
_PERIOD = re.compile(r"\.(?!\d)")
_MOST_PERIODS = 32  # the official code gives a flag in the place of this count, and so it is one


def one_line(text: str) -> str:
    """Return a text with line ends and tabs as spaces, and none around it."""
    return text.replace("\n", " ").replace("\t", " ").strip()


def without_punctuation(text: str) -> str:
    """Drop or blank punctuation.

    A mark goes if it stands beside a space anywhere in the text, and all marks go if a number has a comma in it; other
    marks become spaces. Periods go unless a digit follows.
    """
    if _MARK.search(text) is None:  # as in most answers
        return _PERIOD.sub("", text, count=_MOST_PERIODS)
    number = _COMMA_IN_NUMBER.search(text) is not None
    cleaned = text
    for mark in PUNCTUATION:
        gone = number or f"{mark} " in text or f" {mark}" in text
        cleaned = cleaned.replace(mark, "" if gone else " ")
    return _PERIOD.sub("", cleaned, count=_MOST_PERIODS)


def without_articles(text: str) -> str:
    """Return the words in lower case, number words as digits, contractions spelled right, without articles."""
    words = (NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


@lru_cache(maxsize=1 << 16)  # annotators give the same few thousand answers
def vqa_answer(text: str) -> str:
    """Normalise as VQA's evaluation does where its annotators disagree."""
    return without_articles(without_punctuation(one_line(text)))


def textvqa_answer(text: str) -> str:
    """Normalise as TextVQA's evaluation server does, and as LLaVA does before it submits answers to any VQA server."""
    plain = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return vqa_answer(plain)
