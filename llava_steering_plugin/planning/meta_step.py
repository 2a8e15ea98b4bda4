"""A training step on the meta device: how many bytes it needs beside the weights, from shapes and dtypes alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llava_steering_plugin.adapters.attachment import Attachment, attach
from llava_steering_plugin.adapters.base_model import language_model
from llava_steering_plugin.hooks.decoder import find_decoder
from llava_steering_plugin.hooks.scope import token_map
from llava_steering_plugin.modes.base import Mode
from llava_steering_plugin.planning.meta_memory import META, LiveBytes, as_on_a_gpu

# Models with this many layers are rehearsed, and what a layer adds is the difference: running 40 takes a minute.
SHORT, LONG = 3, 5


@dataclass(frozen=True)
class TrainingSetup:
    """What a training starts from.

    Attributes:
        described: config.json of the base.
        name: of the base, for errors.
        mode: what is attached.
        tower: config.json of the vision tower; None if unknown.
        projector: settings for LLaVA's `build_vision_projector`; None if unknown.
        newline: parameters of the newline embedding of anyres, trained with the projector.
    """

    described: Mapping[str, Any]
    name: str
    mode: Mode
    tower: Mapping[str, Any] | None = None
    projector: Any = None
    newline: int = 0


@dataclass(frozen=True)
class Arithmetic:
    """Which dtype everything has while it trains.

    Attributes:
        loaded: of what `from_pretrained` makes.
        autocast: what products are computed in; None: in what the tensors have.
        adapter, projector, tower: of these parts.
        bits: 4 and 8 pack every linear of the language model, lm_head with them: upstream's list of what to leave
            out names the projector only.
        embedding, norms: of what is not packed under `bits` 4 and 8.
    """

    loaded: torch.dtype
    autocast: torch.dtype | None
    adapter: torch.dtype
    projector: torch.dtype
    tower: torch.dtype
    bits: int = 16
    embedding: torch.dtype = torch.float32
    norms: torch.dtype = torch.float32

    @property
    def packs(self) -> bool:
        return self.bits in (4, 8)


@dataclass(frozen=True)
class BatchShape:
    """How much goes through in a step.

    Attributes:
        batch: samples a device.
        sequence: positions of a sample, visual tokens included.
        visual: of these, visual ones.
        checkpointing: layers are computed anew in the backward pass.
        accumulates: gradients of earlier batches are there already.
        trains_projector: it gets gradients.
    """

    batch: int
    sequence: int
    visual: int
    checkpointing: bool
    accumulates: bool
    trains_projector: bool


@dataclass
class MetaModel:
    """The modules of a training on the meta device, in the dtypes they have there."""

    model: Any
    attachment: Attachment
    projector: nn.Module | None
    tower: nn.Module | None
    packed: list[nn.Linear]

    def trained(self) -> list[nn.Parameter]:
        """Every parameter that gets a gradient."""
        modules = [part for part in (self.model, self.projector) if part is not None]
        return [parameter for part in modules for parameter in part.parameters() if parameter.requires_grad]

    def tensors(self) -> Iterator[Tensor]:
        for part in (self.model, self.projector, self.tower):
            if part is not None:
                yield from part.parameters()
                yield from part.buffers()


def assembled(base: TrainingSetup, arithmetic: Arithmetic, shape: BatchShape, layers: int | None = None) -> MetaModel:
    """Builds everything on the meta device, with the first `layers` decoder layers (None: all of them).

    Raises:
        SteeringError: the base cannot be built, or the mode does not fit it.
    """
    with _made_in(arithmetic.loaded):  # as transformers does it; casting later would also cast float32 buffers
        model: Any = language_model(base.described, base.name)
    if layers is not None:
        _shorten(model, layers)
    packed = [module for module in model.modules() if isinstance(module, nn.Linear)] if arithmetic.packs else []
    if arithmetic.packs:
        embedding = model.get_input_embeddings()
        for module in model.modules():
            if not isinstance(module, nn.Linear):
                for parameter in module.parameters(recurse=False):
                    parameter.data = parameter.data.to(
                        arithmetic.embedding if module is embedding else arithmetic.norms
                    )
    with torch.device(META):
        attachment = attach(model, base.mode)
    for module in attachment.modules.values():
        module.to(arithmetic.adapter)
    model.requires_grad_(False)
    for parameter in attachment.trained().values():
        parameter.requires_grad_(True)
    model.config.use_cache = False
    model.train()
    if shape.checkpointing:
        # Reentrant, as upstream's pinned transformers has it.
        model.gradient_checkpointing_enable({"use_reentrant": True})
        model.enable_input_require_grads()
    projector = _projector(base, arithmetic)
    if projector is not None:
        projector.requires_grad_(shape.trains_projector)
    return MetaModel(model, attachment, projector, _tower(base, arithmetic), packed)


def peak_of_step(base: TrainingSetup, arithmetic: Arithmetic, shape: BatchShape, whole: MetaModel) -> int:
    """The most bytes that one step holds at a time: activations, gradients as they come, and what is made in passing.

    Weights and optimizer states are not in it. Models of many like layers are extrapolated from two short ones: in
    each phase of the step the peak grows by the same amount with every layer.

    Args:
        whole: all layers, freshly assembled from the rest.
    """
    vision = _peak_of_vision(whole.tower, shape)
    layers = len(whole.attachment.shape.layers)
    if layers <= LONG or not _alike(whole.attachment):
        return max(vision, *peaks(whole, arithmetic, shape).values())
    short, long = (peaks(assembled(base, arithmetic, shape, count), arithmetic, shape) for count in (SHORT, LONG))
    return max(
        vision,
        *(low + (long.get(phase, low) - low) * (layers - SHORT) // (LONG - SHORT) for phase, low in short.items()),
    )


def peaks(parts: MetaModel, arithmetic: Arithmetic, shape: BatchShape) -> dict[str, int]:
    """Runs forward and backward of one batch; the most bytes alive in each phase."""
    batch, sequence, visual = shape.batch, shape.sequence, shape.visual
    masks = torch.zeros(batch, sequence, dtype=torch.bool)
    start = (sequence - visual) // 2
    masks[:, start : start + visual] = True
    live = LiveBytes(parts.tensors())
    model = parts.model
    # Where layers add as much gradient as they free activations, the peak is at the end; two phases tell these apart.
    middle = parts.attachment.shape.layers[len(parts.attachment.shape.layers) // 2].path

    def below_the_middle(gradient: Tensor) -> None:
        live.phase = "backward, lower layers"

    watched = next((p for name, p in parts.attachment.trained().items() if name.startswith(f"{middle}.")), None)
    if watched is not None:
        watched.register_hook(below_the_middle)  # type: ignore[no-untyped-call]
    with live, as_on_a_gpu(arithmetic.autocast, parts.packed), token_map(visual=masks):
        if shape.accumulates:
            for parameter in parts.trained():
                parameter.grad = torch.empty_like(parameter)
        live.phase = "forward"
        pixels = None if parts.tower is None else _pixels(parts.tower, shape)
        embeds = _spliced(parts, shape, start)
        labels = torch.empty(batch, sequence, dtype=torch.long, device=META)
        loss = model(inputs_embeds=embeds, labels=labels).loss
        del embeds
        live.phase = "backward, upper layers"
        loss.backward()
    del pixels
    return live.peaks


def _peak_of_vision(tower: Any, shape: BatchShape) -> int:
    """What the vision tower needs, which upstream has give all its hidden states."""
    if tower is None:
        return 0
    live = LiveBytes([*tower.parameters(), *tower.buffers()])
    with live, torch.no_grad():
        tower(_pixels(tower, shape).to(tower.dtype), output_hidden_states=True)
    return max(live.peaks.values())


def _pixels(tower: Any, shape: BatchShape) -> Tensor:
    config = tower.config
    return torch.empty(shape.batch, config.num_channels, config.image_size, config.image_size, device=META)


def _spliced(parts: MetaModel, shape: BatchShape, start: int) -> Tensor:
    """Text embeddings with projected image features among them, [batch, sequence, width]."""
    ids = torch.empty(shape.batch, shape.sequence - shape.visual, dtype=torch.long, device=META)
    text = parts.model.get_input_embeddings()(ids)
    if parts.projector is not None:
        weight = next(parts.projector.parameters())
        images = parts.projector(weight.new_empty(shape.batch, shape.visual, weight.shape[-1])).to(text.dtype)
    else:
        images = text.new_empty(shape.batch, shape.visual, text.shape[-1])
    rows = [torch.cat([before[:start], image, before[start:]]) for before, image in zip(text, images, strict=True)]
    return torch.stack(rows)


def _shorten(model: Any, layers: int) -> None:
    stack, shape = find_decoder(model)
    listed = stack.get_submodule(shape.layers[0].path.rpartition(".")[0])
    assert isinstance(listed, nn.ModuleList)
    del listed[layers:]
    model.config.num_hidden_layers = len(listed)


def _alike(attachment: Attachment) -> bool:
    """Whether every layer carries the same modules, so that one layer speaks for all."""
    hosts: dict[str, set[str]] = {layer.path: set() for layer in attachment.shape.layers}
    for path in attachment.modules:
        layer = next(layer for layer in hosts if path == layer or path.startswith(f"{layer}."))
        hosts[layer].add(path.removeprefix(layer))
    return len({frozenset(found) for found in hosts.values()}) == 1


def _projector(base: TrainingSetup, arithmetic: Arithmetic) -> nn.Module | None:
    if base.projector is None:
        return None
    from llava.model.multimodal_projector.builder import build_vision_projector

    with torch.device(META):
        built: nn.Module = build_vision_projector(base.projector)
    return built.to(arithmetic.projector)


def _tower(base: TrainingSetup, arithmetic: Arithmetic) -> nn.Module | None:
    if base.tower is None:
        return None
    from transformers import CLIPVisionConfig, CLIPVisionModel
    from transformers.modeling_utils import no_init_weights

    # A CLIP of both halves keeps the vision tower's settings apart.
    config = CLIPVisionConfig.from_dict(dict(base.tower.get("vision_config") or base.tower))
    with torch.device(META), no_init_weights():
        built: nn.Module = CLIPVisionModel(config)
    built.to(arithmetic.tower).requires_grad_(False).eval()
    if arithmetic.packs:
        for name, module in built.named_modules():
            if "norm" in name:  # upstream's rule
                module.to(arithmetic.norms)
    return built


@contextmanager
def _made_in(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
