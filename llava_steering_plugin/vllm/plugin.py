"""The entry point of vLLM's plugin group `vllm.general_plugins`. vLLM calls it in every process, in some twice.

Where it is installed beside vLLM, it changes nothing for models and adapters that are not ours.
"""

from __future__ import annotations

import logging
import os

from llava_steering_plugin.vllm.refusals import ANYWAY, ARCHITECTURE

# The versions of vLLM whose seams were tried (tests/vllm).
TRIED = ("0.32.0",)


def not_tried(version: str) -> str | None:
    """Return what to say of a version of vLLM that was not tried; None: it was, or ANYWAY says to use it."""
    version = version.partition("+")[0]
    if version in TRIED or os.environ.get(ANYWAY) == "1":
        return None
    return (
        f"this is vLLM {version}, and llava-steering-plugin was tried with {', '.join(TRIED)}. Set {ANYWAY}=1 to use "
        "it all the same, and compare answers with transformers' first."
    )


def register() -> None:
    """Put this package's class in the place of vLLM's Llava, and let its LoRA manager read our adapters.

    Does nothing on a version of vLLM that was not tried, unless the environment variable ANYWAY is 1.
    """
    import vllm

    if (problem := not_tried(str(vllm.__version__))) is not None:
        logging.getLogger("vllm.llava_steering").warning("MoReS adapters are not available: %s", problem)
        return
    from vllm import ModelRegistry

    from llava_steering_plugin.vllm.copies import name_folder
    from llava_steering_plugin.vllm.requests import check_requests
    from llava_steering_plugin.vllm.self_check import check_at_start
    from llava_steering_plugin.vllm.worker import read_our_adapters

    # By name: the class is imported where a model is made, and not before a process is forked.
    ModelRegistry.register_model(ARCHITECTURE, "llava_steering_plugin.vllm.model:SteeredLlava")
    name_folder()
    read_our_adapters()
    check_requests()
    check_at_start()
