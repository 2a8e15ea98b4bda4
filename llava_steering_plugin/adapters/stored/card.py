"""The model card of an adapter: README.md, for a person who finds the folder."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

from llava_steering_plugin.adapters.stored.config import AdapterConfig
from llava_steering_plugin.modes.joint import part_names

# What the hub accepts as `base_model`; it refuses to store a card that names a local folder there.
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


def model_card(
    config: AdapterConfig,
    parameters: int,
    extras: list[str],
    learned: Mapping[str, str] | None = None,
    full_name: str | None = None,
    *,
    of_llava: bool = True,
) -> str:
    """Return the text of README.md: what the adapter is, how to load it, and its settings.

    Args:
        config: the adapter's.
        parameters: how many the tuning mode has.
        extras: names of the base's own tensors that are saved with it.
        learned: what training has chosen, by name, as `Mode.learned` returns it.
        full_name: of the tuning mode; None: its name says all.
        of_llava: the base is a checkpoint of LLaVA's own, and no model of transformers alone.
    """
    base = config.base
    on_hub = _HUB_ID.fullmatch(base.name_or_path) and not os.path.exists(base.name_or_path)
    hub_id = f"base_model: {base.name_or_path}\n" if on_hub else ""
    held = f"{parameters:,} parameters" if parameters else "the result"
    values = {**config.settings, **(learned or {}), **config.trained_on, "conversation template": config.conversation}
    rows = "\n".join(f"| {key} | {_code(value)} |" for key, value in values.items())
    carried = (
        f"\nIt also holds {len(extras)} tensors of the model itself, which the base lacks or which were trained: "
        f"{', '.join(map(_code, extras))}.\n"
        if extras
        else ""
    )
    tags = "\n".join(f"- {name}" for name in dict.fromkeys([config.mode, *part_names(config.mode)]))
    return f"""---
library_name: llava-steering-plugin
{hub_id}tags:
- llava
{tags}
---

# {full_name or config.mode} adapter for {base.name_or_path}

An adapter: {held} of tuning mode `{config.mode}`, trained with
llava-steering-plugin. Its base, {base.name_or_path}, has {base.num_layers} layers of width {base.hidden_size}.
{carried}
## How to use it

{_IN_LLAVA if of_llava else _IN_TRANSFORMERS}

    from llava_steering_plugin import load_adapter

    load_adapter(model, "THIS_FOLDER", tokenizer=tokenizer)

{_elsewhere(config, extras)}

## Settings

| setting | value |
| --- | --- |
{rows}
"""


_IN_LLAVA = """Install llava-steering-plugin beside LLaVA: `pip install llava-steering-plugin`, then
`llava-steering patch`. LLaVA's own commands then take this folder as a model:

    python -m llava.serve.cli --model-path THIS_FOLDER --image-file image.jpg

The base is loaded from the name above. If it is elsewhere, add `--model-base`. In Python, on a base
that is loaded already:"""
_IN_TRANSFORMERS = """Install llava-steering-plugin beside transformers: `pip install llava-steering-plugin`. Then

    from llava_steering_plugin import from_pretrained

    model = from_pretrained("THIS_FOLDER")

loads the base from the name above, and the adapter. If the base is elsewhere, add `base=`. On a base
that is loaded already:"""


def _elsewhere(config: AdapterConfig, extras: list[str]) -> str:
    """Say what other libraries make of the folder."""
    if config.peft_prefix is None:
        return "PEFT and transformers' `from_pretrained` cannot load it: this is not an adapter of PEFT's."
    left_out = (
        "\nThey leave out the tensors of the model itself, so the answers to images are others." if extras else ""
    )
    return (
        'PEFT loads it too, on the same base: `PeftModel.from_pretrained(model, "THIS_FOLDER")`; so do transformers\'\n'
        f"`from_pretrained` and `load_adapter`.{left_out}"
    )


def _code(value: object) -> str:
    """Show a value as code in a table's cell, where a bar would end it."""
    return f"`{value}`".replace("|", "\\|").replace("\n", " ")
