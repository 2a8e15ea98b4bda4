"""The command `diagnose modality`: measures attention to image and text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llava_steering_plugin.cli.diagnose import options as shared
from llava_steering_plugin.cli.diagnose.progress import progress_bar
from llava_steering_plugin.errors import Problems
from llava_steering_plugin.inference import options

# Whatever a checkpoint's generation_config.json says.
GREEDY = {"do_sample": False, "num_beams": 1}


def modality(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="[NAME=]MODEL", help="Bases, adapters or LoRAs: folders or hub ids. Drawn in one picture."
        ),
    ],
    question_file: Annotated[Path, typer.Option(help="LLaVA's question.jsonl.")],
    image_folder: Annotated[Path, typer.Option(help="Folder of the images that the questions name.")],
    output: shared.Output,
    samples: Annotated[
        int | None, typer.Option(min=1, help="Questions to measure, chosen at random; default: all about an image.")
    ] = None,
    answers_file: Annotated[
        Path | None,
        typer.Option(help="Measure these answers, LLaVA's answer.jsonl; default: each model's own, greedy."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Chooses the questions.")] = 0,
    model_base: shared.ModelBase = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Answers generated at the same time.")] = 8,
    conv_mode: Annotated[
        str | None, typer.Option(help="LLaVA's conversation template; default: the adapters', also for bases.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 32,
    per_head: Annotated[
        bool, typer.Option("--per-head", help="Also show single heads. A finished run is not measured again for it.")
    ] = False,
    device: options.Device = "auto",
    load_4bit: options.Load4bit = False,
    load_8bit: options.Load8bit = False,
) -> None:
    """Measure how much each layer attends to the image and to the text while it answers.

    Writes modality.json, .csv, .png and .svg, and with --per-head modality-heads.png and .svg. An interrupted run goes
    on where it ended.
    """
    from llava_steering_plugin.diagnostics.preflight import check_flags, check_models, shared_template

    problems = Problems()
    chosen_device = check_flags(
        output, device=device, load_4bit=load_4bit, load_8bit=load_8bit, conversation=conv_mode, problems=problems
    )
    from llava_steering_plugin.diagnostics.modality.one_model import Chosen, choose_questions
    from llava_steering_plugin.diagnostics.modality.run import ModalityRequest, read_answers, run_modality
    from llava_steering_plugin.diagnostics.results import digest
    from llava_steering_plugin.inference.asking.answering import AnswerOptions
    from llava_steering_plugin.inference.asking.questions import check_questions, read_questions
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
    conv_mode = conv_mode or shared_template(named)
    if conv_mode is None and len(named) > 1:
        typer.echo("The models are asked in conversation templates of their own. --conv-mode gives them one.", err=True)
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
        options=AnswerOptions(batch_size, conv_mode, GREEDY | {"max_new_tokens": max_new_tokens}),
        base=model_base,
        how={"device": chosen_device, "load_4bit": load_4bit, "load_8bit": load_8bit},
        output=output,
        per_head=per_head,
    )
    with progress_bar() as progress:
        files, notes = run_modality(request, progress)
    for note in notes:
        typer.echo(note, err=True)
    for file in files:
        typer.echo(str(file))
