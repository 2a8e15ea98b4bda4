"""The sub-command `chat`: from its options to a chat that has loaded."""

from __future__ import annotations

import contextlib
import sys
from typing import Annotated

import typer

from llava_steering_plugin.inference import options
from llava_steering_plugin.inference.quiet import quieten_libraries


def chat(
    path: Annotated[str, typer.Argument(metavar="BASE_OR_ADAPTER", help="A model or an adapter: folder or hub id.")],
    more: Annotated[list[str] | None, typer.Argument(hidden=True, metavar="[NAME=]ADAPTER")] = None,
    adapters: Annotated[
        list[str] | None,
        typer.Option(metavar="[NAME=]ADAPTER", help="Further adapters for the same base, one or more after the flag."),
    ] = None,
    image: Annotated[str | None, typer.Option(metavar="FILE", help="Chat about this image.")] = None,
    model_base: Annotated[
        str | None, typer.Option(help="Where the adapter's base is, if it has moved: folder or hub id.")
    ] = None,
    device: options.Device = "auto",
    load_4bit: options.Load4bit = False,
    load_8bit: options.Load8bit = False,
    temperature: Annotated[
        float, typer.Option(min=0, help="Sampling temperature; 0 always takes the most likely token.")
    ] = 0.2,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 512,
    conv_mode: Annotated[
        str | None, typer.Option(help="LLaVA's conversation template; default: the one that LLaVA's own chat picks.")
    ] = None,
) -> None:
    """Chat with a model and its adapters in the terminal; /help there lists the commands.

    Answers go to standard output, everything else to standard error. Questions may come through a pipe.
    """
    from llava_steering_plugin.upstream.install import install

    quieten_libraries()
    # Standard output is for answers, but DeepSpeed, which the loader imports, logs there.
    with contextlib.redirect_stdout(sys.stderr):
        install()
        from llava_steering_plugin.chat.preflight import check_chat

        checked = check_chat(
            path,
            [*(adapters or []), *(more or [])],
            base=model_base,
            image=image,
            device=device,
            load_4bit=load_4bit,
            load_8bit=load_8bit,
            conversation=conv_mode,
        )
        from llava_steering_plugin.chat.session import open_chat
        from llava_steering_plugin.inference.base_model import skip_random_weights

        skip_random_weights()
        opened = open_chat(
            checked.path,
            checked.adapters,
            first=checked.first,
            base=model_base,
            device=checked.device,
            load_4bit=load_4bit,
            load_8bit=load_8bit,
            conversation=conv_mode,
            temperature=temperature,
            max_new_tokens=max_new_tokens,
        )
    from llava_steering_plugin.chat.terminal import Terminal

    if image is not None:
        opened.look_at(image)
    Terminal(opened).run()
