"""Run a training step on the meta device: how many bytes it needs beside the weights, from shapes and dtypes alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llava_steering_plugin.adapters.attachment import Attachment, attach
from llava_steering_plugin.adapters.fit.base_model import language_model
from llava_steering_plugin.components.base import ImageTokens, Tower
from llava_steering_plugin.hooks.checkpointing import change_checkpointing, checkpointing_parts
from llava_steering_plugin.hooks.decoder import find_decoder
from llava_steering_plugin.hooks.scope import token_map
from llava_steering_plugin.modes.base import Mode
from llava_steering_plugin.planning.meta_memory import META, LiveBytes, as_on_a_gpu
from llava_steering_plugin.planning.meta_vision import MetaTower, meta_projector, meta_tower

# Models with this many layers are run, and the difference is what two layers add: running 40 takes a minute.
SHORT, LONG = 3, 5


@dataclass(frozen=True)
class TrainingSetup:
    """The model and the mode of a training.

    Attributes:
        described: config.json of the base.
        name: of the base, for errors.
        mode: the mode that is attached.
        tower: the vision tower, a component or config.json of LLaVA's own; None if unknown.
        projector: settings for `build_projector`; None if unknown.
        newline: parameters of the newline embedding of anyres, trained with the projector.
        features: tokens that the tower gives for an image, before the projector; None if unknown.
    """

    described: Mapping[str, Any]
    name: str
    mode: Mode
    tower: Tower | Mapping[str, Any] | None = None
    projector: Any = None
    newline: int = 0
    features: ImageTokens | None = None


@dataclass(frozen=True)
class Arithmetic:
    """The dtypes of a training.

    Attributes:
        loaded: of what `from_pretrained` makes.
        autocast: what products are computed in; None: in what the tensors have.
        adapter, projector, tower: of the module of that name.
        bits: 4 and 8 pack every linear of the language model, lm_head too: LLaVA excludes the projector only.
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
    """Says how much one device computes in a step.

    Attributes:
        samples: of a batch.
        sequence: positions of a sample, visual tokens included.
        visual: how many of these are visual tokens, as the projector gives them.
        checkpointing: layers are computed again in the backward pass.
        accumulates: gradients of earlier batches are there already.
        trains_projector: the projector gets gradients.
        tiles: pictures of a sample that go through the vision tower: its tiles, or the frames of its video.
    """

    samples: int
    sequence: int
    visual: int
    checkpointing: bool
    accumulates: bool
    trains_projector: bool
    tiles: int = 1


@dataclass
class MetaModel:
    """The modules of a training on the meta device, in the dtypes they have there."""

    model: Any
    attachment: Attachment
    projector: nn.Module | None
    tower: MetaTower | None
    packed: list[nn.Linear]
    features: ImageTokens | None = None

    def trained(self) -> list[nn.Parameter]:
        """Return every parameter that gets a gradient."""
        modules = [part for part in (self.model, self.projector) if part is not None]
        return [parameter for part in modules for parameter in part.parameters() if parameter.requires_grad]

    def tensors(self) -> Iterator[Tensor]:
        """Yield every parameter and every buffer."""
        for part in (self.model, self.projector, self.tower):
            if part is not None:
                yield from part.parameters()
                yield from part.buffers()


def assemble(setup: TrainingSetup, arithmetic: Arithmetic, batch: BatchShape, layers: int | None = None) -> MetaModel:
    """Build everything on the meta device, with the first `layers` decoder layers (None: all of them).

    Raises:
        SteeringError: the base cannot be built, or the mode does not fit it.
    """
    with _made_in(arithmetic.loaded):  # as transformers does it; casting later would also cast float32 buffers
        model: Any = language_model(setup.described, setup.name)
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
        attachment = attach(model, setup.mode)
    for module in attachment.modules.values():
        module.to(arithmetic.adapter)
    model.requires_grad_(False)
    for parameter in attachment.trained().values():
        parameter.requires_grad_(True)
    model.config.use_cache = False
    model.train()
    if batch.checkpointing:
        # Reentrant, as in the version of transformers that LLaVA pins.
        model.gradient_checkpointing_enable({"use_reentrant": True})
        model.enable_input_require_grads()
    projector = meta_projector(setup.projector, arithmetic.projector)
    if projector is not None:
        projector.requires_grad_(batch.trains_projector)
    return MetaModel(model, attachment, projector, _tower(setup, arithmetic), packed, setup.features)


def peak_of_step(setup: TrainingSetup, arithmetic: Arithmetic, batch: BatchShape, meta: MetaModel) -> int:
    """Return the most bytes that one step holds at a time: activations, gradients as they arise, and temporary tensors.

    Weights and optimizer states are not in it. Models of many equal layers are extrapolated from two short ones: in
    each phase of the step the peak grows by the same amount with every layer.

    Args:
        meta: all layers, freshly assembled from the other arguments.
    """
    vision = _peak_of_vision(meta.tower, batch)
    layers = len(meta.attachment.shape.layers)
    if layers <= LONG or not _layers_are_alike(meta.attachment):
        return max(vision, *peaks(meta, arithmetic, batch).values())
    short, long = (peaks(assemble(setup, arithmetic, batch, count), arithmetic, batch) for count in (SHORT, LONG))
    return max(
        vision,
        *(low + (long.get(phase, low) - low) * (layers - SHORT) // (LONG - SHORT) for phase, low in short.items()),
    )


def peaks(meta: MetaModel, arithmetic: Arithmetic, batch: BatchShape) -> dict[str, int]:
    """Run forward and backward of one batch, and return the most bytes alive in each phase."""
    masks = torch.zeros(batch.samples, batch.sequence, dtype=torch.bool)
    start = (batch.sequence - batch.visual) // 2
    masks[:, start : start + batch.visual] = True
    live = LiveBytes(meta.tensors())
    model = meta.model
    # Where layers add as much gradient as they free activations, the peak is at the end; two phases tell these apart.
    middle = meta.attachment.shape.layers[len(meta.attachment.shape.layers) // 2].path

    def below_the_middle(gradient: Tensor) -> None:
        live.phase = "backward, lower layers"

    watched = next((p for name, p in meta.attachment.trained().items() if name.startswith(f"{middle}.")), None)
    if watched is not None:
        watched.register_hook(below_the_middle)  # type: ignore[no-untyped-call]
    with live, as_on_a_gpu(arithmetic.autocast, meta.packed) as recomputing, token_map(visual=masks):
        change_checkpointing(checkpointing_parts(meta.attachment.stack, meta.attachment.shape), recomputing)
        if batch.accumulates:
            for parameter in meta.trained():
                parameter.grad = torch.empty_like(parameter)
        live.phase = "forward"
        pixels = None if meta.tower is None else meta.tower.pixels(batch.samples * batch.tiles)
        embeds = _spliced(meta, batch, start)
        labels = torch.empty(batch.samples, batch.sequence, dtype=torch.long, device=META)
        loss = model(inputs_embeds=embeds, labels=labels).loss
        del embeds
        live.phase = "backward, upper layers"
        loss.backward()
    del pixels
    return live.peaks


def _peak_of_vision(tower: MetaTower | None, batch: BatchShape) -> int:
    """Return the most bytes that the vision tower holds."""
    if tower is None:
        return 0
    live = LiveBytes([*tower.parameters(), *tower.buffers()])
    with live, torch.no_grad():
        tower(tower.pixels(batch.samples * batch.tiles))
    return max(live.peaks.values())


def _spliced(meta: MetaModel, batch: BatchShape, start: int) -> Tensor:
    """Return text embeddings with projected image features among them, [batch, sequence, width]."""
    ids = torch.empty(batch.samples, batch.sequence - batch.visual, dtype=torch.long, device=META)
    text = meta.model.get_input_embeddings()(ids)
    if meta.projector is not None:
        weight = next(meta.projector.parameters())
        given = (batch.visual, weight.shape[-1])
        if meta.features is not None:
            given = meta.features.count, meta.features.width
        images = meta.projector(weight.new_empty(batch.samples * batch.tiles, *given)).to(text.dtype)
        # A row that is too short for an image has it cut off, as LLaVA does; lines of tiles get a token more.
        images = images.reshape(batch.samples, -1, images.shape[-1])[:, : batch.visual]
        ends = images.new_empty(batch.samples, batch.visual - images.shape[1], images.shape[-1])
        images = torch.cat([images, ends], 1) if batch.tiles > 1 else images
    else:
        images = text.new_empty(batch.samples, batch.visual, text.shape[-1])
    rows = [torch.cat([before[:start], image, before[start:]]) for before, image in zip(text, images, strict=True)]
    return torch.stack(rows)


def _shorten(model: Any, layers: int) -> None:
    stack, shape = find_decoder(model)
    listed = stack.get_submodule(shape.layers[0].path.rpartition(".")[0])
    assert isinstance(listed, nn.ModuleList)
    del listed[layers:]
    model.config.num_hidden_layers = len(listed)


def _layers_are_alike(attachment: Attachment) -> bool:
    """Return whether every layer carries the same modules, so that each adds the same memory."""
    hosts: dict[str, set[str]] = {layer.path: set() for layer in attachment.shape.layers}
    for path in attachment.modules:
        layer = next(layer for layer in hosts if path == layer or path.startswith(f"{layer}."))
        hosts[layer].add(path.removeprefix(layer))
    return len({frozenset(found) for found in hosts.values()}) == 1


def _tower(setup: TrainingSetup, arithmetic: Arithmetic) -> MetaTower | None:
    built = meta_tower(setup.tower, arithmetic.tower)
    if built is not None and arithmetic.packs:
        for name, module in built.named_modules():
            if "norm" in name:  # LLaVA's rule
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
