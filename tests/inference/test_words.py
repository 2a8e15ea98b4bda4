"""Tokens are grouped into the words that blanks separate, whatever the pieces (`inference/words.py`)."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_llava import TinyLlava

from llava_steering_plugin.inference.words import group_words


@pytest.mark.parametrize("text", ["red", "It is red.", "a 42 zebra", "Ünï 日本 x", "  two   blanks", "one\nline, two"])
def test_words_hold_all_tokens_in_order_and_spell_the_text(tiny: TinyLlava, patched_llava: Path, text: str) -> None:
    from transformers import LlamaTokenizer

    tokenizer = LlamaTokenizer.from_pretrained(tiny.llava)
    ids = tokenizer(text, add_special_tokens=False).input_ids
    words = group_words(tokenizer, ids)
    assert [word.text for word in words] == text.split()
    assert [number for word in words for number in word.tokens] == list(range(len(ids)))
    for word in words:
        assert tokenizer.decode([ids[number] for number in word.tokens]).strip() == word.text


def test_the_end_of_a_text_belongs_to_its_last_word_and_no_text_has_none(tiny: TinyLlava, patched_llava: Path) -> None:
    from transformers import LlamaTokenizer

    tokenizer = LlamaTokenizer.from_pretrained(tiny.llava)
    ids = [*tokenizer("is red", add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    assert group_words(tokenizer, ids)[-1].tokens[-1] == len(ids) - 1
    assert group_words(tokenizer, []) == group_words(tokenizer, [tokenizer.eos_token_id]) == []
