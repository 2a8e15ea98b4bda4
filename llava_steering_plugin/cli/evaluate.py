"""The sub-command `llava-steering eval`: from its flags to a file of answers."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llava_steering_plugin.errors import ArgumentsError
from llava_steering_plugin.serving import options as flags

if TYPE_CHECKING:
    from llava_steering_plugin.adapters.folder import AdapterFolder


def evaluate(
    base: Annotated[str, typer.Argument(metavar="BASE", help="The base model, a LLaVA: folder or hub id.")],
    question_file: Annotated[Path, typer.Option(help="LLaVA's question.jsonl; a line may name an adapter.")],
    image_folder: Annotated[Path, typer.Option(help="Where the images are that the questions name.")],
    answers_file: Annotated[Path, typer.Option(help="LLaVA's answer.jsonl, written anew.")],
    adapter: Annotated[
        list[str] | None, typer.Option(metavar="[NAME=]ADAPTER", help="An adapter: folder or hub id. Repeat it.")
    ] = None,
    ask: Annotated[
        str | None, typer.Option(metavar="NAME", help="Who answers lines that name none; default: the one adapter.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Questions that are answered at once.")] = 8,
    conv_mode: Annotated[
        str | None, typer.Option(help="LLaVA's conversation template; default: each adapter's own.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of the longest answer.")] = 128,
    temperature: Annotated[float, typer.Option(min=0, help="0: always the most likely answer.")] = 0.0,
    top_p: Annotated[float | None, typer.Option(min=0, max=1)] = None,
    num_beams: Annotated[int, typer.Option(min=1)] = 1,
    device: flags.Device = "auto",
    load_4bit: flags.Load4bit = False,
    load_8bit: flags.Load8bit = False,
    max_resident: flags.MaxResident = None,
) -> None:
    """Answer a file of questions in batches, each question with an adapter of its own, in LLaVA's formats.

    A line {"question_id": 3, "image": "3.png", "text": "...", "adapter": "cats"} asks the adapter `cats`; __base__ is
    the base without any.
    """
    chosen = flags.chosen_device(device)

    from llava_steering_plugin.checkout.find import find_llava
    from llava_steering_plugin.inference.questions import Asking, BatchAnswers, check_questions, read_questions
    from llava_steering_plugin.inference.sources import locate_all, read_sources
    from llava_steering_plugin.pool.pool import BASE
    from llava_steering_plugin.upstream.conversations import checked_template
    from llava_steering_plugin.upstream.install import install

    # What flags and files can tell is found before a model is loaded.
    sources = read_sources(adapter or [])
    asked = ask or (next(iter(sources)) if len(sources) == 1 else BASE)
    questions = read_questions(question_file, asked)
    check_questions(questions, (BASE, *sources), image_folder)
    find_llava()  # says what to do where there is none
    install()
    if conv_mode is not None:
        checked_template(conv_mode)
    _check_writable(answers_file)
    folders = locate_all(sources)
    generation = {
        "max_new_tokens": max_new_tokens,
        "num_beams": num_beams,
        "use_cache": True,
        **({"do_sample": True, "temperature": temperature, "top_p": top_p} if temperature else {"do_sample": False}),
    }
    pool, tokenizer, processor = _pool(base, folders, chosen, load_4bit, load_8bit, max_resident)
    answers = BatchAnswers(pool, tokenizer, processor, image_folder, Asking(batch_size, conv_mode, generation))
    with answers_file.open("w", encoding="utf-8") as file:
        for line in answers.to(questions):
            file.write(json.dumps(line) + "\n")
            file.flush()
    typer.echo(f"{len(questions)} answers in {answers_file}")


def _check_writable(answers: Path) -> None:
    """Makes the folder of the answers and looks whether they can be written; what is there already stays as it is."""
    there = os.path.exists(answers)
    try:
        answers.parent.mkdir(parents=True, exist_ok=True)
        if not there or os.path.isfile(answers) or os.path.isdir(answers):  # opening a pipe would tell its other end
            answers.open("a").close()
        if not there:
            os.unlink(os.path.realpath(answers))
    except OSError as error:
        raise ArgumentsError(
            f"--answers-file {answers} cannot be written: {error.strerror}. Choose another."
        ) from error


def _pool(
    base: str,
    folders: dict[str, AdapterFolder],
    device: str,
    load_4bit: bool,
    load_8bit: bool,
    max_resident: int | None,
) -> tuple[Any, Any, Any]:
    """The pool with all adapters, the tokenizer and the image processor."""
    from llava.model.builder import load_pretrained_model

    from llava_steering_plugin.inference.base_model import described, is_llava, loading, loading_name
    from llava_steering_plugin.inference.sources import load_all
    from llava_steering_plugin.pool.pool import AdapterPool

    config = described(base, " Give the base that the adapters were trained on.")
    if not is_llava(config):
        raise ArgumentsError(f"{base} is no LLaVA (its config.json has no mm_vision_tower); give the adapters' base.")
    name = loading_name(base, config)
    with loading(base):
        tokenizer, model, processor, _ = load_pretrained_model(base, None, name, load_8bit, load_4bit, device=device)
    pool = AdapterPool(model, tokenizer, max_resident=max_resident)
    load_all(pool.load, folders)
    return pool, tokenizer, processor
