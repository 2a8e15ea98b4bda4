"""Prepare DeepSpeed for a training. Only this module and `distributed` import it."""

from __future__ import annotations

import functools
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llava_steering_plugin.distributed import is_partitioned
from llava_steering_plugin.errors import SteeringError

logger = logging.getLogger(__name__)
# Longer than any of DeepSpeed's operations takes to compile; another machine with the same home may be compiling.
COMPILING_SECONDS = 600
LOOK_SECONDS = 1.0


def start_on_cpu() -> None:
    """Let this process, which a launcher started, train with DeepSpeed on the CPU (`launch --cpu`).

    Call it before transformers reads `--deepspeed`: accelerate would start NCCL and take a CUDA device.

    Raises:
        SteeringError: DeepSpeed is not installed, or its version cannot run on the CPU alone.
    """
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("ACCELERATE_TORCH_DEVICE", "cpu")
    try:
        import deepspeed
    except (ImportError, ValueError) as error:
        # 0.12.6, which LLaVA pins, needs Intel's extension of torch.
        raise SteeringError(
            f"DeepSpeed does not start on the CPU: {error} Version 0.19.8 does: pip install deepspeed==0.19.8 "
            "ninja (after torch, with --no-build-isolation)."
        ) from error

    remove_abandoned_locks()
    deepspeed.init_distributed("gloo")


def remove_abandoned_locks() -> None:
    """Remove the locks that killed processes have left where torch compiles DeepSpeed's operations.

    torch's lock is a file without an owner or an expiry, and a process that finds it waits for ever. After a training
    was killed while it held the lock, every later one would hang at its start. A lock that a process of this machine
    has open is left alone. One that is younger than a compilation may take is waited for: another machine may hold it.
    """
    from torch.utils import cpp_extension

    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root())
    for lock in [*root.glob("*/lock"), *root.glob("*/*/lock")]:
        with suppress(FileNotFoundError):  # its owner has released it, or another rank was faster
            _wait_or_remove(lock)


def _wait_or_remove(lock: Path) -> None:
    """Return when the lock is held by a process of this machine, or removed.

    Raises:
        FileNotFoundError: the lock is gone.
    """
    warned = False
    while not _is_open(lock):
        left = COMPILING_SECONDS - (time.time() - lock.stat().st_mtime)
        if left <= 0:
            _remove(lock)
            return
        if not warned:
            logger.warning(
                "DeepSpeed would wait for the lock %s, which none of your processes on this machine holds. Waiting up "
                "to %.0f s for its release; then it is removed. If no other machine is compiling into that folder, "
                "delete the file, and this training continues at once.",
                lock,
                left,
            )
            warned = True
        time.sleep(min(left, LOOK_SECONDS))


def _remove(lock: Path) -> None:
    try:
        lock.unlink()
    except FileNotFoundError:
        pass  # another rank was faster
    except OSError as error:
        logger.warning(
            "DeepSpeed will wait for the lock %s, which a killed process has left and which cannot be removed: %s. Ask "
            "its owner to delete it, or set TORCH_EXTENSIONS_DIR to a folder of your own.",
            lock,
            error,
        )
    else:
        logger.warning("removed the lock %s, which a killed process has left: DeepSpeed would wait for it", lock)


def _is_open(path: Path) -> bool:
    """Return whether a process that we may inspect has the file open. Only Linux tells; elsewhere the age decides."""
    real = path.resolve()  # /proc lists no links
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended meanwhile, or belongs to another user
            for descriptor in (process / "fd").iterdir():
                with suppress(OSError):
                    if descriptor.readlink() == real:
                        return True
    return False


def fix_zero_3(config: dict[str, Any], hidden_size: int) -> None:
    """Fix a setting that keeps current DeepSpeed from running ZeRO-3 with transformers 4.37.

    Args:
        config: of DeepSpeed, as transformers has read it; `deepspeed.initialize` will get it.
        hidden_size: width of the model.
    """
    settings = config.get("zero_optimization") or {}
    if settings.get("stage") == 3 and settings.get("stage3_prefetch_bucket_size") == "auto":
        # transformers would fill in 0.9 times the square as a float, which DeepSpeed >= 0.16 refuses.
        settings["stage3_prefetch_bucket_size"] = int(0.9 * hidden_size * hidden_size)


def fix_preparation(accelerator: Any, dtype: torch.dtype | None = None) -> None:
    """Make the engine that `accelerator` prepares write checkpoints without frozen weights, and load them.

    A quantised model keeps its device and its dtypes.

    Args:
        dtype: the engine computes in it, and ZeRO-3 cuts all parameters in it; None: another stage.
    """
    prepare = accelerator.prepare

    @functools.wraps(prepare)
    def prepared(*args: Any, **kwargs: Any) -> Any:
        with ExitStack() as stack:
            for part in args:
                if getattr(part, "is_quantized", False):
                    stack.enter_context(_left_in_place(part))
                if dtype is not None and isinstance(part, nn.Module):
                    _cast(part, dtype)
            results: Any = prepare(*args, **kwargs)
        engines: Iterable[Any] = results if isinstance(results, tuple) else (results,)
        for engine in engines:
            if hasattr(engine, "load_checkpoint"):
                engine.save_checkpoint = _always(engine.save_checkpoint, exclude_frozen_parameters=True)
                engine.load_checkpoint = _always(engine.load_checkpoint, load_module_strict=False)
                # accelerate 0.21 asks for it while gradients are accumulated. DeepSpeed counts batches itself, and 0.19
                # refuses to be asked where it shards gradients.
                engine.no_sync = nullcontext
        return results

    accelerator.prepare = prepared


def _cast(model: nn.Module, dtype: torch.dtype) -> None:
    """Give all parameters the dtype of what ZeRO-3 has cut already: DeepSpeed refuses to mix them."""
    for parameter in model.parameters():
        if is_partitioned(parameter):
            # LLaVA casts the vision tower when its parameters are sharded already, so that the first image is rounded
            # to a dtype that the weights never take.
            parameter.data = parameter.data.to(parameter.ds_tensor.dtype)  # type: ignore[attr-defined]
        elif parameter.is_floating_point():
            # What `from_pretrained` made is sharded and cast already. DeepSpeed 0.19 would shard projector and adapter
            # in their own dtype.
            parameter.data = parameter.data.to(dtype)


def _always(method: Callable[..., Any], **settings: Any) -> Callable[..., Any]:
    """Return a method with these arguments, whatever its caller says: transformers 5 says them, too."""

    @functools.wraps(method)
    def called(*args: Any, **kwargs: Any) -> Any:
        return method(*args, **{**kwargs, **settings})

    return called


@contextmanager
def _left_in_place(model: nn.Module) -> Iterator[None]:
    """Make `to`, `half` and `bfloat16` do nothing inside the block: DeepSpeed's engine calls them on every model.

    Those of transformers refuse quantised models, which have their device and dtypes from the start.
    """
    names = ("to", "half", "bfloat16")
    for name in names:
        setattr(model, name, lambda *args, **kwargs: model)
    try:
        yield
    finally:
        for name in names:
            delattr(model, name)
