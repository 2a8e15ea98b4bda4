"""Note at LLaVA's dataset where its samples come from and what they are checked for, in trainings with a mode."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llava_steering_plugin.training.attaching import REQUEST
from llava_steering_plugin.training.data_source import SOURCE, DataSource, check_entries, reading
from llava_steering_plugin.training.flags import mode_is_on
from llava_steering_plugin.training.sample_checks import ALTERNATING, PLAIN, SINGLE, SampleChecks


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
        ),
        getattr(request.flags, "version", None),
    )
    setattr(instance, SOURCE, source)
    check_entries(instance.list_data_dict, source, images_work=processor is not None)


def template_style() -> str:
    """Return how LLaVA's `preprocess` reads turns in the conversation template that it has now."""
    from llava import conversation

    template = conversation.default_conversation
    if template.sep_style.name == "PLAIN":
        return PLAIN
    if template.sep_style.name == "LLAMA_2" or template.version.startswith("v1") or template.version == "mpt":
        return ALTERNATING
    return SINGLE


def _shorter_edge(processor: Any) -> int:
    """Return to how many pixels an image processor shrinks the shorter side; 336, LLaVA-1.5's, if it does not say."""
    size = getattr(processor, "size", None)
    edge = size.get("shortest_edge") if isinstance(size, dict) else None
    return edge if isinstance(edge, int) else 336
