"""The sub-command `diagnose`: measures attention to images, and interference between tasks, and draws it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from llava_steering_plugin.errors import Problems
from llava_steering_plugin.inference import options

app = typer.Typer(no_args_is_help=True, help="Measure attention to images, or interference between tasks.")


@app.callback()
def _group() -> None:
    """Measure attention to images, or interference between tasks."""


@app.command(short_help="Measure each layer's attention to image and text.")
def modality(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="[NAME=]MODEL...", help="Bases, adapters or LoRAs: folders or hub ids. Drawn in one picture."
        ),
    ],
    question_file: Annotated[Path, typer.Option(help="LLaVA's question.jsonl.")],
    image_folder: Annotated[Path, typer.Option(help="Folder of the images that the questions name.")],
    output: Annotated[Path, typer.Option(help="Folder for measurements, tables and pictures.")],
    samples: Annotated[
        int | None, typer.Option(min=1, help="Questions to measure, chosen at random; default: all about an image.")
    ] = None,
    answers_file: Annotated[
        Path | None,
        typer.Option(help="Measure these answers, LLaVA's answer.jsonl; default: each model's own, greedy."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Chooses the questions.")] = 0,
    model_base: Annotated[
        str | None, typer.Option(help="Where the base of the adapters and LoRAs is, if it has moved.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Answers generated at the same time.")] = 8,
    conv_mode: Annotated[
        str | None, typer.Option(help="LLaVA's conversation template; default: each adapter's own.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 32,
    device: options.Device = "auto",
    load_4bit: options.Load4bit = False,
    load_8bit: options.Load8bit = False,
) -> None:
    """Measure how much each layer attends to the image and to the text while it answers.

    Writes modality.json, .csv, .png and .svg. An interrupted run goes on where it ended.
    """
    from llava_steering_plugin.diagnostics.preflight import check_flags, check_models

    problems = Problems()
    chosen_device = check_flags(
        output, device=device, load_4bit=load_4bit, load_8bit=load_8bit, conversation=conv_mode, problems=problems
    )
    from llava_steering_plugin.diagnostics.modality_run import Chosen, choose_questions
    from llava_steering_plugin.diagnostics.runs import ModalityRequest, digest, read_answers, run_modality
    from llava_steering_plugin.inference.questions import AnswerOptions, check_questions, read_questions
    from llava_steering_plugin.inference.sources import read_sources
    from llava_steering_plugin.pool.pool import BASE

    named = read_sources(models, problems)
    check_models(named, model_base, problems, bases=True)
    chosen = Chosen((), 0)
    with problems.noted():
        chosen = choose_questions(read_questions(question_file), samples, seed)
        check_questions(chosen.questions, (BASE,), image_folder)
    given = None
    if answers_file is not None:
        with problems.noted():
            given = read_answers(answers_file, chosen.questions)
    problems.raise_any("this cannot be measured")
    if samples is not None and len(chosen.questions) < samples:
        typer.echo(f"{samples} questions are asked for; {len(chosen.questions)} are about an image.", err=True)
    request = ModalityRequest(
        models=named,
        chosen=chosen,
        given=given,
        images=image_folder,
        settings={
            "measure": "modality",
            "questions": digest(question_file),
            "answers": "generated" if answers_file is None else digest(answers_file),
            "samples": samples,
            "seed": seed,
            "conv_mode": conv_mode,
            "max_new_tokens": max_new_tokens,
            "load_4bit": load_4bit,
            "load_8bit": load_8bit,
        },
        options=AnswerOptions(batch_size, conv_mode, {"max_new_tokens": max_new_tokens, "do_sample": False}),
        base=model_base,
        how={"device": chosen_device, "load_4bit": load_4bit, "load_8bit": load_8bit},
        output=output,
    )
    with progress_bar() as progress:
        files = run_modality(request, progress)
    for file in files:
        typer.echo(str(file))


@app.command(short_help="Measure how much tasks help or harm each other.")
def interference(
    models: Annotated[
        list[str],
        typer.Argument(metavar="[NAME=]ADAPTER...", help="Adapters or LoRAs, folders or hub ids; in one picture."),
    ],
    data: Annotated[
        list[str],
        typer.Option(metavar="[TASK=]FILE", help='LLaVA\'s training JSON; its samples name a "task", or all are TASK.'),
    ],
    image_folder: Annotated[Path, typer.Option(help="Folder of the images that the data names.")],
    output: Annotated[Path, typer.Option(help="Folder for measurements, tables and pictures.")],
    samples: Annotated[int, typer.Option(min=1, help="Samples of each task, for each of two batches.")] = 16,
    seed: Annotated[int, typer.Option(help="Chooses the samples.")] = 0,
    model_base: Annotated[
        str | None, typer.Option(help="Where the base of the adapters and LoRAs is, if it has moved.")
    ] = None,
    version: Annotated[
        str | None, typer.Option(help="Conversation template of the training; default: each adapter's own, else v1.")
    ] = None,
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
    from llava_steering_plugin.diagnostics.task_runs import InterferenceRequest, read_tasks, run_interference
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


@contextmanager
def progress_bar() -> Iterator[Callable[[str, int, int], None]]:
    """Show on standard error how many questions of each model are done, and the time left."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        tasks = {}

        def show(name: str, done: int, total: int) -> None:
            if name not in tasks:
                tasks[name] = bar.add_task(name, total=total)
            bar.update(tasks[name], completed=done)

        yield show
