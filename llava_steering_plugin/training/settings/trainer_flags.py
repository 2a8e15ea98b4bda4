"""Find flags of transformers' Trainer that cannot work, or would have no effect, in a training with a tuning mode.

transformers accepts them, and then dies in the first step, dies in the first evaluation, or ignores them.
"""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import Any

from llava_steering_plugin.errors import nearest

NO_PREDICTIONS = "it has no effect: a training computes losses only; ask questions with `llava-steering eval`"
NO_EFFECT_WHILE_TRAINING = "it has no effect on evaluations while training, which compute as the training does"
ONE_FORMAT = "adapters are always saved as safetensors"


def _is_set(value: Any) -> bool:
    return bool(value)


def _is_off(value: Any) -> bool:
    return value is False


def _is_number(value: Any) -> bool:
    return value is not None


# Flag: when it is a problem, and why.
REFUSED: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "label_smoothing_factor": (_is_set, "LLaVA computes the loss itself, on labels that move when images are inserted"),
    "neftune_noise_alpha": (_is_number, "LLaVA embeds its texts as one row, where transformers' noise wants a batch"),
    "past_index": (lambda value: value >= 0, "LLaVA's models take no such input"),
    "remove_unused_columns": (_is_set, "it would remove the images from the samples; leave it out, as LLaVA does"),
    "label_names": (_is_set, "it has no effect: LLaVA's labels are `labels`"),
    "auto_find_batch_size": (
        _is_set,
        "after an out-of-memory it would start again from half-trained weights; `llava-steering plan` tells which "
        "--per_device_train_batch_size fits",
    ),
    "dispatch_batches": (_is_set, "LLaVA's batches cannot be handed from one rank to the others"),
    "do_predict": (_is_set, NO_PREDICTIONS),
    "include_inputs_for_metrics": (_is_set, NO_PREDICTIONS),
    "bf16_full_eval": (_is_set, NO_EFFECT_WHILE_TRAINING),
    "fp16_full_eval": (_is_set, NO_EFFECT_WHILE_TRAINING),
    "jit_mode_eval": (_is_set, NO_EFFECT_WHILE_TRAINING),
    "use_legacy_prediction_loop": (_is_set, NO_EFFECT_WHILE_TRAINING),
    "use_ipex": (_is_set, "it replaces modules that the adapter is attached to"),
    "save_safetensors": (_is_off, ONE_FORMAT),
    "lora_weight_path": (_is_set, "no LoRA is loaded; merge it into the base first"),
}
# Packages that an optimizer needs, by the beginning of its name in transformers.
_OPTIMIZER_PACKAGES = {
    "adamw_apex": "apex",
    "adamw_anyprecision": "torchdistx",
    "adamw_torch_xla": "torch_xla",
    "adamw_torch_npu": "torch_npu",
    "adamw_bnb": "bitsandbytes",
    "adamw_8bit": "bitsandbytes",
    "lion": "bitsandbytes",
    "paged": "bitsandbytes",
}
_AT_LEAST_ONE = ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps")


def trainer_problems(flags: Namespace) -> list[str]:
    """Return a line for each flag of transformers' Trainer that cannot work with a tuning mode."""
    if not hasattr(flags, "max_steps"):
        return []  # LLaVA cannot be imported, and a plan goes by its own few flags
    problems = [
        f"--{name} {getattr(flags, name)} cannot be combined with a tuning mode: {reason}"
        for name, (is_problem, reason) in REFUSED.items()
        if getattr(flags, name, None) is not None and is_problem(getattr(flags, name))
    ]
    problems += [
        f"--{name} is {getattr(flags, name)}; it must be at least 1"
        for name in _AT_LEAST_ONE
        if getattr(flags, name, None) is not None and getattr(flags, name) < 1
    ]
    return [*problems, *_length(flags), *_sampling(flags), *_bits(flags)]


def machine_problems(flags: Namespace) -> list[str]:
    """Return a line for each flag that this machine, or this number of ranks, cannot do."""
    return [*_on_several_ranks(flags), *_optimizer(flags), *_reports(flags)]


def _length(flags: Namespace) -> list[str]:
    if flags.max_steps > 0 or flags.num_train_epochs > 0:
        return []
    return [f"--num_train_epochs is {flags.num_train_epochs:g} and no --max_steps is given: there is nothing to train"]


def _sampling(flags: Namespace) -> list[str]:
    problems = []
    if flags.group_by_length and getattr(flags, "group_by_modality_length", False):
        problems.append("--group_by_length has no effect beside --group_by_modality_length; remove one of the two")
    if flags.dataloader_persistent_workers and not flags.dataloader_num_workers:
        problems.append("--dataloader_persistent_workers needs --dataloader_num_workers of at least 1")
    return problems


def _on_several_ranks(flags: Namespace) -> list[str]:
    """Return what works in one process alone; a launcher tells each rank how many there are."""
    if os.environ.get("WORLD_SIZE", "1") in ("", "1"):
        return []
    problems = []
    if flags.include_num_input_tokens_seen:
        problems.append(
            "--include_num_input_tokens_seen works on one rank only: transformers gathers batches of one length"
        )
    if flags.ddp_find_unused_parameters and flags.gradient_checkpointing and not flags.deepspeed:
        problems.append(
            "--ddp_find_unused_parameters True cannot be combined with --gradient_checkpointing: DDP takes the "
            "recomputed parameters for a second use. Leave it out; every parameter of a mode is used in every step"
        )
    return problems


def _optimizer(flags: Namespace) -> list[str]:
    from transformers.training_args import OptimizerNames

    name = "adafactor" if flags.adafactor else str(getattr(flags.optim, "value", flags.optim))
    known = [each.value for each in OptimizerNames]
    if name not in known:
        return [f"--optim {name} is unknown; {nearest(name, known)}transformers knows {', '.join(known)}"]
    package = next((needed for start, needed in _OPTIMIZER_PACKAGES.items() if name.startswith(start)), None)
    if package is None or find_spec(package) is not None:
        return []
    return [f"--optim {name} needs {package}, which is not installed; adamw_torch, LLaVA's default, needs nothing"]


def _reports(flags: Namespace) -> list[str]:
    """Return the programs of --report_to that transformers does not know, or that are not installed."""
    from transformers.integrations.integration_utils import (
        INTEGRATION_TO_CALLBACK,
        get_available_reporting_integrations,
    )

    given = flags.report_to or []
    names = [given] if isinstance(given, str) else list(given)
    if names in (["all"], ["none"]):
        return []
    there = get_available_reporting_integrations()
    return [
        f"--report_to {name} is {'not installed' if name in INTEGRATION_TO_CALLBACK else 'unknown'}; here there are "
        f"{', '.join([*there, 'none'])}"
        for name in names
        if name not in there and name != "flyte"
    ]


def _bits(flags: Namespace) -> list[str]:
    bits = getattr(flags, "bits", 16)
    return [] if bits in (4, 8, 16) else [f"--bits is {bits}; it must be 4, 8 or 16"]
