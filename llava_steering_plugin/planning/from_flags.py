"""From upstream's flags to the memory of a training: dtypes as they end up, sharing between ranks, length of rows."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from llava_steering_plugin.errors import ArgumentsError
from llava_steering_plugin.planning.gpus import Gpu, named_gpu
from llava_steering_plugin.planning.meta_step import Arithmetic, BatchShape, TrainingSetup, assembled, peak_of_step
from llava_steering_plugin.planning.report import MemoryPlan
from llava_steering_plugin.planning.sharding import STATES, Memory, Sharding, memory, stored
from llava_steering_plugin.training.deepspeed_config import ZERO, read_deepspeed

# CLIP-L/336's, LLaVA-1.5's: assumed where the tower's config cannot be read.
USUAL_VISUAL_TOKENS = 576


@dataclass(frozen=True)
class Wanted:
    """What a plan is told beside the flags of the training.

    Attributes:
        gpu: name of a card, or its GiB.
        gpus: how many ranks.
        sequence: positions of the longest rows; None: --model_max_length, the most that upstream lets through.
    """

    gpu: str | None = None
    gpus: int = 1
    sequence: int | None = None

    def problems(self) -> list[str]:
        found = []
        if self.gpus < 1:
            found.append(f"--gpus is {self.gpus}; it must be at least 1")
        if self.sequence is not None and self.sequence < 2:
            found.append(f"--sequence is {self.sequence}; it must be at least 2")
        try:
            self.card()
        except ArgumentsError as error:
            found.append(str(error))
        return found

    def card(self) -> Gpu | None:
        return None if self.gpu is None else named_gpu(self.gpu)


def planned_memory(base: TrainingSetup, flags: Namespace, wanted: Wanted, width: int, notes: list[str]) -> MemoryPlan:
    """The memory of a training under the sharding of its flags, and under the others.

    Args:
        base: the model and the mode, known to fit each other.
        flags: all of upstream's.
        width: of the model.
        notes: gets what is not known or not counted.

    Raises:
        SteeringError: the model cannot be rehearsed.
    """
    shape = _shape(base, flags, wanted, notes)
    optimizer = _optimizer(flags, notes)
    chosen = sharding_of(flags, wanted.gpus)
    shardings = {option.name: option for option in _options(chosen, flags.bits)}
    made: dict[bool, dict[str, Memory]] = {}
    for with_engine in (False, True):
        options = [option for option in shardings.values() if (option.stage is not None) == with_engine]
        if not options:
            continue
        arithmetic = arithmetic_of(flags, "mm_vision_tower" in base.described, with_engine)
        whole = assembled(base, arithmetic, shape)
        tensors = stored(whole, flags.double_quant, flags.bits, base.newline)
        peak = peak_of_step(base, arithmetic, shape, whole)
        made[with_engine] = {option.name: memory(tensors, peak, optimizer, width, option) for option in options}
    assumed = {
        "batch": shape.batch,
        "sequence": shape.sequence,
        "of it visual": shape.visual,
        "bits": flags.bits,
        "computed in": _named(_half(flags) or torch.float32),
        "gradient checkpointing": "on" if shape.checkpointing else "off",
        "optimizer": optimizer,
        "GPUs": wanted.gpus,
    }
    results = {name: made[option.stage is not None][name] for name, option in shardings.items()}
    return MemoryPlan(assumed, results, chosen.name, wanted.card())


def _shape(base: TrainingSetup, flags: Namespace, wanted: Wanted, notes: list[str]) -> BatchShape:
    sequence = wanted.sequence or flags.model_max_length
    if base.tower is None:
        visual = USUAL_VISUAL_TOKENS
        notes.append(
            f"the vision tower's memory is not counted, and {visual} visual tokens are assumed: its config.json cannot "
            "be read here"
        )
    else:
        described = base.tower.get("vision_config") or base.tower
        visual = (described.get("image_size", 224) // described.get("patch_size", 32)) ** 2
    if "anyres" in str(getattr(flags, "image_aspect_ratio", "")):
        notes.append("one tile an image is counted; anyres sends several through the vision tower")
    return BatchShape(
        batch=flags.per_device_train_batch_size,
        sequence=sequence,
        visual=min(visual, sequence - 1),
        checkpointing=flags.gradient_checkpointing,
        accumulates=flags.gradient_accumulation_steps > 1,
        trains_projector=not flags.freeze_mm_mlp_adapter,
    )


def _optimizer(flags: Namespace, notes: list[str]) -> str:
    name = str(getattr(flags.optim, "value", flags.optim))
    if name in STATES:
        return name
    notes.append(f"the states of --optim {name} are not known here; AdamW's are counted")
    return "adamw_torch"


def _half(flags: Namespace) -> torch.dtype | None:
    return torch.bfloat16 if flags.bf16 else torch.float16 if flags.fp16 else None


def arithmetic_of(flags: Namespace, brings_projector: bool, with_engine: bool) -> Arithmetic:
    """Which dtype everything ends up with, by upstream's train() and this plugin's trainer.

    Args:
        brings_projector: the base is a LLaVA and has one.
        with_engine: DeepSpeed casts everything to one dtype, and runs without autocast.
    """
    half = _half(flags)
    compute = half or torch.float32
    if with_engine:
        return Arithmetic(compute, None, compute, compute, compute, flags.bits, compute, compute)
    # Without --bf16 upstream loads in float32, also for --fp16, and the vision tower in half precision all the same.
    loaded = torch.bfloat16 if flags.bf16 else torch.float32
    packs = flags.bits in (4, 8)
    projector = compute if packs else loaded if brings_projector else torch.float32
    if projector == torch.float16 and not flags.freeze_mm_mlp_adapter:
        projector = torch.float32  # GradScaler refuses gradients in half precision; the trainer casts it
    tower = torch.bfloat16 if flags.bf16 else torch.float16
    # Quantised ones are made in float16 unless told otherwise; then peft casts what is not packed to float32.
    made = torch.float16 if packs and not flags.bf16 else loaded
    return Arithmetic(made, half, torch.float32, projector, tower, flags.bits, loaded)


def deepspeed_problems(flags: Namespace) -> list[str]:
    """A --deepspeed file that is not there; what is in it is checked with the other flags."""
    path = getattr(flags, "deepspeed", None)
    return [f"--deepspeed {path}: there is no such file"] if path and not Path(path).is_file() else []


def sharding_of(flags: Namespace, world: int) -> Sharding:
    """How ranks share the work under these flags.

    Raises:
        ArgumentsError: the file of --deepspeed is not one of DeepSpeed's.
    """
    path = getattr(flags, "deepspeed", None)
    if not path:
        return Sharding(world=world)
    zero = read_deepspeed(path)[ZERO]

    def number(name: str, default: int | None) -> int | None:
        value = zero.get(name, "auto")
        return default if value == "auto" else int(value)

    def on_host(name: str) -> bool:
        return bool(zero.get(name)) and zero[name].get("device", "none") != "none"

    standard = Sharding()
    return Sharding(
        stage=zero["stage"],
        world=world,
        offload_optimizer=on_host("offload_optimizer"),
        offload_parameters=on_host("offload_param"),
        bucket=number("reduce_bucket_size", None),
        buckets=2 if zero.get("overlap_comm", True) else 1,
        live=number("stage3_max_live_parameters", standard.live) or standard.live,
        persistent=number("stage3_param_persistence_threshold", None),
    )


def _options(chosen: Sharding, bits: int) -> list[Sharding]:
    """The chosen sharding first, and others to compare with."""
    others = [Sharding(world=chosen.world), Sharding(2, chosen.world)]
    if bits not in (4, 8):  # quantised weights cannot be cut
        whole = Sharding(3, chosen.world)
        others += [whole, replace(whole, offload_optimizer=True, offload_parameters=True)]
    return [chosen, *(option for option in others if option.name != chosen.name)]


def _named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
