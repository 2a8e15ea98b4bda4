"""Says what in the settings of an engine excludes MoReS: what would give other answers, and no error."""

from __future__ import annotations

import os
from typing import Any

ARCHITECTURE = "LlavaForConditionalGeneration"
# The names of the linears for --lora-target-modules (layers.py).
TARGETS = ("steering", "steering_tokens")
# The flag with which slots hold projectors of adapters' own.
PROJECTORS = "--enable-tower-connector-lora"
# The environment variable that allows what was not tried, if it is 1.
ANYWAY = "LLAVA_STEERING_UNTRIED_VLLM"


def asked_for(vllm_config: Any) -> bool:
    """Say whether the engine was started for MoReS: its linears are among the target modules."""
    targets = vllm_config.lora_config.target_modules
    return targets is not None and bool(set(TARGETS) & set(targets))


def refused(vllm_config: Any) -> list[str]:
    """List what excludes MoReS in an engine with these settings, one clause each.

    Args:
        vllm_config: of vLLM, whole.
    """
    parallel, lora = vllm_config.parallel_config, vllm_config.lora_config
    architectures = list(vllm_config.model_config.architectures or [])
    problems = []
    if ARCHITECTURE not in architectures:
        problems.append(
            f"the model is a {', '.join(architectures) or 'model without architecture'}, and MoReS runs on "
            f"{ARCHITECTURE} alone: what `llava-steering export` writes"
        )
    if lora is None:
        return [*problems, "LoRA is off: start vLLM with --enable-lora"]
    if lora.target_modules is not None and (missing := [name for name in TARGETS if name not in lora.target_modules]):
        problems.append(f"--lora-target-modules does not name {' and '.join(missing)}")
    if parallel.pipeline_parallel_size > 1:
        problems.append(
            "--pipeline-parallel-size is larger than 1, and only the first stage knows which tokens are an image's. "
            "Use --tensor-parallel-size"
        )
    if getattr(parallel, "enable_dbo", False) or getattr(parallel, "ubatch_size", 0):
        problems.append("--enable-dbo cuts batches in two, and the list of steered tokens is that of a whole batch")
    if getattr(parallel, "prefill_context_parallel_size", 1) > 1:
        problems.append("--prefill-context-parallel-size cuts prompts among devices, and each would need its own list")
    if vllm_config.speculative_config is not None:
        problems.append("--speculative-config is set, and drafts were not compared with answers that MoReS steers")
    graphs = vllm_config.device_config.device_type != "cpu" and not vllm_config.model_config.enforce_eager
    if graphs and os.environ.get(ANYWAY) != "1":
        problems.append(
            "MoReS was not tried in CUDA graphs: start vLLM with --enforce-eager, or set "
            f"{ANYWAY}=1 and compare answers with transformers' first"
        )
    return problems
