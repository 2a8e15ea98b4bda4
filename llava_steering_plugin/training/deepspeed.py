"""DeepSpeed's ZeRO: the one place that imports it. Everywhere else a parameter is just a parameter."""

from __future__ import annotations

import functools
import logging
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llava_steering_plugin.distributed import is_partitioned
from llava_steering_plugin.errors import SteeringError

logger = logging.getLogger(__name__)
# Longer than any of DeepSpeed's operations takes to compile; another machine with the same home may be at it.
COMPILING_SECONDS = 600
LOOK_SECONDS = 1.0


def start_on_cpu() -> None:
    """Lets this process, one that a launcher started, train with DeepSpeed on the processor (`launch --cpu`).

    Call it before transformers reads `--deepspeed`: accelerate would start NCCL and take a CUDA device.

    Raises:
        SteeringError: there is no DeepSpeed, or one that needs more than the processor.
    """
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("ACCELERATE_TORCH_DEVICE", "cpu")
    try:
        import deepspeed
    except (ImportError, ValueError) as error:
        # 0.12.6, which upstream pins, wants Intel's extension of torch.
        raise SteeringError(
            f"DeepSpeed does not start on the processor: {error} Version 0.19.8 does: pip install deepspeed==0.19.8 "
            "ninja (after torch, with --no-build-isolation)."
        ) from error

    remove_abandoned_locks()
    deepspeed.init_distributed("gloo")


def remove_abandoned_locks() -> None:
    """Removes what processes that were killed left where torch compiles DeepSpeed's operations.

    torch's lock is a file that exists, without an owner or an end: whoever finds it waits for ever, so that a training
    killed while an operation was looked up would hang at every start from then on. One that a process of this machine
    has open is left alone. One that is younger than a compilation may take is waited for: another machine may hold it.
    """
    from torch.utils import cpp_extension

    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root())
    for lock in [*root.glob("*/lock"), *root.glob("*/*/lock")]:
        with suppress(FileNotFoundError):  # whoever held it has ended, or another rank was faster
            _see_to(lock)


def _see_to(lock: Path) -> None:
    """Returns when the lock is held by a process of this machine, or removed. FileNotFoundError: it has gone."""
    told = False
    while not _is_open(lock):
        left = COMPILING_SECONDS - (time.time() - lock.stat().st_mtime)
        if left <= 0:
            _remove(lock)
            return
        if not told:
            logger.warning(
                "DeepSpeed would wait for %s, which none of your processes here holds. Waiting until it goes, for %.0f "
                "s at most: then it is removed. If nobody else is compiling into that folder, delete the file and this "
                "training goes on at once.",
                lock,
                left,
            )
            told = True
        time.sleep(min(left, LOOK_SECONDS))


def _remove(lock: Path) -> None:
    try:
        lock.unlink()
    except FileNotFoundError:
        pass  # another rank was faster
    except OSError as error:
        logger.warning(
            "DeepSpeed will wait for %s, left by a process that was killed, and it cannot be removed: %s. Have its "
            "owner delete it, or set TORCH_EXTENSIONS_DIR to a folder of your own.",
            lock,
            error,
        )
    else:
        logger.warning("removed %s, left by a process that was killed: DeepSpeed would wait for it", lock)


def _is_open(path: Path) -> bool:
    """Whether a process that we may look at has it open. Only Linux tells; elsewhere age alone decides."""
    real = path.resolve()  # /proc knows no links
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended meanwhile, or is another user's
            for descriptor in (process / "fd").iterdir():
                with suppress(OSError):
                    if descriptor.readlink() == real:
                        return True
    return False


def before_initialize(config: dict[str, Any], dtype: torch.dtype, model: nn.Module, hidden_size: int) -> None:
    """Mends what keeps current DeepSpeed from ZeRO-3 with transformers 4.37.

    Args:
        config: DeepSpeed's, as transformers has read it; it is what `deepspeed.initialize` will get.
        dtype: what the engine computes in.
        model: with everything that is trained, before `deepspeed.initialize`.
        hidden_size: width of the model.
    """
    settings = config.get("zero_optimization") or {}
    if settings.get("stage") != 3:
        return
    if settings.get("stage3_prefetch_bucket_size") == "auto":
        # transformers would fill in 0.9 times the square as a float, which DeepSpeed >= 0.16 refuses.
        settings["stage3_prefetch_bucket_size"] = int(0.9 * hidden_size * hidden_size)
    for parameter in model.parameters():
        if is_partitioned(parameter):
            # Upstream casts the vision tower when its parameters are empty already, so that the first image is rounded
            # to a dtype that the weights never take.
            parameter.data = parameter.data.to(parameter.ds_tensor.dtype)  # type: ignore[attr-defined]
        elif parameter.is_floating_point():
            # What `from_pretrained` made is cut and cast already. The rest, projector and adapter, DeepSpeed 0.19 would
            # cut in the dtype it has, and then refuse to mix it with the model's.
            parameter.data = parameter.data.to(dtype)


def mend_preparation(accelerator: Any) -> None:
    """Mends what `accelerator` does when it prepares an engine.

    The engine leaves frozen weights out of its checkpoints, and loads them so; and a quantised model stays where it is.
    """
    prepare = accelerator.prepare

    @functools.wraps(prepare)
    def prepared(*args: Any, **kwargs: Any) -> Any:
        with ExitStack() as stack:
            for part in args:
                if getattr(part, "is_quantized", False):
                    stack.enter_context(_left_in_place(part))
            results: Any = prepare(*args, **kwargs)
        engines: Iterable[Any] = results if isinstance(results, tuple) else (results,)
        for engine in engines:
            if hasattr(engine, "load_checkpoint"):
                engine.save_checkpoint = functools.partial(engine.save_checkpoint, exclude_frozen_parameters=True)
                engine.load_checkpoint = functools.partial(engine.load_checkpoint, load_module_strict=False)
        return results

    accelerator.prepare = prepared


@contextmanager
def _left_in_place(model: nn.Module) -> Iterator[None]:
    """Inside, `to`, `half` and `bfloat16` do nothing: DeepSpeed's engine calls them whatever the model is.

    transformers' own refuse quantised models, because they are what and where they should be from the start.
    """
    names = ("to", "half", "bfloat16")
    for name in names:
        setattr(model, name, lambda *args, **kwargs: model)
    try:
        yield
    finally:
        for name in names:
            delattr(model, name)
