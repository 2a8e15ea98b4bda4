"""Derive from the flags what the memory of a training depends on: dtypes, sharding between ranks, length of rows."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from llava_steering_plugin.components.base import ImageTokens
from llava_steering_plugin.components.picture_layouts import ASPECT, PictureLayout, is_anyres
from llava_steering_plugin.errors import ArgumentsError
from llava_steering_plugin.planning.gpus import Gpu, named_gpu
from llava_steering_plugin.planning.meta_step import Arithmetic, BatchShape, TrainingSetup, assemble, peak_of_step
from llava_steering_plugin.planning.report import MemoryReport
from llava_steering_plugin.planning.sharding import STATES, Memory, Sharding, memory_of, stored_tensors
from llava_steering_plugin.training.deepspeed_config import ZERO, read_deepspeed

# CLIP-L/336's, LLaVA-1.5's: assumed where the tower's config cannot be read.
USUAL_VISUAL_TOKENS = 576


@dataclass(frozen=True)
class Wanted:
    """Holds what a plan is asked beside the flags of the training.

    Attributes:
        gpu: name of a GPU, or its memory in GiB.
        gpus: how many ranks.
        sequence: positions of the longest rows; None: --model_max_length, the most that LLaVA lets through.
    """

    gpu: str | None = None
    gpus: int = 1
    sequence: int | None = None

    def problems(self) -> list[str]:
        """Return what is wrong with these wishes."""
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
        """Return the GPU that the training shall run on; None if none was named."""
        return None if self.gpu is None else named_gpu(self.gpu)


def memory_report(
    setup: TrainingSetup,
    flags: Namespace,
    wanted: Wanted,
    width: int,
    image: ImageTokens | None,
    layout: PictureLayout | None = None,
) -> MemoryReport:
    """Return the memory of a training under the sharding of its flags, and under the others.

    Args:
        setup: the model and the mode, known to fit each other.
        flags: all flags of LLaVA's training.
        width: of the model.
        image: what it gets for an image; None if unknown.
        layout: how LLaVA-NeXT lays pictures out; None for LLaVA, or where that is unknown.

    Raises:
        SteeringError: the step cannot be run on the meta device.
    """
    batch, notes = _batch_shape(image, flags, wanted, layout)
    optimizer = str(getattr(flags.optim, "value", flags.optim))
    if optimizer not in STATES:
        notes.append(f"the states of --optim {optimizer} are not known here; AdamW's are counted")
        optimizer = "adamw_torch"
    chosen = sharding_of(flags, wanted.gpus)
    shardings = {option.name: option for option in _options(chosen, flags.bits)}
    found: dict[bool, dict[str, Memory]] = {}
    for with_engine in (False, True):
        options = [option for option in shardings.values() if (option.stage is not None) == with_engine]
        if not options:
            continue
        arithmetic = arithmetic_of(flags, "mm_vision_tower" in setup.described, with_engine)
        meta = assemble(setup, arithmetic, batch)
        tensors = stored_tensors(meta, flags.double_quant, flags.bits, setup.newline)
        peak = peak_of_step(setup, arithmetic, batch, meta)
        found[with_engine] = {option.name: memory_of(tensors, peak, optimizer, width, option) for option in options}
    assumed = {
        "batch": batch.samples,
        "sequence": batch.sequence,
        "of it visual": batch.visual,
        "bits": flags.bits,
        "computed in": _named(_half(flags) or torch.float32),
        "gradient checkpointing": "on" if batch.checkpointing else "off",
        "optimizer": optimizer,
        "GPUs": wanted.gpus,
    }
    memories = {name: found[option.stage is not None][name] for name, option in shardings.items()}
    return MemoryReport(assumed, memories, chosen.name, wanted.card(), tuple(notes))


def _batch_shape(
    image: ImageTokens | None, flags: Namespace, wanted: Wanted, layout: PictureLayout | None
) -> tuple[BatchShape, list[str]]:
    """Return the batch that the flags describe, and notes on what is assumed."""
    notes = []
    tiles = 1
    sequence = wanted.sequence or flags.model_max_length
    if image is None:
        visual = USUAL_VISUAL_TOKENS
        notes.append(
            f"the vision tower's memory is not counted, and {visual} visual tokens are assumed: its config.json cannot "
            "be read here"
        )
    else:
        visual = image.count
    if layout is not None:
        visual, tiles, what = _largest_sample(layout, flags)
        notes.append(f"the largest sample is assumed to have {what}: {visual:,} visual tokens")
        if visual >= sequence:
            notes.append(
                f"a row of {sequence:,} positions is cut off within these, with the question and the answer behind them"
            )
    elif is_anyres(getattr(flags, ASPECT, None)):
        notes.append("one tile an image is counted; anyres sends several through the vision tower")
    batch = BatchShape(
        samples=flags.per_device_train_batch_size,
        sequence=sequence,
        visual=min(visual, sequence - 1),
        checkpointing=flags.gradient_checkpointing,
        accumulates=flags.gradient_accumulation_steps > 1,
        trains_projector=not flags.freeze_mm_mlp_adapter,
        tiles=tiles,
    )
    return batch, notes


def _largest_sample(layout: PictureLayout, flags: Namespace) -> tuple[int, int, str]:
    """Return the most visual tokens of a sample, how many pictures go through the tower for them, and what it holds."""
    visual, tiles = layout.largest()
    what = f"one picture in {tiles} tiles, the whole one among them" if tiles > 1 else "one picture"
    if getattr(flags, "video_folder", None) and layout.frames and not layout.video_problems():
        tokens = layout.video(layout.frames)
        if tokens > visual:
            return tokens, layout.frames, f"a video of {layout.frames} frames"
    return visual, tiles, what


def _half(flags: Namespace) -> torch.dtype | None:
    return torch.bfloat16 if flags.bf16 else torch.float16 if flags.fp16 else None


def arithmetic_of(flags: Namespace, brings_projector: bool, with_engine: bool) -> Arithmetic:
    """Return the dtypes that LLaVA's train() and this plugin's trainer give everything.

    Args:
        brings_projector: the base is a LLaVA and has one.
        with_engine: DeepSpeed casts everything to one dtype, and runs without autocast.
    """
    half = _half(flags)
    compute = half or torch.float32
    if with_engine:
        return Arithmetic(compute, None, compute, compute, compute, flags.bits, compute, compute)
    # Without --bf16 LLaVA loads in float32, also for --fp16, and the vision tower in half precision all the same.
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
    """Return the problem that a missing file of --deepspeed is; its content is checked with the other flags."""
    path = getattr(flags, "deepspeed", None)
    return [f"--deepspeed {path}: there is no such file"] if path and not Path(path).is_file() else []


def sharding_of(flags: Namespace, world: int) -> Sharding:
    """Return how ranks share the work under these flags.

    Raises:
        ArgumentsError: DeepSpeed would not take the file of --deepspeed.
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
    """Return the chosen sharding, then others to compare it with."""
    others = [Sharding(world=chosen.world), Sharding(2, chosen.world)]
    if bits not in (4, 8):  # quantised weights cannot be sharded
        whole = Sharding(3, chosen.world)
        others += [whole, replace(whole, offload_optimizer=True, offload_parameters=True)]
    return [chosen, *(option for option in others if option.name != chosen.name)]


def _named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
