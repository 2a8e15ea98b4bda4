"""The sub-command `eval`: from its options to a file of answers."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated

import typer

from llava_steering_plugin.errors import ArgumentsError, NotFiniteError
from llava_steering_plugin.inference import options


def evaluate(
    base: Annotated[str, typer.Argument(metavar="BASE", help="The base model, a LLaVA: folder or hub id.")],
    question_file: Annotated[Path, typer.Option(help="LLaVA's question.jsonl; a line may name an adapter.")],
    image_folder: Annotated[Path, typer.Option(help="Folder of the images that the questions name.")],
    answers_file: Annotated[Path, typer.Option(help="LLaVA's answer.jsonl; an existing file is overwritten.")],
    adapter: Annotated[
        list[str] | None, typer.Option(metavar="[NAME=]ADAPTER", help="An adapter: folder or hub id. May be repeated.")
    ] = None,
    ask: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Adapter for lines that name none; default: the adapter if there is one, else the base.",
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Questions answered at the same time.")] = 8,
    conv_mode: Annotated[
        str | None, typer.Option(help="LLaVA's conversation template; default: each adapter's own.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 128,
    temperature: Annotated[
        float, typer.Option(min=0, help="Sampling temperature; 0 always takes the most likely token.")
    ] = 0.0,
    top_p: Annotated[
        float | None, typer.Option(min=0, max=1, help="Sample from the most likely tokens of this total probability.")
    ] = None,
    num_beams: Annotated[int, typer.Option(min=1, help="Beams of the beam search; 1: none.")] = 1,
    device: options.Device = "auto",
    load_4bit: options.Load4bit = False,
    load_8bit: options.Load8bit = False,
    max_resident: options.MaxResident = None,
) -> None:
    """Answer a file of questions in batches, each question with an adapter of its own, in LLaVA's formats.

    A line {"question_id": 3, "image": "3.png", "text": "...", "adapter": "cats"} asks the adapter `cats`; __base__
    stands for the base without an adapter.
    """
    chosen = options.choose_device(device)

    from llava_steering_plugin.checkout.find import find_llava
    from llava_steering_plugin.inference.base_model import load_base
    from llava_steering_plugin.inference.questions import AnswerOptions, BatchAnswers, check_questions, read_questions
    from llava_steering_plugin.inference.sources import load_all, locate_all, read_sources
    from llava_steering_plugin.pool.pool import BASE
    from llava_steering_plugin.upstream.conversations import checked_template
    from llava_steering_plugin.upstream.install import install

    # Check everything that flags and files tell before the model is loaded.
    sources = read_sources(adapter or [])
    default = ask or (next(iter(sources)) if len(sources) == 1 else BASE)
    questions = read_questions(question_file, default)
    check_questions(questions, (BASE, *sources), image_folder)
    find_llava()  # its error says what to do if there is none
    install()
    if conv_mode is not None:
        checked_template(conv_mode)
    check_writable(answers_file)
    folders = locate_all(sources)
    generation = {
        "max_new_tokens": max_new_tokens,
        "num_beams": num_beams,
        "use_cache": True,
        **({"do_sample": True, "temperature": temperature, "top_p": top_p} if temperature else {"do_sample": False}),
    }
    loaded = load_base(
        base, device=chosen, load_4bit=load_4bit, load_8bit=load_8bit, max_resident=max_resident, only_llava=True
    )
    load_all(loaded.pool.load, folders)
    answers = BatchAnswers(loaded, image_folder, AnswerOptions(batch_size, conv_mode, generation))
    failed = 0
    with answers_file.open("w", encoding="utf-8") as file:
        for line in answers.lines(questions):
            file.write(json.dumps(line) + "\n")
            file.flush()
            failed += "error" in line["metadata"]
    if failed:
        raise NotFiniteError(
            f"{failed} of {len(questions)} questions have no answer: the logits became NaN or infinite. In "
            f"{answers_file}, `metadata` names the adapter."
        )
    typer.echo(f"{len(questions)} answers in {answers_file}")


def check_writable(answers: Path) -> None:
    """Create the folder of the answers and check that the file can be written; an existing file stays as it is.

    Raises:
        ArgumentsError: it cannot be written.
    """
    exists = os.path.exists(answers)
    try:
        answers.parent.mkdir(parents=True, exist_ok=True)
        # Leave a pipe alone: its reader would see it opened and closed.
        if not exists or os.path.isfile(answers) or os.path.isdir(answers):
            answers.open("a").close()
        if not exists:
            os.unlink(os.path.realpath(answers))
    except OSError as error:
        raise ArgumentsError(
            f"--answers-file {answers} cannot be written: {error.strerror}. Choose another."
        ) from error
