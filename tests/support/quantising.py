"""4-bit and 8-bit models without a GPU, which transformers 4.37 refuses although bitsandbytes can."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

if TYPE_CHECKING:
    from asking import Asker


@contextlib.contextmanager
def quantising_on_cpu() -> Iterator[None]:
    """In the block, `from_pretrained` takes the processor for a device that can be quantised on; nothing else does."""
    import bitsandbytes
    import torch
    from transformers import PreTrainedModel, modeling_utils

    from llava_steering_plugin.inference import options

    original = PreTrainedModel.from_pretrained.__func__

    def from_pretrained(cls: Any, *args: Any, **kwargs: Any) -> Any:
        if not (kwargs.get("quantization_config") or kwargs.get("load_in_4bit") or kwargs.get("load_in_8bit")):
            return original(cls, *args, **kwargs)
        with mock.patch.object(torch.cuda, "is_available", lambda: True):
            model = original(cls, *args, **kwargs | {"device_map": {"": "cpu"}})
        # With a device map, transformers takes it for a model that is spread over several devices.
        model.hf_device_map = {}
        return model

    with (
        # It asks for a GPU too, and later for the size of the model.
        mock.patch.object(modeling_utils, "is_bitsandbytes_available", lambda: True),
        mock.patch.object(options, "can_pack", lambda device: True),
        mock.patch.object(PreTrainedModel, "from_pretrained", classmethod(from_pretrained)),
        # On processors with these instructions an evaluation repacks the weights for good, and training after it gets
        # no gradient from them.
        mock.patch.object(bitsandbytes.nn.modules, "has_avx512bf16", lambda: False),
    ):
        yield


def quantised_asker(images: Path, bits: int) -> Asker:
    """The Python API with `load_4bit` or `load_8bit`; loads in this process."""
    from asking import Asker
    from llava.mm_utils import get_model_name_from_path
    from llava.model.builder import load_pretrained_model

    def load(path: str, base: str | None) -> tuple[Any, Any, Any]:
        with quantising_on_cpu():
            how = {f"load_{bits}bit": True}
            loaded = load_pretrained_model(path, base, get_model_name_from_path(path), device="cpu", **how)
        return loaded[:3]

    asker = Asker(images)
    vars(asker)["load"] = functools.cache(load)
    return asker


if __name__ == "__main__":
    # In place of `python -m llava_steering_plugin.launch`, for programs that quantise.
    from llava_steering_plugin.launch import main

    with quantising_on_cpu():
        main()
