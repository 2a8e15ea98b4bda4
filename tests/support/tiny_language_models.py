"""Tiny random language models of other families than Llama, with tokenizers of their own kinds, for the tiny LLaVA.

Byte-level BPE like the real ones: trained on the tiny LLaVA's sentences, with the same special tokens and classes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tiny_llava import HIDDEN, SYSTEM, TinyLlava

# As in the repositories of Qwen/Qwen2.5-0.5B-Instruct and HuggingFaceTB/SmolLM2-135M-Instruct, without tools.
QWEN2_5 = (
    "{%- if messages[0]['role'] == 'system' %}{{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}"
    "{%- else %}{{- '<|im_start|>system\\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant."
    "<|im_end|>\\n' }}{%- endif %}{%- for message in messages %}{{- '<|im_start|>' + message.role + '\\n' + "
    "message.content + '<|im_end|>' + '\\n' }}{%- endfor %}{%- if add_generation_prompt %}"
    "{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
QWEN2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
    "You are a helpful assistant.<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + "
    "message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SMOLLM2 = QWEN2.replace(
    "You are a helpful assistant.", "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + "
    "' [/INST]' }}{% else %}{{ ' ' + message['content'] + eos_token}}{% endif %}{% endfor %}"
)
# As in the repositories of google/gemma-2b-it, microsoft/Phi-3-mini-4k-instruct, stabilityai/stablelm-2-zephyr-1_6b and
# Qwen/Qwen3-4B-Instruct-2507, without tools and system prompts.
GEMMA = (
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'assistant') %}{% set role = 'model' %}"
    "{% else %}{% set role = message['role'] %}{% endif %}{{ '<start_of_turn>' + role + '\n' + message['content'] | "
    "trim + '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"
)
PHI3 = (
    "{% for message in messages %}{% if message['role'] == 'user' %}{{'<|user|>\n' + message['content'] + '<|end|>\n'}}"
    "{% elif message['role'] == 'assistant' %}{{'<|assistant|>\n' + message['content'] + '<|end|>\n'}}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
STABLELM = (
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ '<|user|>\n' + message['content'] + eos_token }}"
    "{% elif message['role'] == 'assistant' %}{{ '<|assistant|>\n'  + message['content'] + eos_token }}{% endif %}"
    "{{ '\n' }}{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}{% endfor %}"
)
QWEN3 = (
    "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)


@dataclass(frozen=True)
class Family:
    """A kind of language model.

    Attributes:
        name: of its component.
        version: the conversation template that it is trained with.
        config, tokenizer: classes of transformers.
        sizes: of the model, beside those that all have.
        tokens: special tokens by their attribute.
        further: special tokens without one.
        template: the tokenizer's chat template.
        spare: rows of the embeddings without a token.
    """

    name: str
    version: str
    config: str
    tokenizer: str
    sizes: dict[str, Any] = field(default_factory=dict)
    tokens: dict[str, str | None] = field(default_factory=dict)
    further: tuple[str, ...] = ()
    template: str | None = None
    spare: int = 7

    @property
    def hosts(self) -> int:
        """How many linears a layer has."""
        return {"phi": 6, "phi3": 4}.get(self.name, 7)


ENDS = "<|endoftext|>"
FAMILIES = (
    Family(
        "phi",
        "phi",
        "PhiConfig",
        "CodeGenTokenizer",
        # Of each head of Phi-2, two fifths are rotated; here half.
        {"partial_rotary_factor": 0.5, "hidden_act": "gelu_new"},
        {"bos_token": ENDS, "eos_token": ENDS, "unk_token": ENDS},
    ),
    Family(
        "qwen2",
        "qwen2_5",
        "Qwen2Config",
        "Qwen2Tokenizer",
        {"num_key_value_heads": 2, "tie_word_embeddings": True, "use_sliding_window": False},
        {"bos_token": None, "eos_token": "<|im_end|>", "unk_token": None, "pad_token": ENDS},
        ("<|im_start|>",),
        QWEN2_5,
    ),
    Family(
        "smollm2",
        "smollm2",
        "LlamaConfig",
        "GPT2Tokenizer",
        {"num_key_value_heads": 2, "tie_word_embeddings": True, "rope_theta": 100000.0},
        {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "unk_token": ENDS, "pad_token": "<|im_end|>"},
        (),
        SMOLLM2,
    ),
    Family(
        "mistral",
        "mistral_instruct",
        "MistralConfig",
        "LlamaTokenizer",
        {"num_key_value_heads": 2, "sliding_window": 24},
        {},
        (),
        MISTRAL,
        spare=0,
    ),
)
# Those of a newer transformers than LLaVA's pin.
NEWER = (
    Family(
        "gemma",
        "gemma",
        "GemmaConfig",
        "GemmaTokenizerFast",
        # Heads that are wider than the model's width allows.
        {"num_key_value_heads": 1, "head_dim": 32, "tie_word_embeddings": True},
        {},
        ("<start_of_turn>", "<end_of_turn>"),
        GEMMA,
    ),
    Family(
        "stablelm",
        "stablelm",
        "StableLmConfig",
        "GPT2Tokenizer",
        {"num_key_value_heads": 4, "partial_rotary_factor": 0.25, "use_qkv_bias": True},
        {"bos_token": ENDS, "eos_token": ENDS, "unk_token": ENDS, "pad_token": ENDS},
        (),
        STABLELM,
    ),
    Family(
        "phi3",
        "phi3",
        "Phi3Config",
        "LlamaTokenizer",
        {"num_key_value_heads": 2, "sliding_window": 24},
        {"eos_token": ENDS, "pad_token": ENDS},
        ("<|assistant|>", "<|end|>", "<|user|>"),
        PHI3,
    ),
    Family(
        "qwen3",
        "qwen3",
        "Qwen3Config",
        "Qwen2Tokenizer",
        {"num_key_value_heads": 2, "head_dim": 32, "tie_word_embeddings": True},
        {"bos_token": None, "eos_token": "<|im_end|>", "unk_token": None, "pad_token": ENDS},
        ("<|im_start|>",),
        QWEN3,
    ),
)


def build(family: Family, tiny: TinyLlava, folder: Path) -> Path:
    """Write a plain language model of a family with its tokenizer into `folder`, and return it."""
    import torch
    import transformers

    folder.mkdir(parents=True)
    tokenizer = _tokenizer(family, tiny, folder)
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    ids["bos_token_id"] = ids["eos_token_id"] if ids["bos_token_id"] is None else ids["bos_token_id"]
    config = getattr(transformers, family.config)(
        vocab_size=len(tokenizer) + family.spare,
        hidden_size=HIDDEN,
        intermediate_size=2 * HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=2048,
        initializer_range=HIDDEN**-0.5,
        **ids,
        **family.sizes,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = transformers.AutoModelForCausalLM.from_config(config)
        model.get_input_embeddings().weight.data.normal_(0, 0.5)
        for parameter in model.parameters():
            if parameter.dim() == 1:  # biases and norms that matter, as trained ones do
                parameter.data.add_(torch.randn_like(parameter) * 0.1)
    model.half().save_pretrained(folder)
    return folder


def _tokenizer(family: Family, tiny: TinyLlava, folder: Path) -> Any:
    import transformers

    kind = getattr(transformers, family.tokenizer)
    if family.tokenizer == "LlamaTokenizer":
        made = kind.from_pretrained(tiny.llm, **family.tokens)
    elif family.tokenizer == "GemmaTokenizerFast":
        made = kind(str(tiny.llm / "tokenizer.model"), **family.tokens)
    else:
        from tokenizers import ByteLevelBPETokenizer

        trained = ByteLevelBPETokenizer()
        trained.train_from_iterator(_sentences(tiny), vocab_size=600, min_frequency=2, special_tokens=[ENDS])
        trained.save_model(str(folder))
        made = kind(str(folder / "vocab.json"), str(folder / "merges.txt"), **family.tokens)
    made.add_special_tokens({"additional_special_tokens": list(family.further)})
    made.chat_template = family.template
    made.save_pretrained(folder)
    return made


def _sentences(tiny: TinyLlava) -> Iterator[str]:
    for _ in range(20):
        yield f"{SYSTEM} USER: What? ASSISTANT: system user assistant You are Qwen, created by Alibaba Cloud."
        yield "It has three sides.\n\nIt is red.\n\n\n"  # line breaks are merged, as in the real ones
    for sample in json.loads(tiny.data.read_text()):
        for turn in sample["conversations"]:
            yield turn["value"].replace("<image>\n", "")


THREE_TURNS = [
    {"from": "human", "value": "<image>\nWhat color is the circle?"},
    {"from": "gpt", "value": "It is red."},
    {"from": "human", "value": "What shape is it?"},
    {"from": "gpt", "value": "A circle."},
    {"from": "human", "value": "Is it a circle?"},
    {"from": "gpt", "value": "Yes."},
]
