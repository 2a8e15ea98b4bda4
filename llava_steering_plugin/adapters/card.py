"""Writes the model card of an adapter."""

from __future__ import annotations

from llava_steering_plugin.adapters.config import AdapterConfig


def model_card(config: AdapterConfig, parameters: int, extras: list[str]) -> str:
    """README.md of an adapter: what it is and how to load it."""
    settings = "\n".join(f"| {key} | `{value}` |" for key, value in config.settings.items())
    trained = "\n".join(f"| {key} | `{value}` |" for key, value in config.trained_on.items())
    carried = (
        f"\nIt also carries {len(extras)} tensors of the model itself that the base lacks or that were trained: "
        f"{', '.join(f'`{name}`' for name in extras)}.\n"
        if extras
        else ""
    )
    return f"""---
library_name: llava-steering-plugin
base_model: {config.base.name_or_path}
tags:
- llava
- {config.mode}
---

# A {config.mode} adapter for {config.base.name_or_path}

{parameters:,} parameters of tuning mode `{config.mode}`, trained with
llava-steering-plugin on a base of {config.base.num_layers} layers of width {config.base.hidden_size}.
{carried}
## Loading

With LLaVA's own commands, where `pip install llava-steering-plugin` and `llava-steering patch` were run:

    python -m llava.serve.cli --model-path THIS_FOLDER --image-file image.jpg

The base is found by the name above; if it has moved, add `--model-base`. In Python:

    from llava_steering_plugin import load_adapter
    load_adapter(model, "THIS_FOLDER", tokenizer=tokenizer)

## Settings

| setting | value |
| --- | --- |
{settings}
{trained}
| conversation template | `{config.conversation}` |
"""
