"""List the benchmarks that `llava-steering prepare` knows."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from llava_steering_plugin.errors import ArgumentsError, nearest
from llava_steering_plugin.evaluation.layouts import bitmaps, choices, instructions, scenes, vqa
from llava_steering_plugin.evaluation.layouts.entry import Entry


@dataclass(frozen=True)
class Layout:
    """The official layout of a benchmark.

    Attributes:
        read: yields the questions of a split. Raises DataError.
        splits: the splits that there are; the first is the default.
    """

    read: Callable[[Path, str], Iterable[Entry]]
    splits: tuple[str, ...]


_ALL, _DEV = ("train", "val", "test"), ("train", "dev", "test")

LAYOUTS = {
    "vqav2": Layout(vqa.vqav2, _ALL),
    "okvqa": Layout(vqa.okvqa, ("train", "val")),
    "textvqa": Layout(vqa.textvqa, _ALL),
    "vizwiz": Layout(vqa.vizwiz, _ALL),
    "gqa": Layout(scenes.gqa, ("train", "val", "testdev", "test")),
    "scienceqa": Layout(choices.scienceqa, _ALL),
    "scienceqa_img": Layout(choices.scienceqa_img, _ALL),
    "iconqa_text": Layout(choices.iconqa_text, _ALL),
    "iconqa_blank": Layout(choices.iconqa_blank, _ALL),
    "flickr30k": Layout(instructions.flickr30k, _ALL),
    "vision_flan": Layout(instructions.vision_flan, ("train",)),
    "pope": Layout(scenes.pope, ("test", *scenes.POPE_SPLITS)),
    "mme": Layout(scenes.mme, ("test",)),
    "mmvet": Layout(scenes.mmvet, ("test",)),
    "hallusionbench": Layout(scenes.hallusionbench, ("test",)),
    "vsr": Layout(scenes.vsr, (*_DEV, *(f"zeroshot_{split}" for split in _DEV))),
    "snli_ve": Layout(scenes.snli_ve, _DEV),
    "cifar10": Layout(bitmaps.cifar10, ("train", "test")),
    "cifar100": Layout(bitmaps.cifar100, ("train", "test")),
    "mnist": Layout(bitmaps.mnist, ("train", "test")),
    "hellaswag": Layout(choices.hellaswag, _ALL),
    "mmlu": Layout(choices.mmlu, ("test", "val", "dev")),
}


def layout_of(task: str, split: str | None) -> tuple[Layout, str]:
    """Return the layout of a benchmark, and the split that is meant.

    Raises:
        ArgumentsError: there is no such benchmark or split.
    """
    if task not in LAYOUTS:
        hint = nearest(task, LAYOUTS)
        raise ArgumentsError(f"there is no layout for {task!r}: {hint}known: {', '.join(LAYOUTS)}.")
    layout = LAYOUTS[task]
    chosen = split or layout.splits[0]
    if chosen not in layout.splits:
        raise ArgumentsError(f"{task} has no split {chosen!r}: it has {', '.join(layout.splits)}.")
    return layout, chosen
