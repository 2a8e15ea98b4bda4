"""The tiny LLaVA as `llava-steering export` writes it.

The export needs LLaVA, which the environment of vLLM does not have: another interpreter runs it.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

from safetensors.torch import load_file, save_file

ROOT = Path(__file__).parents[2]


def llavas_python() -> Path:
    """The interpreter of the environment that has LLaVA."""
    return Path(os.environ.get("VENV", ROOT / ".venv")).absolute() / "bin/python"


def export_tiny(folder: Path, *, one_linear: bool = False) -> tuple[Path, Path, Path]:
    """Makes the tiny LLaVA and exports it; returns the folders of the export, of the LLaVA and of its images.

    Args:
        one_linear: its projector is one, not two with an activation between them.
    """
    parts, target = folder / "llava", folder / "exported"
    model = parts / "llava-v1.5-tiny"
    _with_llava(str(ROOT / "tests/support/tiny_llava.py"), str(parts))
    config = json.loads((model / "config.json").read_text())
    # Attention of vLLM's for the CPU has no heads of 16 numbers.
    config |= {"num_attention_heads": 2, "num_key_value_heads": 2}
    if one_linear:
        config["mm_projector_type"] = "linear"
        tensors = load_file(model / "model.safetensors")
        for leaf in ("weight", "bias"):
            tensors[f"model.mm_projector.{leaf}"] = tensors.pop(f"model.mm_projector.0.{leaf}")
            del tensors[f"model.mm_projector.2.{leaf}"]
        save_file(tensors, model / "model.safetensors", {"format": "pt"})
    (model / "config.json").write_text(json.dumps(config))
    _with_llava("-m", "llava_steering_plugin", "export", str(model), str(target), "--conversation", "vicuna_v1")
    return target, model, parts / "images"


def llavas_tokens(model: Path, prompts: Sequence[tuple[str, int, str | None]]) -> list[list[int]]:
    """The tokens of LLaVA's own prompts, -200 for an image.

    Args:
        model: in LLaVA's layout.
        prompts: a question, the number of images in front of it, and a text in the place of the template's own system
            message, or None.
    """
    found: list[list[int]] = json.loads(_with_llava("-c", _TOKENS, str(model), json.dumps(prompts)).splitlines()[-1])
    return found


_TOKENS = """
import json, sys
from llava.conversation import conv_templates
from llava.mm_utils import tokenizer_image_token
from transformers import AutoTokenizer
tokenizer, found = AutoTokenizer.from_pretrained(sys.argv[1], use_fast=False), []
for question, images, system in json.loads(sys.argv[2]):
    written = conv_templates["vicuna_v1"].copy()
    written.system = written.system if system is None else system
    written.append_message(written.roles[0], "<image>\\n" * images + question)
    written.append_message(written.roles[1], None)
    found.append(tokenizer_image_token(written.get_prompt(), tokenizer))
print(json.dumps(found))
"""


def _with_llava(*words: str) -> str:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [str(llavas_python()), *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
