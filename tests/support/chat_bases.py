"""Bases of transformers' own classes in folders, with a processor each, and easy-VQA as messages with images.

The models are tiny and have random weights; the tokenizer knows bytes; the pictures are real ones, of 64 x 64 pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from placeholders import TEXT, VISION

IMAGE_TOKEN, VIDEO_TOKEN, PAD_TOKEN, END = "<image>", "<video>", "<pad>", "</s>"
SPECIAL = [PAD_TOKEN, "<s>", END, IMAGE_TOKEN, VIDEO_TOKEN, "<|vision_start|>", "<|vision_end|>"]
IMAGE_SIZE, PATCH = 32, 8
# A turn is its role, its images and its text; an answer ends with the end token.
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: "
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}MARK{% elif part['type'] == 'video' %}FILM"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{% if message['role'] == 'assistant' %}</s>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def tokenizer() -> Any:
    """A byte-level tokenizer without merges: every byte is a token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({letter: number for number, letter in enumerate(SPECIAL + letters)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(SPECIAL)
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token=PAD_TOKEN,
        bos_token="<s>",
        eos_token=END,
        padding_side="left",
        extra_special_tokens={"image_token": IMAGE_TOKEN, "video_token": VIDEO_TOKEN},
    )


def _text(words: Any) -> dict[str, Any]:
    ids = {f"{name}_token_id": words.convert_tokens_to_ids(token) for name, token in (("pad", PAD_TOKEN), ("eos", END))}
    return TEXT | {"vocab_size": len(words), "max_position_embeddings": 1024} | ids


def _vision() -> dict[str, Any]:
    return VISION | {"image_size": IMAGE_SIZE, "patch_size": PATCH}


def _square(kind: str) -> Any:
    import transformers

    size = {"shortest_edge": IMAGE_SIZE} if kind.startswith("Clip") or kind.startswith("CLIP") else None
    made: Any = getattr(transformers, kind)
    return made(
        size=size or {"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
    )


def llava(folder: Path) -> None:
    from transformers import (
        CLIPImageProcessor,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )

    words = tokenizer()
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**_vision()),
        text_config=LlamaConfig(**_text(words)),
        image_token_index=words.convert_tokens_to_ids(IMAGE_TOKEN),
    )
    images = CLIPImageProcessor(size={"shortest_edge": IMAGE_SIZE}, crop_size=size)
    processor = LlavaProcessor(
        images,
        words,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE.replace("MARK", IMAGE_TOKEN).replace("FILM", VIDEO_TOKEN),
    )
    _write(LlavaForConditionalGeneration, config, processor, folder)


def llava_next(folder: Path) -> None:
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaNextConfig,
        LlavaNextForConditionalGeneration,
        LlavaNextImageProcessor,
        LlavaNextProcessor,
    )

    words = tokenizer()
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    grid = [[IMAGE_SIZE, 2 * IMAGE_SIZE], [2 * IMAGE_SIZE, IMAGE_SIZE], [2 * IMAGE_SIZE, 2 * IMAGE_SIZE]]
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(**_vision()),
        text_config=LlamaConfig(**_text(words)),
        image_token_index=words.convert_tokens_to_ids(IMAGE_TOKEN),
        image_grid_pinpoints=grid,
    )
    images = LlavaNextImageProcessor(size={"shortest_edge": IMAGE_SIZE}, crop_size=size, image_grid_pinpoints=grid)
    processor = LlavaNextProcessor(
        images,
        words,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE.replace("MARK", IMAGE_TOKEN).replace("FILM", VIDEO_TOKEN),
    )
    _write(LlavaNextForConditionalGeneration, config, processor, folder)


def llava_onevision(folder: Path) -> None:
    from transformers import (
        LlavaOnevisionConfig,
        LlavaOnevisionForConditionalGeneration,
        LlavaOnevisionImageProcessor,
        LlavaOnevisionProcessor,
        LlavaOnevisionVideoProcessor,
        Qwen2Config,
        SiglipVisionConfig,
    )

    words = tokenizer()
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    grid = [[IMAGE_SIZE, 2 * IMAGE_SIZE], [2 * IMAGE_SIZE, IMAGE_SIZE], [2 * IMAGE_SIZE, 2 * IMAGE_SIZE]]
    config = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(**_vision(), vision_use_head=False),
        text_config=Qwen2Config(**_text(words)),
        image_token_index=words.convert_tokens_to_ids(IMAGE_TOKEN),
        video_token_index=words.convert_tokens_to_ids(VIDEO_TOKEN),
        image_grid_pinpoints=grid,
    )
    processor = LlavaOnevisionProcessor(
        LlavaOnevisionImageProcessor(size=size, image_grid_pinpoints=grid),
        words,
        LlavaOnevisionVideoProcessor(size=size),
        num_image_tokens=(IMAGE_SIZE // PATCH) ** 2,
        vision_feature_select_strategy="full",
        chat_template=TEMPLATE.replace("MARK", IMAGE_TOKEN).replace("FILM", VIDEO_TOKEN),
    )
    _write(LlavaOnevisionForConditionalGeneration, config, processor, folder)


def _qwen(kind: str, folder: Path, vision: dict[str, Any]) -> None:
    import transformers

    words = tokenizer()
    numbers = dict(zip(SPECIAL, words.convert_tokens_to_ids(SPECIAL), strict=True))
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
    config = getattr(transformers, f"{kind}Config")(
        text_config=_text(words) | {"rope_parameters": rope},
        vision_config=vision,
        image_token_id=numbers[IMAGE_TOKEN],
        video_token_id=numbers[VIDEO_TOKEN],
        vision_start_token_id=numbers["<|vision_start|>"],
        vision_end_token_id=numbers["<|vision_end|>"],
    )
    how = {"patch_size": 4, "merge_size": 2, "temporal_patch_size": 2}
    limits = {"min_pixels": 64, "max_pixels": IMAGE_SIZE**2}
    images = transformers.Qwen2VLImageProcessor(**how, **limits)
    videos = transformers.Qwen2VLVideoProcessor(**how, **limits)
    marks = {"MARK": IMAGE_TOKEN, "FILM": VIDEO_TOKEN}
    template = TEMPLATE
    for name, mark in marks.items():
        template = template.replace(name, f"<|vision_start|>{mark}<|vision_end|>")
    processor = getattr(transformers, f"{kind}Processor")(images, words, videos, chat_template=template)
    _write(getattr(transformers, f"{kind}ForConditionalGeneration"), config, processor, folder)


def qwen2_vl(folder: Path) -> None:
    vision = {
        "depth": 2,
        "embed_dim": 32,
        "hidden_size": 32,
        "num_heads": 4,
        "mlp_ratio": 2,
        "patch_size": 4,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    }
    _qwen("Qwen2VL", folder, vision)


def qwen2_5_vl(folder: Path) -> None:
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 4,
        "patch_size": 4,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "out_hidden_size": 32,
        "window_size": 16,
        "fullatt_block_indexes": [1],
    }
    _qwen("Qwen2_5_VL", folder, vision)


BASES: dict[str, Callable[[Path], None]] = {
    "Llava": llava,
    "LlavaNext": llava_next,
    "LlavaOnevision": llava_onevision,
    "Qwen2-VL": qwen2_vl,
    "Qwen2.5-VL": qwen2_5_vl,
}


def _write(kind: Any, config: Any, processor: Any, folder: Path) -> None:
    torch.manual_seed(0)
    kind(config).save_pretrained(folder)
    processor.save_pretrained(folder)


def samples(count: int, *, asked: bool = False) -> list[dict[str, Any]]:
    """The first `count` training samples of easy-VQA as `images` with `messages`.

    Args:
        count: of the samples.
        asked: as `prompt` and `completion`, so that only the answer is learned.
    """
    import easy_vqa
    from PIL import Image

    questions, answers, numbers = easy_vqa.get_train_questions()
    paths = easy_vqa.get_train_image_paths()
    found = []
    for question, answer, number in list(zip(questions, answers, numbers, strict=True))[:count]:
        turns: list[dict[str, Any]] = [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]},
            {"role": "assistant", "content": [{"type": "text", "text": answer}]},
        ]
        with Image.open(paths[number]) as picture:
            entry: dict[str, Any] = {"images": [picture.convert("RGB")]}
        found.append(entry | ({"prompt": turns[:1], "completion": turns[1:]} if asked else {"messages": turns}))
    return found


class Collator:
    """Makes a batch of entries of `samples`, with the text of the answers as what is to be learned."""

    def __init__(self, processor: Any):
        self.processor = processor

    def __call__(self, entries: list[dict[str, Any]]) -> dict[str, Any]:
        words = self.processor.tokenizer
        texts = [self.processor.apply_chat_template(entry["messages"]) for entry in entries]
        images = [entry["images"] for entry in entries]
        batch: dict[str, Any] = dict(self.processor(images=images, text=texts, padding=True, return_tensors="pt"))
        labels = torch.full_like(batch["input_ids"], -100)
        for row, entry in enumerate(entries):
            answer = words(entry["messages"][-1]["content"][0]["text"] + END)["input_ids"]
            labels[row, -len(answer) - 1 : -1] = torch.tensor(answer)  # before the line's end
        return batch | {"labels": labels}
