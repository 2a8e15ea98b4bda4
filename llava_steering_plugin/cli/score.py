"""The sub-command `score`: from a file of answers to the numbers of a benchmark."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def score(
    task: Annotated[
        str, typer.Argument(metavar="TASK", help="The benchmark, such as vqav2; docs/evaluation.md has all.")
    ],
    answers: Annotated[Path, typer.Argument(metavar="ANSWERS", help="LLaVA's answer.jsonl, as `eval` writes it.")],
    annotations: Annotated[Path, typer.Option(help="The benchmark's official file or folder.")],
    output: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the scores as JSON.")] = None,
    submission: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write what the test server or the judge takes.")
    ] = None,
    per_question: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the score of each question, one JSON object a line.")
    ] = None,
    split: Annotated[str | None, typer.Option(help="Part of the benchmark, where its files name several.")] = None,
    questions: Annotated[Path | None, typer.Option(help="LLaVA's question file; for pope alone.")] = None,
    allow_missing: Annotated[
        bool, typer.Option("--allow-missing", help="Leave out questions that have no answer, and count them.")
    ] = False,
) -> None:
    """Score the answers to a benchmark by its official rule.

    All answers must be to questions of the annotations, one to each. Nothing is downloaded.
    """
    from llava_steering_plugin.cli.tables import console, score_table
    from llava_steering_plugin.evaluation.scoring import check_writable, write_json, write_points
    from llava_steering_plugin.evaluation.scoring import score as scored

    for file in (submission, per_question, output):
        if file is not None:
            check_writable(file)
    found = scored(
        task,
        answers,
        annotations,
        split=split,
        questions=questions,
        allow_missing=allow_missing,
        submission=submission is not None,
        per_question=per_question is not None,
    )
    if submission is not None:
        write_json(submission, found.submission)
    if per_question is not None and found.points is not None:
        write_points(per_question, found.points)
    if output is not None:
        write_json(output, found.as_json())
    if found.metrics:
        console(plain=True).print(score_table(found))
    typer.echo(f"{found.answers:,} answers, {found.missing:,} missing")
    for note in found.notes:
        typer.echo(f"note: {note}")
    for file in (submission, per_question, output):
        if file is not None:
            typer.echo(str(file))
