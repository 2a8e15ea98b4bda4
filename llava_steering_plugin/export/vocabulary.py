"""The tokenizer of a model in the other layout, and the rows of its embedding and head.

LLaVA has no token for an image: it cuts the prompt at "<image>" and puts features there. transformers' Llava has one,
"<image>", behind all others. No model has learned the rows of that token, and of those that fill the embedding up to a
multiple of 64. Each is the mean of all others: in the embedding no row of zeros, which transformers 4.37 would take for
the place of an image; in the head a logit that is the mean of all others, so that no answer ever holds these tokens.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llava_steering_plugin.errors import ArgumentsError
from llava_steering_plugin.foreign_files import read_json

IMAGE = "<image>"
ROWS_OF = 64
TOKENIZER = "tokenizer.model"
TOKENIZER_CONFIG, SPECIAL_TOKENS = "tokenizer_config", "special_tokens_map"
_CONFIG, _SPECIAL = f"{TOKENIZER_CONFIG}.json", f"{SPECIAL_TOKENS}.json"
# What exports add: ours the first, llava-hf's both.
_ADDED = {IMAGE, "<pad>"}


@dataclass(frozen=True)
class Vocabulary:
    """The numbers of a vocabulary with a token for images.

    Attributes:
        image: id of that token.
        pad: id of the token that fills up batches.
        tokens: of the tokenizer.
    """

    image: int
    pad: int
    tokens: int

    def rows(self, before: int) -> int:
        """Return how many rows the embedding has that had `before`."""
        return before if self.tokens <= before else -(-self.tokens // ROWS_OF) * ROWS_OF


def llavas_tokenizer(folder: Path) -> Any:
    """Return a LLaVA's tokenizer as its own programs load it.

    Raises:
        ArgumentsError: it is not there, or is none of Llama's, which LlavaProcessor takes alone.
    """
    from transformers import AutoTokenizer, LlamaTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, use_fast=False)
    except (OSError, ValueError, TypeError, RuntimeError, ImportError) as error:
        raise ArgumentsError(f"the tokenizer in {folder} cannot be loaded: {error}") from error
    if not isinstance(tokenizer, LlamaTokenizer):
        raise ArgumentsError(
            f"the tokenizer in {folder} is a {type(tokenizer).__name__}, and transformers' LlavaProcessor takes Llama's"
        )
    return tokenizer


def with_image_token(folder: Path, target: Path, template: str, processor: str = "LlavaProcessor") -> Vocabulary:
    """Write the tokenizer in `folder` with a token for images and a chat template into `target`.

    Both kinds are written, the one in Python and the fast one. They begin every piece of text behind a special token
    with a space, as LLaVA does behind an image.

    Args:
        processor: transformers' class that takes it.
    """
    from transformers import AddedToken, LlamaTokenizer, LlamaTokenizerFast

    slow = LlamaTokenizer.from_pretrained(folder, legacy=True, padding_side="left")
    if IMAGE not in slow.get_vocab():
        slow.add_tokens([AddedToken(IMAGE, special=True, normalized=False)], special_tokens=True)
    if slow.pad_token is None:
        slow.pad_token = slow.unk_token  # as LLaVA's training does
    slow.chat_template = template
    slow.save_pretrained(target)
    LlamaTokenizerFast.from_pretrained(target, from_slow=True).save_pretrained(target)
    described = read_json(target / _CONFIG) | {"tokenizer_class": "LlamaTokenizer", "legacy": True}
    described["processor_class"] = processor
    _write(target / _CONFIG, described)
    return Vocabulary(slow.convert_tokens_to_ids(IMAGE), slow.pad_token_id, len(slow))


def without_image_token(folder: Path, target: Path, recorded: Mapping[str, Any]) -> int:
    """Write transformers' tokenizer in `folder` into `target` as LLaVA wants it; return how many tokens it has.

    Args:
        recorded: by name, the settings of the LLaVA from which the model was exported; empty if it was not.

    Raises:
        ArgumentsError: it has no tokenizer.model, or tokens behind the one for images.
    """
    if not (folder / TOKENIZER).is_file():
        raise ArgumentsError(f"{folder} has no {TOKENIZER}, which LLaVA's programs read. Copy it from its base.")
    try:
        config = read_json(folder / _CONFIG)
        added = {int(number): token["content"] for number, token in config.get("added_tokens_decoder", {}).items()}
    except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:
        raise ArgumentsError(f"{folder / _CONFIG} cannot be read: {error}. Copy the model again.") from error
    gone = {number for number, content in added.items() if content in _ADDED}
    later = [added[number] for number in sorted(added) if gone and number > min(gone) and number not in gone]
    if later:
        raise ArgumentsError(
            f"the tokenizer in {folder} has tokens behind {IMAGE}: {', '.join(later)}. LLaVA has no {IMAGE}, so that "
            "they would have other numbers there."
        )
    shutil.copyfile(folder / TOKENIZER, target / TOKENIZER)
    if recorded.get(TOKENIZER_CONFIG):
        for name in (TOKENIZER_CONFIG, SPECIAL_TOKENS):
            _write(target / f"{name}.json", recorded.get(name, {}))
        return len(llavas_tokenizer(target))
    contents = {added[number] for number in gone}
    for key in ("chat_template", "processor_class", "extra_special_tokens", "image_token", "backend", "is_local"):
        config.pop(key, None)
    config["added_tokens_decoder"] = {str(number): _token(config, number) for number in added if number not in gone}
    config |= {"padding_side": "right", "tokenizer_class": "LlamaTokenizer"}
    config["legacy"] = config.get("legacy", True)
    _without(config, contents)
    _write(target / _CONFIG, config)
    if (folder / _SPECIAL).is_file():
        special = read_json(folder / _SPECIAL)
        _without(special, contents)
        _write(target / _SPECIAL, special)
    return len(llavas_tokenizer(target))


def more_rows(rows: int, learned: int) -> Callable[[Tensor], Tensor]:
    """Return what gives a matrix [learned or more, width] its rows [rows, width]: means of the first `learned` ones."""

    def change(matrix: Tensor) -> Tensor:
        if matrix.shape[0] >= rows:
            return matrix
        mean = matrix[:learned].mean(0, dtype=torch.float32).to(matrix.dtype)
        return torch.cat([matrix, mean.expand(rows - matrix.shape[0], -1)])

    return change


def _token(config: Mapping[str, Any], number: int) -> Any:
    return config["added_tokens_decoder"][str(number)]


def _without(described: dict[str, Any], contents: set[str]) -> None:
    """Take tokens out of the roles that they have; what fills up batches is then "<unk>", as in LLaVA's training."""
    for role, value in list(described.items()):
        content = value.get("content") if isinstance(value, dict) else value
        if role == "additional_special_tokens":
            described[role] = [
                each for each in value if (each["content"] if isinstance(each, dict) else each) not in contents
            ]
        elif isinstance(content, str) and content in contents:
            described[role] = described.get("unk_token", "<unk>")


def _write(path: Path, data: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
