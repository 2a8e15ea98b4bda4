"""The sub-command `check-data`: finds the samples of a data file that LLaVA cannot be trained on."""

from __future__ import annotations

import json
import os
import sys
from contextlib import ExitStack, redirect_stdout
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from llava_steering_plugin.planning.data_report import DataReport
    from llava_steering_plugin.upstream.text.tokens import TokenCounter

SHOWN = 5  # samples of a kind; `--json` has all


def check_data(
    file: Annotated[str, typer.Argument(metavar="FILE", help="The training data: LLaVA's JSON list of samples.")],
    image_folder: Annotated[
        str | None,
        typer.Option(
            "--image-folder",
            "--image_folder",
            metavar="DIR",
            help="Folder of the images; not given: none is looked at.",
        ),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            "--model_name_or_path",
            "--model-name-or-path",
            metavar="B",
            help="Count tokens with this base's tokenizer: folder or hub id.",
        ),
    ] = None,
    version: Annotated[str, typer.Option(help="The training's conversation template.")] = "v1",
    model_max_length: Annotated[
        int,
        typer.Option(
            "--model_max_length",
            "--model-max-length",
            min=1,
            metavar="N",
            help="Longest sample in tokens; what is longer is cut.",
        ),
    ] = 2048,
    vision_tower: Annotated[
        str | None,
        typer.Option(
            "--vision_tower",
            "--vision-tower",
            help="How many tokens an image becomes; default: the tower that the base names.",
        ),
    ] = None,
    language_model: Annotated[
        str | None,
        typer.Option(
            "--language_model",
            "--language-model",
            metavar="NAME",
            help="The component for the base's language model, as in the training; default: by its model type.",
        ),
    ] = None,
    connector: Annotated[
        str | None,
        typer.Option(
            "--mm_projector_type",
            "--mm-projector-type",
            help="What the connector leaves of an image's tokens; default: the connector that the base names.",
        ),
    ] = None,
    image_aspect_ratio: Annotated[
        str, typer.Option("--image_aspect_ratio", "--image-aspect-ratio", help="As in the training: pad, or square.")
    ] = "pad",
    several_images: Annotated[
        bool, typer.Option("--several-images", help="LLaVA-NeXT trains: a sample may have several images, or a video.")
    ] = False,
    video_folder: Annotated[
        str | None, typer.Option("--video_folder", "--video-folder", metavar="DIR", help="Look here for the videos.")
    ] = None,
    image_grid_pinpoints: Annotated[
        str | None,
        typer.Option(
            "--image_grid_pinpoints",
            "--image-grid-pinpoints",
            help="LLaVA-NeXT: the sizes of pictures in tiles, as in the training.",
        ),
    ] = None,
    mm_patch_merge_type: Annotated[
        str,
        typer.Option(
            "--mm_patch_merge_type",
            "--mm-patch-merge-type",
            help="LLaVA-NeXT: how tiles are joined.",
        ),
    ] = "flat",
    mm_spatial_pool_mode: Annotated[
        str,
        typer.Option("--mm_spatial_pool_mode", "--mm-spatial-pool-mode", help="LLaVA-NeXT: how frames are pooled."),
    ] = "bilinear",
    mm_newline_position: Annotated[
        str,
        typer.Option("--mm_newline_position", "--mm-newline-position", help="LLaVA-NeXT: where lines of a video end."),
    ] = "grid",
    frames_upbound: Annotated[
        int, typer.Option("--frames_upbound", "--frames-upbound", min=0, help="LLaVA-NeXT: the most frames of a video.")
    ] = 0,
    force_sample: Annotated[
        bool, typer.Option("--force_sample", "--force-sample", help="LLaVA-NeXT: take that many of every video.")
    ] = False,
    processes: Annotated[
        int | None, typer.Option(min=1, help="How many work at the same time; default: one per processor, up to 8.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON, all problems named.")] = False,
) -> None:
    """Find all samples that LLaVA cannot be trained on, and count tokens, before a training does.

    The option names are those of the training. Status 1 if there are bad samples.
    """
    from llava_steering_plugin.errors import ArgumentsError
    from llava_steering_plugin.planning.data_check import Checker, usable_processors
    from llava_steering_plugin.planning.data_check import check_data as checked
    from llava_steering_plugin.training.data.sample_checks import SampleChecks, style_of
    from llava_steering_plugin.training.data.source import early_problem

    problems = [problem.removeprefix("--data_path: ").removeprefix("--data_path ") for problem in early_problem(file)]
    if image_folder is not None and not os.path.isdir(image_folder):
        problems.append(f"--image-folder: there is no folder {image_folder}")
    if problems:
        raise ArgumentsError(". ".join(problems) + ".")
    several = several_images or video_folder is not None
    pictures: dict[str, Any] | None = None
    if several:
        pictures = {
            "image_aspect_ratio": image_aspect_ratio,
            "image_grid_pinpoints": image_grid_pinpoints,
            "mm_patch_merge_type": mm_patch_merge_type,
            "mm_spatial_pool_mode": mm_spatial_pool_mode,
            "mm_newline_position": mm_newline_position,
            "frames_upbound": frames_upbound,
            "force_sample": force_sample,
            "image_folder": image_folder,
            "video_folder": video_folder,
        }
    counter = _counter(base, version, model_max_length, vision_tower, connector, language_model, pictures)
    checks = SampleChecks(
        image_folder,
        padded=image_aspect_ratio == "pad",
        style=style_of(version),
        several=several,
        video_folder=video_folder,
    )
    with ExitStack() as stack:
        report = checked(
            file,
            Checker(checks, image_folder is not None, counter),
            keep=None if as_json else SHOWN,
            processes=processes or (usable_processors() if image_folder is not None or counter is not None else 1),
            progress=_Progress(file, stack),
        )
    if as_json:
        typer.echo(json.dumps(report.as_json(counter), indent=2))
    else:
        _print(report, counter)
    raise typer.Exit(0 if report.sound else 1)


def _counter(
    base: str | None,
    version: str,
    longest: int,
    vision_tower: str | None,
    connector: str | None,
    language_model: str | None,
    pictures: dict[str, Any] | None,
) -> TokenCounter | None:
    if base is None:
        return None
    with redirect_stdout(sys.stderr):  # DeepSpeed logs that it has been imported
        from llava_steering_plugin.checkout.find import find_llava
        from llava_steering_plugin.upstream.text.tokens import TokenCounter

        find_llava()  # its error says what to do if there is none
        return TokenCounter(base, version, longest, vision_tower, language_model, connector, pictures)


class _Progress:
    """Shows on standard error how much of the file has been checked, and the time that is left."""

    def __init__(self, file: str, stack: ExitStack):
        self.size = os.path.getsize(file) if os.path.isfile(file) else None
        self.stack = stack
        self.bar: Any = None

    def __call__(self, samples: int, position: int) -> None:
        if self.bar is None:  # later than the processes are started: its thread must not be in them
            from tqdm import tqdm

            seconds = 0.2 if sys.stderr.isatty() else 10
            self.bar = self.stack.enter_context(
                tqdm(total=self.size, unit="B", unit_scale=True, desc="checking", mininterval=seconds)
            )
        self.bar.set_postfix_str(f"{samples:,} samples", refresh=False)
        self.bar.update(position - self.bar.n)


def _print(report: DataReport, counter: TokenCounter | None) -> None:
    from llava_steering_plugin.cli.tables import console, data_table

    if report.file_problem is not None:
        typer.echo(f"PROBLEM: {report.file_problem}" + " Before that:\n" * bool(report.samples))
    share = f" ({report.text_only / report.samples:.1%})" if report.samples else ""
    typer.echo(f"{report.samples:,} samples, {report.text_only:,} without an image{share}; {report.bad:,} bad")
    if report.bad:
        console(plain=True).print(data_table(report))
    if counter is not None and report.lengths:
        shares = ", ".join(f"{share} %: {value:,}" for share, value in report.percentiles().items())
        typer.echo(
            f"tokens of a sample, an image as {counter.image_tokens}: {shares}, longest: {max(report.lengths):,}\n"
            f"longer than {report.longest:,}, and cut: {report.cut:,} ({report.cut / len(report.lengths):.1%})"
        )
        if report.nothing_left:
            first = ", ".join(str(index) for index in report.first_with_nothing_left[:SHOWN])
            typer.echo(
                f"nothing to learn: {report.nothing_left:,} (samples {first}, ...): their answers are cut off, or "
                "LLaVA masks them because it cannot tell question and answer apart"
            )
    if report.repeated_ids:
        typer.echo(f"note: {report.repeated_ids:,} samples have the id of an earlier one; LLaVA does not mind")
    for note in report.notes:
        typer.echo(f"note: {note}")
    if report.bad:
        typer.echo("A training ends at the first bad sample; --skip_bad_samples trains others in their places.")
