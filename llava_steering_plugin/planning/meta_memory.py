"""Count the memory of a computation without using it: on the meta device, where tensors have shapes and no values.

    with LiveBytes() as live, as_autocast(torch.bfloat16):
        model(...).loss.backward()
    live.peaks

What autograd saves, when a tensor is freed and what checkpointing computes again is then not estimated: it happens.
Three things are replaced, because the meta device does not compute them as a GPU does: autocast, attention that never
holds the matrix of scores, and linears whose weights are packed.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llava_steering_plugin.modes.precision import autocast_is_on

META = torch.device("meta")
# Takes a model's checkpointing function, and returns the one to put in its place.
Recomputing = Callable[[Callable[..., Any]], Callable[..., Any]]


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follow every storage on one device that is made inside the block.

    On the CPU it measures a real computation as it counts one on the meta device.

    Attributes:
        now: bytes alive now.
        peaks: the most bytes alive in each phase.
        phase: name of the phase that runs; set it at any time.
    """

    def __init__(self, known: Iterable[Tensor] = (), device: torch.device = META):
        """
        Args:
            known: tensors that exist already and are not counted: parameters and buffers.
            device: whose storages are followed.
        """
        super().__init__()  # type: ignore[no-untyped-call]
        self.device = device
        self.now, self.phase = 0, "start"
        self.peaks: dict[str, int] = {}
        self._alive: dict[int, Any] = {}
        for tensor in known:
            storage = tensor.untyped_storage()
            self._alive[id(storage)] = storage

    def __torch_dispatch__(
        self, operator: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = operator(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor) and value.device == self.device:
                self._see(value)
        self.peaks[self.phase] = max(self.peaks.get(self.phase, 0), self.now)
        return result

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = id(storage), storage.nbytes()
        if key in self._alive:
            return

        def gone(reference: Any) -> None:
            del self._alive[key]
            self.now -= size

        self._alive[key] = weakref.ref(storage, gone)
        self.now += size


@contextmanager
def as_on_a_gpu(autocast: torch.dtype | None, packed: Iterable[nn.Linear] = ()) -> Iterator[Recomputing]:
    """Let the meta device compute as a GPU does: with autocast, flash attention and packed linears.

    Yields a function that wraps the model's checkpointing functions, so that this holds as well for layers that a
    backward pass computes again: torch takes modes off while that runs.

    Args:
        autocast: the dtype of products; None: no autocast.
        packed: linears whose weights are quantised, and unpacked for each use.
    """
    with ExitStack() as stack:
        stack.enter_context(_autocast_of_meta())
        if autocast is not None:
            # The meta device has none; this records whether autocast is on. Modes switch it off around their own maths.
            stack.enter_context(torch.autocast("cpu", torch.bfloat16))
        yield stack.enter_context(_Functions(autocast, packed)).recomputing


@contextmanager
def _autocast_of_meta() -> Iterator[None]:
    """Take `torch.autocast("meta")`, by which some models of transformers switch it off, for the one of the CPU.

    torch has none for the meta device, and raises; that of the CPU is the one that is recorded.
    """
    original = torch.autocast

    class OfMeta(original):  # type: ignore[misc, valid-type]
        """Autocast that knows the meta device."""

        def __init__(self, device_type: str, *args: Any, **kwargs: Any):
            super().__init__("cpu" if device_type == META.type else device_type, *args, **kwargs)

    torch.autocast = OfMeta  # type: ignore[misc]
    try:
        yield
    finally:
        torch.autocast = original  # type: ignore[misc]


class _Functions(TorchFunctionMode):
    """Replaces the functions that a GPU computes in another way than the meta device."""

    def __init__(self, autocast: torch.dtype | None, packed: Iterable[nn.Linear]):
        super().__init__()
        self.autocast = autocast
        self.packed = {id(linear.weight) for linear in packed}
        self._backward = False

    def recomputing(self, checkpoint: Callable[..., Any]) -> Callable[..., Any]:
        """Return the checkpointing function, with this mode on for what it computes again."""

        def with_mode(run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            def again(*inner: Any, **named: Any) -> Any:
                with self if self._backward else nullcontext():
                    return run(*inner, **named)

            return checkpoint(again, *args, **kwargs)

        return with_mode

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if function in _PRODUCTS:
            if function is nn.functional.linear and id(args[1]) in self.packed:
                dtype = self.autocast or args[0].dtype
                return _PackedLinear.apply(args[0], args[1], dtype)  # type: ignore[no-untyped-call]
            if self.autocast is not None and autocast_is_on("cpu"):
                args = tuple(self._cast(value) for value in args)
                kwargs = {name: self._cast(value) for name, value in kwargs.items()}
        if function is nn.functional.scaled_dot_product_attention:
            return _FlashAttention.apply(*args[:3])  # type: ignore[no-untyped-call]
        if function in _BACKWARD:
            self._backward = True
            try:
                return function(*args, **kwargs)
            finally:
                self._backward = False
        return function(*args, **kwargs)

    def _cast(self, value: Any) -> Any:
        return value.to(self.autocast) if isinstance(value, Tensor) and value.is_floating_point() else value


_PRODUCTS = {
    nn.functional.linear,
    nn.functional.conv2d,
    nn.functional.scaled_dot_product_attention,
    torch.matmul,
    torch.bmm,
    torch.baddbmm,
    Tensor.matmul,
    Tensor.__matmul__,
    Tensor.bmm,
}
_BACKWARD = {Tensor.backward}


class _FlashAttention(torch.autograd.Function):
    """Attention as flash kernels store it: inputs, output, and one number a row; its backward sums in float32."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        result = query.new_empty(*query.shape[:-1], value.shape[-1])
        ctx.save_for_backward(query, key, value, result, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        query, key, value, _, _ = ctx.saved_tensors
        summed = torch.empty_like(query, dtype=torch.float32)
        made = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
        del summed
        return made


class _PackedLinear(torch.autograd.Function):
    """A frozen linear as bitsandbytes computes it: the weight is unpacked for each product and not kept."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
        # The result comes in the input's dtype, whatever the product is computed in.
        ctx.weight, ctx.dtype, ctx.inputs = weight.shape, dtype, hidden.dtype
        unpacked, cast = hidden.new_empty(weight.shape, dtype=dtype), hidden.to(dtype)
        product = cast.new_empty(*hidden.shape[:-1], weight.shape[0])
        del unpacked, cast
        return product.to(hidden.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        unpacked = gradients[0].new_empty(ctx.weight, dtype=ctx.dtype)
        cast = gradients[0].to(ctx.dtype)
        product = cast.new_empty(*gradients[0].shape[:-1], ctx.weight[1])
        del unpacked, cast
        return product.to(ctx.inputs), None, None
