"""The command `diagnose routing`: measures what MixLoRA adapters choose, and what their choices are worth."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llava_steering_plugin.cli.diagnose import options as shared
from llava_steering_plugin.cli.diagnose.progress import progress_bar
from llava_steering_plugin.errors import Problems
from llava_steering_plugin.inference import options


def routing(
    models: Annotated[
        list[str],
        typer.Argument(metavar="[NAME=]ADAPTER", help="MixLoRA adapters, folders or hub ids; in one picture."),
    ],
    data: shared.TaskData,
    image_folder: Annotated[Path, typer.Option(help="Folder of the images that the data names.")],
    output: shared.Output,
    samples: Annotated[int, typer.Option(min=1, help="Samples of each task, chosen at random.")] = 32,
    repeats: Annotated[int, typer.Option(min=1, help="How often choices are shuffled, and drawn at random.")] = 3,
    seed: Annotated[int, typer.Option(help="Chooses the samples, other choices, and t-SNE's beginning.")] = 0,
    model_base: shared.ModelBase = None,
    version: shared.Version = None,
    device: options.Device = "auto",
    load_4bit: options.Load4bit = False,
    load_8bit: options.Load8bit = False,
) -> None:
    """Measure which factors MixLoRA chooses, what the choice tells about the task, and the loss with other choices.

    Writes routing.json, .csv, .png and .svg. An interrupted run goes on where it ended.
    """
    from llava_steering_plugin.diagnostics.preflight import PACKAGES, check_flags, check_mode

    problems = Problems()
    chosen_device = check_flags(
        output,
        device=device,
        load_4bit=load_4bit,
        load_8bit=load_8bit,
        conversation=version,
        problems=problems,
        packages=(*PACKAGES, "sklearn"),
    )
    from llava_steering_plugin.diagnostics.routing.run import RoutingRequest, read_chosen, run_routing
    from llava_steering_plugin.diagnostics.routing.summary import ALONE
    from llava_steering_plugin.inference.sources import read_sources, split_word

    named = read_sources(models, problems)
    check_mode(named, model_base, problems, "mixlora")
    request = RoutingRequest(
        models=named,
        files=[(task, Path(file)) for task, file in map(split_word, data)],
        images=image_folder,
        samples=samples,
        repeats=repeats,
        seed=seed,
        conversation=version,
        base=model_base,
        how={"device": chosen_device, "load_4bit": load_4bit, "load_8bit": load_8bit},
        output=output,
    )
    found: dict[str, int] = {}
    with problems.noted():
        found = {name: len(chosen) for name, chosen in read_chosen(request).items()}
    problems.raise_any("this cannot be measured")
    if few := [f"{name} ({count})" for name, count in found.items() if count < samples]:
        typer.echo(f"fewer than {samples} samples: {', '.join(few)}", err=True)
    if len(found) == 1:
        typer.echo(ALONE, err=True)
    with progress_bar() as progress:
        files = run_routing(request, progress)
    for file in files:
        typer.echo(str(file))
