"""Count the memory of a training on each device: weights, gradients, optimizer, buffers, activations, with ZeRO too."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor, nn

from llava_steering_plugin.planning.meta_step import MetaModel

# How many states of a parameter's size an optimizer keeps, by its name in --optim.
STATES = {
    "adamw_torch": 2,
    "adamw_torch_fused": 2,
    "adamw_hf": 2,
    "adamw_apex_fused": 2,
    "adagrad": 1,
    "sgd": 0,
}
# Of bitsandbytes: weights that share a scale, and scales that share one of their own under double quantisation.
BLOCK, NESTED_BLOCK = 64, 256
MASTER, STATE, HALF = 4, 4, 2  # bytes: DeepSpeed keeps float32 masters and states, whatever the training computes in


@dataclass(frozen=True)
class Sharding:
    """Says how ranks share the work.

    Attributes:
        stage: of ZeRO; None: no DeepSpeed.
        world: how many ranks.
        offload_optimizer, offload_parameters: whether they are kept in the host's memory.
        bucket: elements of a buffer for reducing gradients; None: the width squared, as transformers fills in.
        buckets: how many of them; 2 if communication overlaps.
        live: the most elements that ZeRO-3 keeps gathered.
        persistent: parameters with no more elements than this stay whole under ZeRO-3; None: ten times the width.
    """

    stage: int | None = None
    world: int = 1
    offload_optimizer: bool = False
    offload_parameters: bool = False
    bucket: int | None = None
    buckets: int = 2
    live: int = 10**9
    persistent: int | None = None

    @property
    def name(self) -> str:
        """Return the name under which reports show it."""
        if self.stage is None:
            return "DDP" if self.world > 1 else "no ZeRO"
        return f"ZeRO-{self.stage}" + (" offload" if self.offload_optimizer or self.offload_parameters else "")


@dataclass(frozen=True)
class Memory:
    """Bytes on each GPU, and in the host's memory for each GPU.

    Attributes:
        weights: by part of the model.
        gradients: of everything that is trained, once a backward pass has ended.
        optimizer: its states, and DeepSpeed's float32 masters.
        buffers: of communication, and parameters that ZeRO-3 has gathered.
        activations: what a step needs at its peak beside all of the above.
        host: what was offloaded.
    """

    weights: dict[str, int] = field(default_factory=dict)
    gradients: int = 0
    optimizer: int = 0
    buffers: int = 0
    activations: int = 0
    host: int = 0

    @property
    def total(self) -> int:
        """Return the bytes on a GPU."""
        return sum(self.weights.values()) + self.gradients + self.optimizer + self.buffers + self.activations

    def as_json(self) -> dict[str, Any]:
        """Return everything, and the total, as plain values."""
        return {**asdict(self), "total": self.total}


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of the model.

    Attributes:
        part: of the model, as reports name it.
        numel: elements.
        size: bytes as it is stored, packed or not.
        itemsize: bytes of an element of its gradient.
        trained: it gets a gradient.
    """

    part: str
    numel: int
    size: int
    itemsize: int
    trained: bool


def stored_tensors(meta: MetaModel, nested: bool, bits: int, newline: int) -> list[StoredTensor]:
    """Return every parameter and buffer of a training; shared ones once.

    Args:
        nested: first-level scales of 4 bits are quantised again.
        newline: elements of the newline embedding of anyres.
    """
    found: list[StoredTensor] = []
    seen: set[int] = set()
    packed = {id(linear.weight): linear for linear in meta.packed}
    ours = {id(parameter) for parameter in meta.attachment.parameters().values()}

    def add(part: str, tensors: Iterable[Tensor]) -> None:
        for tensor in tensors:
            if id(tensor) in seen:
                continue
            seen.add(id(tensor))
            linear = packed.get(id(tensor))
            size = tensor.nbytes if linear is None else packed_bytes(linear, bits, nested)
            trained = isinstance(tensor, nn.Parameter) and tensor.requires_grad
            name = "adapter" if id(tensor) in ours else part
            found.append(StoredTensor(name, tensor.numel(), size, tensor.itemsize, trained))

    named = {"language model": meta.model, "vision tower": meta.tower, "projector": meta.projector}
    for part, module in named.items():
        if module is not None:
            add(part, module.parameters())
            add(part, module.buffers())
    if newline and meta.projector is not None:
        first = next(meta.projector.parameters())
        found.append(StoredTensor("projector", newline, newline * first.itemsize, first.itemsize, first.requires_grad))
    return found


def packed_bytes(linear: nn.Linear, bits: int, nested: bool) -> int:
    """Return the bytes of a linear's weight as bitsandbytes packs it, with its constants.

    8 bits: one float32 scale a row. 4 bits: one scale for 64 weights, float32 or, under double quantisation, 8 bits
    with a float32 scale for 256 of them and an offset; and the 16 values that four bits stand for.
    """
    numel = linear.in_features * linear.out_features
    if bits == 8:
        return numel + 4 * linear.out_features
    blocks = -(-numel // BLOCK)
    scales = blocks + 4 * -(-blocks // NESTED_BLOCK) + 4 if nested else 4 * blocks
    return -(-numel // 2) + scales + 16 * 4


def memory_of(tensors: list[StoredTensor], peak: int, optimizer: str, width: int, sharding: Sharding) -> Memory:
    """Return what lies on one device.

    Args:
        tensors: of the whole model, in the dtypes that they have under this sharding.
        peak: of one step, its gradients included, as `peak_of_step` gives it.
        optimizer: a name of `STATES`.
        width: of the model, from which DeepSpeed's sizes are made.
    """
    trained = [tensor for tensor in tensors if tensor.trained]
    count = sum(tensor.numel for tensor in trained)
    gradients = sum(tensor.numel * tensor.itemsize for tensor in trained)
    # Fused and multi-tensor optimizers hold one more copy of everything that they update.
    activations = max(peak - gradients, gradients)
    weights: dict[str, int] = {}
    for tensor in tensors:
        weights[tensor.part] = weights.get(tensor.part, 0) + tensor.size
    if sharding.stage is None:
        # DDP reduces gradients in buckets, which hold all of them once more.
        buffers = gradients if sharding.world > 1 else 0
        return Memory(weights, gradients, STATES[optimizer] * gradients, buffers, activations)

    def share(size: int, from_stage: int = 1) -> int:
        return -(-size // sharding.world) if sharding.stage >= from_stage else size  # type: ignore[operator]

    states = (MASTER + STATES[optimizer] * STATE) * count
    itemsize = trained[0].itemsize if trained else HALF
    buffers = (sharding.bucket or width * width) * itemsize * sharding.buckets
    host = 0
    if sharding.offload_optimizer:
        # The gradients are kept there too, in float32.
        host += share(states) + share(4 * count)
        optimizer_bytes, gradient_bytes = 0, 0
    else:
        optimizer_bytes, gradient_bytes = share(states), share(gradients, from_stage=2)
    if sharding.stage == 3:
        limit = 10 * width if sharding.persistent is None else sharding.persistent
        weights = {}
        cut = 0
        for tensor in tensors:
            whole = tensor.numel <= limit
            size = tensor.size if whole else share(tensor.size)
            cut += 0 if whole else tensor.numel
            if sharding.offload_parameters and not whole:
                host, size = host + size, 0
            weights[tensor.part] = weights.get(tensor.part, 0) + size
        if sharding.world > 1 or sharding.offload_parameters:
            buffers += min(cut, sharding.live) * itemsize
    return Memory(weights, gradient_bytes, optimizer_bytes, buffers, activations, host)
