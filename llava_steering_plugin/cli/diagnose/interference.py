"""The command `diagnose interference`: measures how much tasks help or harm each other."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llava_steering_plugin.cli.diagnose import options as shared
from llava_steering_plugin.cli.diagnose.progress import progress_bar
from llava_steering_plugin.errors import Problems
from llava_steering_plugin.inference import options


def interference(
    models: Annotated[
        list[str],
        typer.Argument(metavar="[NAME=]ADAPTER", help="Adapters or LoRAs, folders or hub ids; in one picture."),
    ],
    data: shared.TaskData,
    image_folder: Annotated[Path, typer.Option(help="Folder of the images that the data names.")],
    output: shared.Output,
    samples: Annotated[int, typer.Option(min=1, help="Samples of each task, for each of two batches.")] = 16,
    seed: Annotated[int, typer.Option(help="Chooses the samples.")] = 0,
    model_base: shared.ModelBase = None,
    version: shared.Version = None,
    device: options.Device = "auto",
    load_4bit: options.Load4bit = False,
    load_8bit: options.Load8bit = False,
) -> None:
    """Measure how much a training step for one task helps or harms the others, in the adapter's parameters.

    Writes interference.json, .csv, .png and .svg. An interrupted run goes on where it ended.
    """
    from llava_steering_plugin.diagnostics.preflight import check_flags, check_models

    problems = Problems()
    chosen_device = check_flags(
        output, device=device, load_4bit=load_4bit, load_8bit=load_8bit, conversation=version, problems=problems
    )
    from llava_steering_plugin.diagnostics.interference.run import InterferenceRequest, read_tasks, run_interference
    from llava_steering_plugin.inference.sources import read_sources, split_word

    named = read_sources(models, problems)
    check_models(named, model_base, problems, bases=False)
    request = InterferenceRequest(
        models=named,
        files=[(task, Path(file)) for task, file in map(split_word, data)],
        images=image_folder,
        samples=samples,
        seed=seed,
        conversation=version,
        base=model_base,
        how={"device": chosen_device, "load_4bit": load_4bit, "load_8bit": load_8bit},
        output=output,
    )
    few: list[str] = []
    with problems.noted():
        few = [name for name, chosen in read_tasks(request).items() if len(chosen.steps) < samples]
    problems.raise_any("this cannot be measured")
    if few:
        typer.echo(f"fewer than {2 * samples} samples, so smaller batches: {', '.join(few)}", err=True)
    with progress_bar() as progress:
        files = run_interference(request, progress)
    for file in files:
        typer.echo(str(file))
