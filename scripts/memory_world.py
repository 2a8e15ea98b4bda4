"""A random LLaVA and what it is trained on, of the size at which scripts/measure_memory.py measures."""

from __future__ import annotations

import json
from pathlib import Path


def write_world(folder: Path) -> None:
    """A random LLaVA of about 100 million parameters, its tower, a tokenizer, one picture and long conversations."""
    import sentencepiece
    from llava.model.language_model.llava_llama import LlavaConfig, LlavaLlamaForCausalLM
    from PIL import Image
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel, LlamaTokenizer

    words = [a + b for a in ("ba", "do", "ki", "lu", "me") for b in ("ra", "so", "ti", "nu", "ge")]
    tokenizer_folder = folder / "llava-random"
    tokenizer_folder.mkdir()
    with (tokenizer_folder / "tokenizer.model").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter([" ".join(words), "USER: ASSISTANT: A chat between a human and an assistant."] * 50),
            model_writer=file,
            vocab_size=400,
            byte_fallback=True,
            hard_vocab_limit=False,
            minloglevel=2,
        )
    LlamaTokenizer(str(tokenizer_folder / "tokenizer.model")).save_pretrained(tokenizer_folder)
    size = {"height": 224, "width": 224}
    CLIPImageProcessor(size={"shortest_edge": 224}, crop_size=size).save_pretrained(folder / "tower")
    tower = CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=224,
        patch_size=14,
    )
    CLIPVisionModel(tower).save_pretrained(folder / "tower")
    config = LlavaConfig(
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=8,
        num_attention_heads=12,
        vocab_size=32_000,
        max_position_embeddings=2048,
        mm_vision_tower=str(folder / "tower"),
        mm_hidden_size=128,
        mm_projector_type="mlp2x_gelu",
        mm_vision_select_layer=-2,
        mm_vision_select_feature="patch",
        mm_use_im_start_end=False,
        mm_use_im_patch_token=False,
    )
    LlavaLlamaForCausalLM(config).half().save_pretrained(tokenizer_folder)
    Image.new("RGB", (224, 224), (90, 120, 30)).save(folder / "picture.png")
    turns = [
        {"from": "human", "value": "<image>\n" + words[0]},
        {"from": "gpt", "value": " ".join(words * 40)},  # longer than any row may be, so that all rows are full
    ]
    samples = [{"id": str(number), "image": "picture.png", "conversations": turns} for number in range(16)]
    (folder / "data.json").write_text(json.dumps(samples), encoding="utf-8")
