"""Note at LLaVA's dataset where its samples come from and what they are checked for, in trainings with a mode."""

from __future__ import annotations

import json
import os
from argparse import Namespace
from collections.abc import Callable
from typing import Any

from llava_steering_plugin.training.attaching import REQUEST
from llava_steering_plugin.training.data.sample_checks import ALTERNATING, PLAIN, SINGLE, SampleChecks
from llava_steering_plugin.training.data.source import SOURCE, DataSource, check_entries, reading, refuse_bad_entries
from llava_steering_plugin.training.settings.flags import mode_is_on
from llava_steering_plugin.upstream.text.chat_templates import is_chat_template

QUICKLY_READ = 64 << 20  # bytes
# Values of --version for which LLaVA leaves the template as it is.
KEEPING_THE_TEMPLATE = ("v0", "v0.5")
# LLaVA-NeXT has a flag of this name, and reads several images in a sample; LLaVA does neither.
VIDEOS = "video_folder"


def with_source(original: Callable[..., Any], instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Wrap the constructor of LLaVA's dataset.

    Raises:
        DataError: the data file cannot be read, or is no list of samples.
    """
    request = REQUEST.get()
    if request is None or not mode_is_on(request.flags):
        original(*args, **kwargs)
        return
    path = str(args[0] if args else kwargs["data_path"])
    with reading(path):
        original(*args, **kwargs)
    settings = instance.data_args
    processor = getattr(settings, "image_processor", None)
    source = DataSource(
        path,
        SampleChecks(
            getattr(settings, "image_folder", None),
            padded=getattr(settings, "image_aspect_ratio", None) == "pad",
            style=template_style(),
            edge=_shorter_edge(processor),
            several=hasattr(settings, VIDEOS),
            video_folder=getattr(settings, VIDEOS, None),
        ),
        getattr(request.flags, "version", None),
    )
    setattr(instance, SOURCE, source)
    check_entries(instance.list_data_dict, source, images_work=processor is not None)


def refuse_bad_data(flags: Namespace) -> None:
    """Read the data files of a training with a mode and check their entries, if that takes a second at most.

    LLaVA reads them once it has loaded the model, and the training looks at them again then.

    Raises:
        DataError: one cannot be read, is no list of samples, or holds a bad one and these are not skipped.
    """
    for path in filter(None, (flags.data_path, getattr(flags, "eval_data_path", None))):
        if not os.path.isfile(path) or os.path.getsize(path) > QUICKLY_READ:
            continue
        with reading(path), open(path) as file:  # in the encoding of the locale, as LLaVA opens it
            entries = json.load(file)
        checks = SampleChecks(
            flags.image_folder,
            padded=flags.image_aspect_ratio == "pad",
            style=template_style(flags.version),
            several=hasattr(flags, VIDEOS),
            video_folder=getattr(flags, VIDEOS, None),
        )
        source = DataSource(path, checks, flags.version)
        check_entries(entries, source, images_work=flags.vision_tower is not None)
        if not flags.skip_bad_samples:
            refuse_bad_entries(entries, source)


def template_style(version: str | None = None) -> str:
    """Return how LLaVA's `preprocess` reads turns.

    Args:
        version: of the conversation template, as --version names it; None: the one that LLaVA has set.
    """
    from llava import conversation

    template = conversation.default_conversation
    if version is not None and version not in KEEPING_THE_TEMPLATE:
        templates = conversation.conv_templates
        template = templates.get(version, templates["vicuna_v1"])
    if template.sep_style.name == "PLAIN":
        return PLAIN
    if (
        is_chat_template(template)
        or template.sep_style.name == "LLAMA_2"
        or template.version.startswith("v1")
        or template.version == "mpt"
    ):
        return ALTERNATING
    return SINGLE


def _shorter_edge(processor: Any) -> int:
    """Return to how many pixels an image processor shrinks the shorter side; 336, LLaVA-1.5's, if it does not say."""
    size = getattr(processor, "size", None)
    edge = size.get("shortest_edge") if isinstance(size, dict) else None
    return edge if isinstance(edge, int) else 336
