"""The sub-command `eval`: from its options to a file of answers."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llava_steering_plugin.errors import ArgumentsError, NotFiniteError, Problems
from llava_steering_plugin.inference import options
from llava_steering_plugin.whole_files import write_whole

if TYPE_CHECKING:
    from llava_steering_plugin.inference.asking.questions import Question


def evaluate(
    base: Annotated[
        str, typer.Argument(metavar="BASE", help="The base model: folder or hub id of a LLaVA, or a LoRA.")
    ],
    question_file: Annotated[
        Path, typer.Option(help="LLaVA's question.jsonl; lines may name adapters and several images.")
    ],
    image_folder: Annotated[Path, typer.Option(help="Folder of the images that the questions name.")],
    answers_file: Annotated[Path, typer.Option(help="LLaVA's answer.jsonl; a complete one is overwritten.")],
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
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
    device: options.Device = "auto",
    load_4bit: options.Load4bit = False,
    load_8bit: options.Load8bit = False,
    max_resident: options.MaxResident = None,
    timing: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Afterwards, time a batch beside the base's; write both as JSON."),
    ] = None,
) -> None:
    """Answer a file of questions in batches, each question with an adapter of its own, in LLaVA's formats.

    A line {"question_id": 3, "image": "3.png", "text": "...", "adapter": "cats"} asks the adapter `cats`; __base__
    stands for the base without an adapter. After an interruption, the same command goes on where it ended.
    """
    problems = Problems()
    chosen = device
    with problems.noted():
        chosen = options.choose_device(device)
    with problems.noted():
        options.check_bits(load_4bit, load_8bit, device)

    from llava_steering_plugin.adapters.stored.folder import PEFT_CONFIG
    from llava_steering_plugin.checkout.find import find_llava
    from llava_steering_plugin.inference.asking.answering import AnswerOptions, BatchAnswers
    from llava_steering_plugin.inference.asking.answers_file import AnswersFile, contents_of
    from llava_steering_plugin.inference.asking.question_lengths import check_lengths
    from llava_steering_plugin.inference.asking.questions import check_questions, read_questions
    from llava_steering_plugin.inference.asking.timing import time_answers
    from llava_steering_plugin.inference.base_files import check_adapters_fit, is_llava, no_llava
    from llava_steering_plugin.inference.base_model import load_base, read_base_config
    from llava_steering_plugin.inference.models import base_of_lora, is_lora, load_adapter_and_base, open_model
    from llava_steering_plugin.inference.sources import load_all, locate_all, read_sources
    from llava_steering_plugin.pool.pool import BASE
    from llava_steering_plugin.upstream.install import install
    from llava_steering_plugin.upstream.text.conversations import checked_template

    # Check everything that flags and files tell before the model is loaded.
    with problems.noted():
        find_llava()  # its error says what to do if there is none
        install()
        if conv_mode is not None:
            checked_template(conv_mode)
    sources = read_sources(adapter or [], problems)
    folders = locate_all(sources, problems)
    questions: list[Question] = []
    with problems.noted():
        questions = read_questions(question_file, ask or (next(iter(sources)) if len(sources) == 1 else BASE))
    with problems.noted():
        check_questions(questions, (BASE, *sources), image_folder)
    with problems.noted():
        check_writable(answers_file, "--answers-file")
    if timing is not None:
        with problems.noted():
            check_writable(timing, "--timing")
    config: dict[str, Any] = {}
    with problems.noted():
        config = read_base_config(base, " Give the base that the adapters were trained on.")
        if not is_llava(config):
            raise no_llava(base, config)
        check_adapters_fit(folders, base, config)
    if config and questions and not problems.errors:
        templates = {name: conv_mode or folder.config.conversation for name, folder in folders.items()}
        with problems.noted():
            words_of = base_of_lora(Path(base).expanduser() / PEFT_CONFIG) if is_lora(base) else base
            notes = check_lengths(
                questions, image_folder, words_of, config, {BASE: conv_mode, **templates}, max_new_tokens
            )
            for note in notes:
                typer.echo(f"note: {note}", err=True)
    generation = {
        "max_new_tokens": max_new_tokens,
        "num_beams": num_beams,
        "use_cache": True,
        **({"do_sample": True, "temperature": temperature, "top_p": top_p} if temperature else {"do_sample": False}),
    }
    settings = {
        "base": [str(base), contents_of(base, hashed=False)],
        "adapters": {name: contents_of(folder, hashed=True) for name, folder in folders.items()},
        "batch size": batch_size,
        "conversation template": conv_mode,
        "seed": seed,
        "bits": 4 if load_4bit else 8 if load_8bit else 16,
        "device": chosen.partition(":")[0],
        **generation,
    }
    file = AnswersFile(answers_file, settings)
    already = 0
    with problems.noted():
        already = file.answered(questions, batch_size) if not problems.errors else int(file.check())
    problems.raise_any("these questions cannot be answered")
    if already:
        typer.echo(f"{already} of {len(questions)} answers are there; the rest follows", err=True)
    answers: BatchAnswers | None = None
    if already < len(questions) or (timing is not None and questions):
        how: dict[str, Any] = {"device": chosen, "load_4bit": load_4bit, "load_8bit": load_8bit}
        if is_lora(base):
            loaded = open_model(base, None, how).loaded
        elif len(folders) == 1:  # one alone may bring what it could not share with others, such as tokens
            ((name, folder),) = folders.items()
            loaded = load_adapter_and_base(name, folder.read(), base, how)
        else:
            loaded = load_base(base, **how, max_resident=max_resident, only_llava=True)
            load_all(loaded.pool.load, folders)
        answers = BatchAnswers(loaded, image_folder, AnswerOptions(batch_size, conv_mode, generation, seed))
    file.write(answers.batches(questions, already) if answers is not None and already < len(questions) else (), already)
    if timing is not None and answers is not None:
        write_timing(timing, time_answers(answers, questions))
    if file.failed:
        raise NotFiniteError(
            f"{file.failed} of {len(questions)} questions have no answer: the logits became NaN or infinite. In "
            f"{answers_file}, `metadata` names the adapter."
        )
    typer.echo(f"{len(questions)} answers in {answers_file}")


def write_timing(file: Path, times: dict[str, Any]) -> None:
    """Write what `time_answers` has found.

    Raises:
        ArgumentsError: it cannot be written.
    """
    try:
        write_whole(file, json.dumps(times) + "\n")
    except OSError as error:
        raise ArgumentsError(f"--timing {file} cannot be written: {error.strerror}. Choose another.") from error


def check_writable(answers: Path, option: str) -> None:
    """Create the folder of a file and check that the file can be written; an existing file stays as it is.

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
        raise ArgumentsError(f"{option} {answers} cannot be written: {error.strerror}. Choose another.") from error
