"""Run one of LLaVA's programs with the plugin active, without editing LLaVA: for installs that are read-only.

    python -m llava_steering_plugin.launch [--cpu] [--seed N] [--same-order] [--measure FILE] MODULE [ARGUMENTS]
    deepspeed --module llava_steering_plugin.launch llava.train.train_mem --tuning_mode mores ...
    torchrun --nproc_per_node 2 -m llava_steering_plugin.launch llava.train.train_mem --tuning_mode mores ...

Hooks have no effect on a module that runs as `__main__`, as with `python -m`, and train.py needs them. So the module is
imported under its own name, and then the body of its `if __name__ == "__main__":` block is executed in its namespace.
That block is what LLaVA's authors wrote for the program, whichever it is: `train()`,
`train(attn_implementation="flash_attention_2")`, or an argument parser whose `args` the module's functions read as a
global.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import importlib.util
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType
from typing import NoReturn

from llava_steering_plugin.errors import SteeringError, UpstreamError, nearest
from llava_steering_plugin.lazy_imports import defer_compilation
from llava_steering_plugin.upstream import startup
from llava_steering_plugin.upstream.install import install
from llava_steering_plugin.upstream.source import is_main_test

DESCRIPTION = """\
Run one of LLaVA's programs with the plugin active, without editing LLaVA. For example:

  python -m llava_steering_plugin.launch llava.train.train --tuning_mode mores ...
  deepspeed --module llava_steering_plugin.launch llava.train.train_mem --tuning_mode mores ...
  python -m llava_steering_plugin.launch --cpu llava.eval.model_vqa_loader --model-path ADAPTER ...

Options of launch come before MODULE. Everything after MODULE is passed to the module.
"""


class UsageError(SteeringError):
    """The command line of `launch` itself is wrong."""


@dataclass
class LaunchRequest:
    """Holds what the command line asks for.

    Attributes:
        module: dotted name of the module to run.
        arguments: its own command line.
        cpu: run on the CPU, also what asks for CUDA.
        seed: of torch, set before the program starts; None: not set.
        same_order: a training without a mode sees its samples in the order of one with a mode.
        measure: where a training writes losses, times and memory; None: nowhere.
    """

    module: str
    arguments: list[str] = field(default_factory=list)
    cpu: bool = False
    seed: int | None = None
    same_order: bool = False
    measure: str | None = None


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


def command_parser() -> argparse.ArgumentParser:
    """Return the parser of the options that come before MODULE."""
    parser = _Parser(
        prog="python -m llava_steering_plugin.launch",
        usage="python -m llava_steering_plugin.launch [--cpu] [--seed N] [--same-order] [--measure FILE] MODULE "
        "[ARGUMENTS of MODULE]",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
        allow_abbrev=False,
    )
    parser.add_argument(
        "program",
        metavar="MODULE",
        nargs=argparse.REMAINDER,
        help="the program, such as llava.train.train; its arguments",
    )
    parser.add_argument(
        "--cpu",
        action="store_true",
        help="run on the CPU, including programs that ask for CUDA by name (LLaVA's evaluation scripts)",
    )
    parser.add_argument(
        "--seed",
        metavar="N",
        type=_seed,
        help="set torch's seed first: LLaVA initialises a new projector before its own --seed takes effect",
    )
    parser.add_argument(
        "--same-order",
        action="store_true",
        help="let a training without a mode (LoRA, full) see its samples in the order that a mode has at the same seed",
    )
    parser.add_argument(
        "--measure",
        metavar="FILE",
        help="write a training's losses, the time of a step beside the frozen model's, memory and parameters as JSON",
    )
    parser.add_argument("-h", "--help", action="store_true", help="show this text; after MODULE, the help of MODULE")
    # deepspeed and old versions of torchrun put it before MODULE, with `=`.
    for name in ("--local_rank", "--local-rank"):
        parser.add_argument(name, dest=name, help=argparse.SUPPRESS)
    return parser


def read_request(words: Sequence[str]) -> LaunchRequest | None:
    """Split the command line at MODULE; return None if it asks for help.

    Everything after MODULE belongs to the module. `--local_rank=N` before MODULE is handed on to it.

    Raises:
        UsageError: an unknown option before MODULE, a seed that is no number, or no MODULE.
    """
    options, unknown = command_parser().parse_known_args(words)
    if options.help:
        return None
    if unknown:
        raise UsageError(f"unknown option {unknown[0]} before MODULE; the options of MODULE come after its name")
    if not options.program:
        raise UsageError("no MODULE given, for example llava.train.train")
    module, *arguments = options.program
    ranks = [f"{name}={rank}" for name, rank in vars(options).items() if name.startswith("--local") and rank]
    return LaunchRequest(module, [*ranks, *arguments], options.cpu, options.seed, options.same_order, options.measure)


def _seed(word: str) -> int:
    if not word.isascii() or not word.isdigit() or int(word) >= 2**64:
        raise argparse.ArgumentTypeError(f"takes a whole number from 0 to 2**64 - 1, not {word!r}")
    return int(word)


def run(request: LaunchRequest) -> None:
    """Run the module's program in this process.

    Raises:
        UpstreamError: there is no such module, or it is no program.
    """
    _refuse_a_path(request.module)
    defer_compilation()
    sys.argv = [request.module, *request.arguments]
    if startup.WORKER == request.module:
        startup.append_model_name(sys.argv)
    if request.cpu:
        from llava_steering_plugin.upstream.cuda_to_cpu import redirect_cuda_to_cpu

        redirect_cuda_to_cpu()
        if startup.flag_value(request.arguments, "--deepspeed") is not None and "RANK" in os.environ:
            from llava_steering_plugin.training.deepspeed import start_on_cpu

            start_on_cpu()
    source = _find_source(request.module)
    sys.argv[0] = str(source)
    program = main_block(source)
    if program is None:
        raise UpstreamError(
            f'{request.module} ({source}) has no `if __name__ == "__main__":` block, so there is nothing to run. '
            "Programs of LLaVA are, for example, llava.train.train, llava.eval.model_vqa and llava.serve.cli."
        )
    # Only now, with llava itself imported, as in a patched llava: llava/model/__init__.py has a bare `except: pass`
    # that would turn an error of a hook inside `import llava` into a puzzle.
    install()
    module = importlib.import_module(request.module)
    if request.seed is not None:
        import torch

        torch.manual_seed(request.seed)
    if request.same_order:
        from llava_steering_plugin.training.data.samples import SAME_ORDER

        SAME_ORDER.set(True)
    if request.measure is not None:
        from llava_steering_plugin.training.measured import MEASURE

        MEASURE.set(Path(request.measure).absolute())
    exec(program, vars(module))


def main_block(source: Path) -> CodeType | None:
    """Return the code below `if __name__ == "__main__":` in the file, with its line numbers; None if there is none."""
    tree = ast.parse(source.read_bytes(), filename=str(source))
    body = [
        statement
        for node in tree.body
        if isinstance(node, ast.If) and is_main_test(node.test)
        for statement in node.body
    ]
    return compile(ast.Module(body, type_ignores=[]), str(source), "exec") if body else None


def _refuse_a_path(module: str) -> None:
    if "/" in module or module.endswith(".py"):
        parts = Path(module).with_suffix("").parts
        start = parts.index("llava") if "llava" in parts else 0
        raise UpstreamError(
            f"{module} is a path; launch takes the name of a module, as in `python -m`: {'.'.join(parts[start:])}"
        )


def _find_source(name: str) -> Path:
    """Return the source file of a module; only its parent packages are imported."""
    parent, _, last = name.rpartition(".")
    try:
        spec = importlib.util.find_spec(name)
    except ModuleNotFoundError as error:
        # Only a missing part of the name itself means "no such module"; a missing dependency keeps its traceback.
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise
        if error.name == "llava":
            raise UpstreamError(
                "there is no llava to run: start in a LLaVA checkout, or install LLaVA with `pip install -e .` there. "
                "`llava-steering doctor` shows which LLaVA Python finds."
            ) from None
        spec = None
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        siblings = _modules_beside(parent)
        hint = nearest(last, siblings, spelled=f"{parent}.{{}}".format, at_most=3)
        raise UpstreamError(
            f"there is no module {name} to run in {_where(name)}. {hint[:1].upper()}{hint[1:]}".rstrip()
        )
    return Path(spec.origin)


def _modules_beside(parent: str) -> list[str]:
    folders = getattr(sys.modules.get(parent), "__path__", [])
    return [file.stem for folder in folders for file in Path(folder).glob("*.py") if file.stem != "__init__"]


def _where(name: str) -> str:
    top = name.partition(".")[0]
    file = getattr(sys.modules.get(top), "__file__", None)
    return str(Path(file).parent) if file else "this Python's path"


def main() -> None:
    """Run `python -m llava_steering_plugin.launch`."""
    try:
        request = read_request(sys.argv[1:])
        if request is None:
            sys.stdout.write(command_parser().format_help())
            return
        run(request)
    except UsageError as error:
        sys.stderr.write(f"{command_parser().format_usage()}launch: {error}\n")
        sys.exit(2)
    except SteeringError as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        sys.exit(1)


if __name__ == "__main__":
    main()
