"""Find flags of LLaVA that cannot be combined with a tuning mode, and say why."""

from __future__ import annotations

import os
from argparse import Namespace
from importlib.util import find_spec

from llava_steering_plugin.errors import ArgumentsError
from llava_steering_plugin.training.deepspeed_config import ZERO, read_deepspeed
from llava_steering_plugin.training.settings.diagnostics_flags import diagnostics_problems
from llava_steering_plugin.training.settings.trainer_flags import trainer_problems
from llava_steering_plugin.training.settings.validation_flags import validation_problems

DATA_PARALLEL = (
    "{0} GPUs in one process (nn.DataParallel) lose the token map. Start one process per GPU: "
    "torchrun --nproc_per_node {0} ... or deepspeed ..., or show the process one GPU only (CUDA_VISIBLE_DEVICES=0)"
)
NO_FSDP = (
    "FSDP flattens adapter parameters together with frozen ones (version 1), or leaves every process a part of them, "
    "which no adapter is gathered from (version 2); use DeepSpeed ZeRO or plain DDP"
)
_REASONS = {
    "lora_enable": "LoRA is a tuning mode of its own; remove one of the two",
    "tune_mm_mlp_adapter": "it trains the projector alone (stage 1); run that first, without a mode. For an adapter of "
    "the projector alone, give --tuning_mode projector in its place",
    "tune_mm_vision_resampler": "it trains the resampler, which no adapter holds",
    "unfreeze_mm_vision_tower": "it trains the vision tower, which no adapter holds",
    "unfreeze_language_model": "it trains the language model; a mode trains an adapter in its place",
    "fsdp": NO_FSDP,
    "fsdp_config": NO_FSDP,
    "fsdp_min_num_params": NO_FSDP,
    "fsdp_transformer_layer_cls_to_wrap": NO_FSDP,
}
# Of LLaVA-NeXT.
_TUNABLE = "mm_tunable_parts"
_PROJECTOR_ALONE = "mm_mlp_adapter"


def conflicts(flags: Namespace) -> list[str]:
    """Return a line for each flag that cannot be combined with a tuning mode."""
    found = [
        f"--{name} cannot be combined with a tuning mode: {reason}"
        for name, reason in _REASONS.items()
        if getattr(flags, name, None)
    ]
    found += _tunable_parts(flags)
    found += _deepspeed_conflicts(flags) + trainer_problems(flags)
    return found + validation_problems(flags) + diagnostics_problems(flags)


def _tunable_parts(flags: Namespace) -> list[str]:
    parts = getattr(flags, _TUNABLE, None)
    if not parts or parts == _PROJECTOR_ALONE:
        return []
    named = [part.strip() for part in parts.split(",")]
    hint = f"write --{_TUNABLE} {_PROJECTOR_ALONE}, or leave the flag out: both train the adapter and the projector"
    if _PROJECTOR_ALONE not in named:
        hint = "leave the flag out, and write --freeze_mm_mlp_adapter True if the projector is to stay as it is"
    return [
        f"--{_TUNABLE} {parts} cannot be combined with a tuning mode, which keeps vision tower, resampler and language "
        f"model frozen; {hint}"
    ]


def _deepspeed_conflicts(flags: Namespace) -> list[str]:
    """Return what cannot be combined with the file of --deepspeed; transformers reports a file that is missing."""
    path = getattr(flags, "deepspeed", None)
    if not path or not os.path.isfile(path):
        return []
    try:
        config = read_deepspeed(path)
    except ArgumentsError as error:
        return [str(error)]
    problems = []
    stage = config[ZERO]["stage"]
    if stage == 0:
        # Without ZeRO it writes no part for any rank, so `integrity` would take every checkpoint for damaged.
        problems.append(
            f"--deepspeed {path} has no ZeRO stage: DeepSpeed then shards nothing, and its checkpoints cannot be "
            "checked for completeness. Leave out --deepspeed and start with torchrun, or use stage 2"
        )
    if flags.bits in (4, 8) and stage == 3:
        problems.append(
            f"--bits {flags.bits} with ZeRO-3: transformers cannot shard quantised weights; use ZeRO-2, or torchrun "
            "without --deepspeed"
        )
    if flags.mm_projector_lr is not None and "optimizer" in config:
        problems.append(
            f"--mm_projector_lr with the optimizer of {path}: that optimizer has one learning rate for all parameters; "
            "remove `optimizer` and `scheduler` from the file, or the flag"
        )
    if cpu := cpu_flag(flags):
        problems.append(
            f"{cpu} with --deepspeed: transformers then starts without DeepSpeed's ranks; remove {cpu} and train "
            "through `llava_steering_plugin.launch --cpu`"
        )
    return problems


def zero_stage(flags: Namespace) -> int | None:
    """Return the stage of ZeRO in the file of --deepspeed; None without one that can be read."""
    path = getattr(flags, "deepspeed", None)
    try:
        return int(read_deepspeed(path)[ZERO]["stage"]) if path and os.path.isfile(path) else None
    except ArgumentsError:
        return None  # `conflicts` says what is wrong


def cpu_flag(flags: Namespace) -> str | None:
    """Return the flag that keeps a training on the CPU, by its new or its old name; None if neither is given."""
    return next((f"--{name}" for name in ("use_cpu", "no_cuda") if getattr(flags, name, False)), None)


def packing_problems(flags: Namespace) -> list[str]:
    """Return the problem that packed weights are without a GPU: transformers would say it once it loads the model."""
    import torch
    from transformers import modeling_utils

    bits = getattr(flags, "bits", 16)
    if bits not in (4, 8):
        return []
    if find_spec("bitsandbytes") is None:
        return [f"--bits {bits} needs bitsandbytes: pip install bitsandbytes"]
    can_pack = getattr(modeling_utils, "is_bitsandbytes_available", lambda: True)  # on the pin: whether there is a GPU
    if can_pack() and not (torch.cuda.is_available() and cpu_flag(flags)):
        return []
    return [f"--bits {bits} needs a GPU: transformers packs weights on one alone, and this training would have none"]
