"""The command `diagnose image`: shows where on one image a model looks, and what its answer depends on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llava_steering_plugin.cli.diagnose import options as shared
from llava_steering_plugin.cli.diagnose.progress import progress_bar
from llava_steering_plugin.errors import Problems
from llava_steering_plugin.inference import options


def image(
    model: Annotated[
        str,
        typer.Argument(
            metavar="[NAME=]MODEL", help="Adapter or LoRA, shown beside its base, or a base: folder or hub id."
        ),
    ],
    image: Annotated[list[Path], typer.Option(metavar="FILE", help="The image; one at a time.")],
    question: Annotated[str, typer.Option(help="What is asked about it.")],
    output: shared.Output,
    answer: Annotated[
        str | None, typer.Option(help="Measure this answer of both models; default: each model's own, greedy.")
    ] = None,
    effect: Annotated[
        str, typer.Option(help="How the effect is measured: occlusion, gradients (integrated), or none.")
    ] = "occlusion",
    occlusion_window: Annotated[
        int | None,
        typer.Option(min=1, help="Side of what is hidden at a time, in patches; default: at most 200 passes."),
    ] = None,
    model_base: shared.ModelBase = None,
    conv_mode: Annotated[
        str | None, typer.Option(help="LLaVA's conversation template; default: the adapter's own, for both.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 32,
    device: options.Device = "auto",
    load_4bit: options.Load4bit = False,
    load_8bit: options.Load8bit = False,
) -> None:
    """Show where on one image a model looks, where MoReS moves it, and which parts its answer depends on.

    Writes image.json, .csv, .png and .svg.
    """
    from llava_steering_plugin.diagnostics.preflight import check_flags, check_models

    problems = Problems()
    chosen_device = check_flags(
        output, device=device, load_4bit=load_4bit, load_8bit=load_8bit, conversation=conv_mode, problems=problems
    )
    from llava_steering_plugin.diagnostics.image.preflight import check_image

    check_image(image, question, answer, effect, occlusion_window, problems)
    from llava_steering_plugin.diagnostics.image.one_model import EffectOptions
    from llava_steering_plugin.diagnostics.image.run import ImageRequest, run_image
    from llava_steering_plugin.inference.sources import read_sources

    named = read_sources([model], problems)
    check_models(named, model_base, problems, bases=True)
    problems.raise_any("this cannot be measured")
    ((name, path),) = named.items()
    request = ImageRequest(
        name=name,
        path=path,
        image=image[0],
        question=question,
        answer=answer,
        effect=EffectOptions(effect, occlusion_window),
        conversation=conv_mode,
        max_new_tokens=max_new_tokens,
        base=model_base,
        how={"device": chosen_device, "load_4bit": load_4bit, "load_8bit": load_8bit},
        output=output,
    )
    with progress_bar() as progress:
        files = run_image(request, progress)
    for file in files:
        typer.echo(str(file))
