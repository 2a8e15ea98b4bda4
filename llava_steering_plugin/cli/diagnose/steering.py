"""The command `diagnose steering`: measures the updates of MoReS adapters, and what each layer's is worth."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llava_steering_plugin.cli.diagnose import options as shared
from llava_steering_plugin.cli.diagnose.progress import progress_bar
from llava_steering_plugin.errors import ArgumentsError, Problems
from llava_steering_plugin.inference import options


def steering(
    models: Annotated[
        list[str],
        typer.Argument(metavar="[NAME=]ADAPTER", help="MoReS adapters, folders or hub ids; in one picture."),
    ],
    image_folder: Annotated[Path, typer.Option(help="Folder of the images that questions or data name.")],
    output: shared.Output,
    question_file: Annotated[Path | None, typer.Option(help="LLaVA's question.jsonl.")] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="In place of questions: LLaVA's training JSON, whose answers are taken as the truth."),
    ] = None,
    samples: Annotated[
        int | None, typer.Option(min=1, help="Answers to measure, chosen at random; default: all about an image.")
    ] = None,
    answers_file: Annotated[
        Path | None,
        typer.Option(help="Measure these answers to the questions, LLaVA's answer.jsonl; default: each adapter's own."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Chooses the questions or samples.")] = 0,
    model_base: shared.ModelBase = None,
    conv_mode: Annotated[
        str | None, typer.Option(help="LLaVA's conversation template; default: each adapter's own, else v1.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest greedy answer, in tokens.")] = 32,
    device: options.Device = "auto",
    load_4bit: options.Load4bit = False,
    load_8bit: options.Load8bit = False,
) -> None:
    """Measure how strongly and where MoReS steers, and the loss that is added where a layer's steering is off.

    Writes steering.json, .csv, .png and .svg. An interrupted run goes on where it ended.
    """
    from llava_steering_plugin.diagnostics.preflight import check_flags, check_mode, check_same_base

    problems = Problems()
    chosen_device = check_flags(
        output, device=device, load_4bit=load_4bit, load_8bit=load_8bit, conversation=conv_mode, problems=problems
    )
    from llava_steering_plugin.diagnostics.modality.one_model import Chosen, choose_questions
    from llava_steering_plugin.diagnostics.modality.run import read_answers
    from llava_steering_plugin.diagnostics.results import digest
    from llava_steering_plugin.diagnostics.steering.run import Answers, SteeringRequest, choose_data, run_steering
    from llava_steering_plugin.inference.asking.questions import check_questions, read_questions
    from llava_steering_plugin.inference.sources import read_sources
    from llava_steering_plugin.pool.pool import BASE

    named = read_sources(models, problems)
    before = len(problems.errors)
    check_mode(named, model_base, problems, "mores")
    if len(problems.errors) == before:
        check_same_base(named, problems)
    answers, said = Answers((), 0), "generated"
    with problems.noted():
        if (question_file is None) == (data is None):
            raise ArgumentsError("give either --question-file or --data.")
        if question_file is None and answers_file is not None:
            raise ArgumentsError("--answers-file answers a --question-file; --data holds its own answers.")
    if question_file is not None:
        chosen, given = Chosen((), 0), None
        with problems.noted():
            chosen = choose_questions(read_questions(question_file), samples, seed)
            check_questions(chosen.questions, (BASE,), image_folder)
        if answers_file is not None:
            with problems.noted():
                given, said = read_answers(answers_file, chosen.questions), digest(answers_file)
        ids = [question.id for question in chosen.questions]
        answers = Answers(ids, chosen.text_only, questions=chosen.questions, given=given)
    elif data is not None:
        said = "of the data"
        with problems.noted():
            answers = choose_data(data, samples, seed, image_folder, conv_mode)
    problems.raise_any("this cannot be measured")
    if samples is not None and len(answers.keys) < samples:
        typer.echo(f"{samples} samples are asked for; {len(answers.keys)} are about an image.", err=True)
    source = question_file or data
    assert source is not None
    request = SteeringRequest(
        models=named,
        answers=answers,
        images=image_folder,
        settings={
            "measure": "steering",
            "questions" if data is None else "data": digest(source),
            "answers": said,
            "samples": samples,
            "seed": seed,
            "conv_mode": conv_mode,
            "max_new_tokens": max_new_tokens,
            "load_4bit": load_4bit,
            "load_8bit": load_8bit,
        },
        conversation=conv_mode,
        max_new_tokens=max_new_tokens,
        base=model_base,
        how={"device": chosen_device, "load_4bit": load_4bit, "load_8bit": load_8bit},
        output=output,
    )
    with progress_bar() as progress:
        files = run_steering(request, progress)
    for file in files:
        typer.echo(str(file))
