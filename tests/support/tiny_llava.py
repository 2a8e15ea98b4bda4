"""A tiny but real LLaVA: every file that upstream's own scripts read, made from a seed in a few seconds.

Upstream's code needs real things: a sentencepiece tokenizer, a CLIP tower on disk, checkpoints in its own format,
images. `build(root)` writes them all; `training_runs.py` trains with them.

From a shell: `python tests/support/tiny_llava.py DIR`.
"""

from __future__ import annotations

import io
import json
import random
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HIDDEN = 64
LAYERS = 4
IMAGE_SIDE = 56
PATCH = 14
VISUAL_TOKENS = (IMAGE_SIDE // PATCH) ** 2
PIECES = 700

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
COLOURS = {"red": (220, 40, 30), "green": (30, 180, 60), "blue": (40, 60, 220), "yellow": (230, 210, 40)}
SHAPES = ("circle", "rectangle", "triangle")
SIZES = ((56, 56), (80, 48), (40, 72), (64, 64), (120, 56))


@dataclass(frozen=True)
class TinyLlava:
    """Where the parts are.

    Attributes:
        llm: a plain Llama with its tokenizer, no vision.
        llava: a full checkpoint over the same Llama (model_type llava_llama), with the weights of `projector`.
        projector: an mm_projector.bin as upstream's stage 1 writes it, for `--pretrain_mm_mlp_adapter`.
        tower: CLIP vision model and image processor, 16 visual tokens an image.
        data: train.json, 24 conversations: with an image, text-only, of one turn and of several.
        captions: pretrain.json for stage 1, one image and one caption each.
        images: the folder with the images that both name.
        questions: question.jsonl of upstream's eval scripts.
    """

    root: Path

    @property
    def llm(self) -> Path:
        return self.root / "tiny-vicuna"

    @property
    def llava(self) -> Path:
        # "llava" and "v1" are what upstream's loader and chat look for in the name.
        return self.root / "llava-v1.5-tiny"

    @property
    def projector(self) -> Path:
        return self.root / "llava-v1.5-tiny-pretrain" / "mm_projector.bin"

    @property
    def tower(self) -> Path:
        return self.root / "clip-tiny"

    @property
    def data(self) -> Path:
        return self.root / "train.json"

    @property
    def captions(self) -> Path:
        return self.root / "pretrain.json"

    @property
    def images(self) -> Path:
        return self.root / "images"

    @property
    def questions(self) -> Path:
        return self.root / "question.jsonl"


def build(root: Path, seed: int = 0) -> TinyLlava:
    """Writes the tiny LLaVA below `root`, the same bytes for the same seed, and returns its paths."""
    tiny = TinyLlava(Path(root).resolve())
    tiny.root.mkdir(parents=True, exist_ok=True)
    _write_images_and_conversations(tiny, random.Random(seed))
    _write_tower(tiny, seed)
    _write_language_models(tiny, seed)
    return tiny


def _write_images_and_conversations(tiny: TinyLlava, rng: random.Random) -> None:
    from PIL import Image, ImageDraw

    tiny.images.mkdir(exist_ok=True)
    samples: list[dict[str, Any]] = []
    captions: list[dict[str, Any]] = []
    questions: list[dict[str, Any]] = []
    for number in range(24):
        shape, colour = rng.choice(SHAPES), rng.choice(sorted(COLOURS))
        ask_colour = f"What color is the {shape}?"
        ask_shape = f"What shape is {colour}?"
        if number % 6 == 5:
            sides = {"circle": "zero", "rectangle": "four", "triangle": "three"}[shape]
            turns = [(f"How many sides does a {shape} have?", f"It has {sides} sides.")]
            if number % 4 == 3:
                turns.append(("Thank you.", "You are welcome."))
            samples.append({"id": f"text-{number}", "conversations": _conversation(turns)})
            continue
        name = f"{number:02d}.png"
        width, height = SIZES[number % len(SIZES)]
        image = Image.new("RGB", (width, height), tuple(rng.randrange(100, 256) for _ in range(3)))
        _draw(ImageDraw.Draw(image), shape, COLOURS[colour], width, height)
        image.save(tiny.images / name)
        turns = [("<image>\n" + ask_colour, f"It is {colour}.")]
        if number % 3 == 0:
            turns.append((ask_shape, f"A {shape}."))
        if number % 9 == 0:
            turns.append((f"Is it a {shape}?", "Yes."))
        samples.append({"id": f"image-{number}", "image": name, "conversations": _conversation(turns)})
        caption = [("Describe the picture.\n<image>", f"A {colour} {shape}.")]
        captions.append({"id": f"caption-{number}", "image": name, "conversations": _conversation(caption)})
        if len(questions) < 6:
            text = ask_colour if number % 2 else ask_shape
            questions.append({"question_id": number, "image": name, "text": text, "category": "shape"})
    tiny.data.write_text(json.dumps(samples, indent=1))
    tiny.captions.write_text(json.dumps(captions, indent=1))
    tiny.questions.write_text("".join(json.dumps(question) + "\n" for question in questions))


def _conversation(turns: Sequence[tuple[str, str]]) -> list[dict[str, str]]:
    return [
        {"from": speaker, "value": value}
        for turn in turns
        for speaker, value in zip(("human", "gpt"), turn, strict=True)
    ]


def _draw(draw: Any, shape: str, colour: tuple[int, int, int], width: int, height: int) -> None:
    box = (width // 6, height // 6, width * 5 // 6, height * 5 // 6)
    if shape == "circle":
        draw.ellipse(box, fill=colour)
    elif shape == "rectangle":
        draw.rectangle(box, fill=colour)
    else:
        draw.polygon([(box[0], box[3]), (box[2], box[3]), ((box[0] + box[2]) // 2, box[1])], fill=colour)


def _sentences(tiny: TinyLlava) -> Iterator[str]:
    # The system prompt many times over: it then costs about 30 pieces in every prompt, not 100.
    for _ in range(100):
        yield SYSTEM + " USER: What color is this? ASSISTANT:"
    for sample in json.loads(tiny.data.read_text()):
        for turn in sample["conversations"]:
            yield turn["value"].replace("<image>\n", "")
    counts = ("zero", "one", "two", "three", "four")
    for colour in sorted(COLOURS):
        for shape in SHAPES:
            for count in counts:
                yield f"There are {count} {colour} shapes in the picture, one of them is a {shape}."
                yield f"USER: Is there a {colour} {shape}? ASSISTANT: Yes, a {colour} {shape} with {count} friends."


def _write_tower(tiny: TinyLlava, seed: int) -> None:
    import torch
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

    config = CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=IMAGE_SIDE,
        patch_size=PATCH,
        projection_dim=64,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        CLIPVisionModel(config).save_pretrained(tiny.tower)
    side = {"height": IMAGE_SIDE, "width": IMAGE_SIDE}
    CLIPImageProcessor(size={"shortest_edge": IMAGE_SIDE}, crop_size=side).save_pretrained(tiny.tower)


def _write_language_models(tiny: TinyLlava, seed: int) -> None:
    import sentencepiece
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaTokenizer

    tiny.llm.mkdir(exist_ok=True)
    pieces = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=_sentences(tiny),
        # Not model_prefix: the file would then hold its own path, and differ from folder to folder.
        model_writer=pieces,
        vocab_size=PIECES,
        hard_vocab_limit=False,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
        num_threads=1,
    )
    (tiny.llm / "tokenizer.model").write_bytes(pieces.getvalue())
    # legacy: text after </s> gets the same leading piece as at the start, which upstream's masking counts on.
    tokenizer = LlamaTokenizer(str(tiny.llm / "tokenizer.model"), legacy=True, model_max_length=2048)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=HIDDEN,
        intermediate_size=2 * HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        initializer_range=HIDDEN**-0.5,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed + 1)
        model = LlamaForCausalLM(config)
        # Wide logits, so that greedy choices are rarely near-ties; and no control or byte pieces, so that answers
        # are readable and never empty.
        embedding, head = model.get_input_embeddings().weight.data, model.get_output_embeddings().weight.data
        embedding.normal_(0, 0.5)
        head.normal_(0, 0.5)
        head[: 3 + 256] = 0
        projector = {}
        for layer in (0, 2):
            projector[f"model.mm_projector.{layer}.weight"] = torch.randn(HIDDEN, HIDDEN) * 1.5 * HIDDEN**-0.5
            projector[f"model.mm_projector.{layer}.bias"] = torch.randn(HIDDEN) * 0.1
    # Half precision on disk, like the released checkpoints: fp32 training and fp16 serving start from equal values.
    model.half().save_pretrained(tiny.llm)
    tokenizer.save_pretrained(tiny.llm)
    projector = {name: tensor.half() for name, tensor in projector.items()}
    tiny.projector.parent.mkdir(exist_ok=True)
    torch.save(projector, tiny.projector)

    llava_config = json.loads((tiny.llm / "config.json").read_text()) | {
        "architectures": ["LlavaLlamaForCausalLM"],
        "model_type": "llava_llama",
        "freeze_mm_mlp_adapter": False,
        "image_aspect_ratio": "pad",
        "mm_hidden_size": 64,
        "mm_projector_type": "mlp2x_gelu",
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2,
        "mm_vision_tower": str(tiny.tower),
        "tokenizer_model_max_length": 2048,
        "tokenizer_padding_side": "right",
        "tune_mm_mlp_adapter": False,
        "use_mm_proj": True,
    }
    tiny.llava.mkdir(exist_ok=True)
    (tiny.llava / "config.json").write_text(json.dumps(llava_config, indent=2) + "\n")
    generation = (tiny.llm / "generation_config.json").read_text()
    (tiny.llava / "generation_config.json").write_text(generation)
    tokenizer.save_pretrained(tiny.llava)
    save_file({**model.state_dict(), **projector}, tiny.llava / "model.safetensors", metadata={"format": "pt"})


def without_half_of_its_weights(source: Path, target: Path) -> Path:
    """A copy of a model whose weights were cut short, as a copy on a full disk is."""
    weights = Path(shutil.copytree(source, target)) / "model.safetensors"
    with weights.open("r+b") as file:
        file.truncate(weights.stat().st_size // 2)
    return target


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python tests/support/tiny_llava.py DIR")
    build(Path(sys.argv[1]))
