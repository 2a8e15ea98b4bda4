"""Merge LLaVA's LoRA into its base, for programs that load no LoRA: `python -m experiments.multitask.merging`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def main(
    adapter: Annotated[Path, typer.Option(help="Folder of the LoRA.")],
    base: Annotated[Path, typer.Option(help="Folder of its base.")],
    output: Annotated[Path, typer.Option(help="Folder for the merged LLaVA.")],
) -> None:
    """Merge a LoRA into its base, as upstream's loader does, and save the result in float16."""
    from llava.mm_utils import get_model_name_from_path
    from llava.model.builder import load_pretrained_model

    name = get_model_name_from_path(str(adapter))
    tokenizer, model, _, _ = load_pretrained_model(str(adapter), str(base), name, device="cpu")
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)


if __name__ == "__main__":
    typer.run(main)
