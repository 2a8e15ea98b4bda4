"""Try one combination: train, save, load, generate, resume.

What a trial promises is written as checks that raise; a combination is "ok" if none does.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

from experiments.combinations.cells import Cell
from experiments.combinations.parts import Parts

PROMPT = "<image>\nWhat color is the circle?"
NEW = 4  # tokens of an answer


class Refused(Exception):
    """The training was refused before it began; the message is what the user is told."""


class Broken(Exception):
    """Something was made, and is not what was promised."""


def attempt(cell: Cell, parts: Parts, folder: Path) -> None:
    """Try a combination in this process, with all its files in `folder`.

    Raises:
        Refused: it was refused before anything was written.
        Broken: a check failed. Any other error is a failure, too.
    """
    # For upstream's own LoRA: its checkpoints hold a random state that torch no longer opens without being told.
    os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] = "1"
    output = folder / f"llava-{cell.method}"
    _check_losses(_trained(cell, parts, output), 2)
    _check_loaded(cell, parts, output)
    resumed = folder / "resumed" / output.name
    resumed.mkdir(parents=True)
    shutil.copytree(output / "checkpoint-1", resumed / "checkpoint-1")
    _check_losses(_trained(cell, parts, resumed), 2)
    if cell.method != "lora":  # LLaVA's checkpoints of a LoRA lack the connector: it begins anew
        _check_equal(output / "adapter_model.safetensors", resumed / "adapter_model.safetensors")


def _trained(cell: Cell, parts: Parts, output: Path) -> list[float]:
    """Train by LLaVA's own train() and return the losses, those before a resumption too."""
    from training_runs import train_in_process

    from llava_steering_plugin.errors import SteeringError

    try:
        history = train_in_process(parts.flags(cell, output))
    except SystemExit as ended:
        if isinstance(ended.__cause__, SteeringError) and not output.exists():
            raise Refused(str(ended.__cause__)) from ended
        raise Broken(f"the training ended with {ended.code}: {ended.__cause__}") from ended
    return [float(entry["loss"]) for entry in history if "loss" in entry]


def _check_losses(losses: list[float], steps: int) -> None:
    if len(losses) != steps or not all(math.isfinite(loss) and 0 < loss < 100 for loss in losses):
        raise Broken(f"the losses of {steps} steps are {losses}")


def _check_loaded(cell: Cell, parts: Parts, output: Path) -> None:
    """Load what was trained as LLaVA's own programs do, compare it with the files, and let it answer."""
    from llava.model.builder import load_pretrained_model

    base = parts.bases[cell.language_model]
    separate = str(base.folder) if cell.method == "lora" else None
    # By LLaVA's rules the name tells whether it is a LoRA.
    loaded = load_pretrained_model(str(output), separate, output.name, device="cpu", device_map="cpu")
    tokenizer, model, _, _ = loaded
    _check_weights(cell, output, model)
    model.float()
    model.get_vision_tower().float()
    _check_answer(base.version, tokenizer, model)


def _check_weights(cell: Cell, output: Path, model: Any) -> None:
    """Compare the loaded connector, and the tuning, with what was saved."""
    import torch
    from safetensors.torch import load_file

    from llava_steering_plugin import attachment_of
    from llava_steering_plugin.adapters.stored.folder import EXTRA
    from llava_steering_plugin.adapters.stored.locate import locate

    loaded = {name: value for name, value in model.named_parameters() if "mm_projector" in name}
    if cell.method == "lora":
        stored = torch.load(output / "non_lora_trainables.bin", map_location="cpu", weights_only=True)
        connector = {name.removeprefix("base_model.model."): value for name, value in stored.items()}
        connector = {name: value for name, value in connector.items() if "mm_projector" in name}
        lora = load_file(output / "adapter_model.safetensors")
        moved = [bool(value.any()) for name, value in lora.items() if "lora_B" in name]
    else:
        connector = locate(str(output)).read().section(EXTRA)
        attachment = attachment_of(model)
        if attachment is None or attachment.mode.name != cell.method:
            raise Broken("the loaded model has no adapter of this mode")
        tensors = load_file(output / "adapter_model.safetensors")
        for name, value in attachment.parameters().items():
            if not torch.equal(value, tensors[f"adapter.{name}"]):
                raise Broken(f"{name} of the adapter is not loaded as it was saved")
        # What begins at zero.
        ends = ("shift", "offset", "routed_b")
        moved = [bool(value.any()) for name, value in attachment.parameters().items() if name.endswith(ends)]
    if loaded.keys() != connector.keys():
        raise Broken(f"of the connector, {sorted(loaded.keys() ^ connector.keys())} are in the model or the file alone")
    for name, value in loaded.items():
        if not torch.equal(value, connector[name].to(value.dtype)):
            raise Broken(f"{name} is not loaded as it was saved")
    # Of MoReS' last layer nothing reaches the loss: it steers visual tokens, and answers come after them.
    if not moved or sum(moved) < len(moved) / 2:
        raise Broken(f"{len(moved) - sum(moved)} of {len(moved)} tensors that begin at zero are still there")


def _check_answer(version: str, tokenizer: Any, model: Any) -> None:
    import torch
    from llava.conversation import conv_templates
    from llava.mm_utils import tokenizer_image_token

    from llava_steering_plugin.components.image_tokens import of_model

    chat = conv_templates[version].copy()
    chat.append_message(chat.roles[0], PROMPT)
    chat.append_message(chat.roles[1], None)
    ids = tokenizer_image_token(chat.get_prompt(), tokenizer, return_tensors="pt")[None]
    side = model.get_vision_tower().image_processor.crop_size["height"]
    pixels = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(0))
    tokens = of_model(model)
    with torch.inference_mode():
        spliced = model.prepare_inputs_labels_for_multimodal(ids, None, None, None, None, pixels)[4]
        if tokens is None or spliced.shape[1] != ids.shape[1] - 1 + tokens.count:
            raise Broken(f"an image becomes {spliced.shape[1] - ids.shape[1] + 1} tokens, and {tokens} are announced")
        logits = model(input_ids=ids, images=pixels).logits
        answer = model.generate(ids, images=pixels, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False)
    if not torch.isfinite(logits).all():
        raise Broken("the loaded model's logits are not finite")
    if answer.shape[1] < NEW:
        raise Broken(f"the loaded model answered {answer.shape[1]} tokens in place of {NEW}")


def _check_equal(one: Path, other: Path) -> None:
    """Compare all tensors of two files, and the last step that their trainings have made."""
    import torch
    from safetensors.torch import load_file

    first, second = load_file(one), load_file(other)
    if first.keys() != second.keys() or not all(torch.equal(first[name], second[name]) for name in first):
        raise Broken("the resumed training ends elsewhere than the one that was not interrupted")
    step = json.loads((other.parent / "trainer_state.json").read_text())["global_step"]
    if step != 2:
        raise Broken(f"the resumed training ended at step {step}")
