"""Say what a comparison is, and which keys its file may have."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TOP = (
    "base",
    "output",
    "defaults",
    "methods",
    "learning_rates",
    "seeds",
    "tasks",
    "processes",
    "gpus",
    "answers",
    "program",
    "launcher",
    "reference",
)  # fmt: skip
NEEDED = ("base", "output", "methods", "learning_rates", "seeds", "tasks")
OF_A_TASK = ("train", "image_folder", "validation", "test")
OF_A_TEST = ("questions", "annotations", "benchmark", "image_folder", "split", "metric")
# Options of `llava-steering eval` that may be given; the others depend on the cell.
OF_ANSWERS = ("batch_size", "conv_mode", "max_new_tokens", "num_beams", "device", "load_4bit", "load_8bit")
FROZEN, RATES = "frozen", "learning_rates"
# Flags that a comparison sets itself, and the key that says what.
OWN_FLAGS = {
    "model_name_or_path": "base",
    "data_path": "tasks",
    "image_folder": "tasks",
    "output_dir": "output",
    "learning_rate": "learning_rates",
    "seed": "seeds",
    "data_seed": "seeds",
    "overwrite_output_dir": "output",
    "resume_from_checkpoint": "output",
    "logging_nan_inf_filter": "nothing: a loss that is no number has to be seen",
}
# Flags whose values are files or folders; like every path in the file, they begin at the file's folder.
PATHS = (
    "vision_tower",
    "pretrain_mm_mlp_adapter",
    "deepspeed",
    "eval_data_path",
    "peft_config",
    "adapter_path",
)
# Of these, the ones that are files; the others may be names, or texts.
FILES = ("pretrain_mm_mlp_adapter", "deepspeed", "eval_data_path")
PROGRAM = "llava.train.train"
LONGEST_NAME = 60


@dataclass(frozen=True)
class Test:
    """A set of questions, and the benchmark by whose rule the answers are scored.

    Attributes:
        metric: GROUP.NAME of a number of the rule; None: its first one.
    """

    __test__ = False  # for pytest

    name: str
    questions: Path
    annotations: Path
    benchmark: str
    image_folder: Path
    split: str | None = None
    metric: str | None = None


@dataclass(frozen=True)
class Task:
    """Training data, with the tests that choose learning rates and those that report."""

    name: str
    train: Path
    image_folder: Path
    validation: tuple[Test, ...]
    test: tuple[Test, ...]


@dataclass(frozen=True)
class Method:
    """A way to tune the base.

    Attributes:
        flags: of the training, those of all methods included, without the ones that a cell sets.
        frozen: the base itself, which is not trained.
        rates: the learning rates that are tried.
    """

    name: str
    flags: Mapping[str, Any]
    frozen: bool
    rates: tuple[float, ...]

    @property
    def has_mode(self) -> bool:
        """Return whether a tuning mode is on: these trainings resume from their checkpoints."""
        return self.flags.get("tuning_mode", "none") not in (None, "none") or "adapter_path" in self.flags


@dataclass(frozen=True)
class Comparison:
    """A comparison as its file asks for it; paths are absolute.

    Attributes:
        base: folder or hub id of a LLaVA.
        processes: how many cells run at the same time.
        gpus: of these, each process gets one; empty: all processes see what this one sees.
        answers: options of `llava-steering eval`.
        program: the module of LLaVA's that trains.
        launcher: words before `llava_steering_plugin.launch` for trainings on several ranks; empty: one process.
        reference: the method that the tables show the others' differences from; None: the first that is trained.
        folder: where relative paths of the file begin.
    """

    base: str
    output: Path
    methods: tuple[Method, ...]
    seeds: tuple[int, ...]
    tasks: tuple[Task, ...]
    processes: int = 1
    gpus: tuple[int, ...] = ()
    answers: Mapping[str, Any] = field(default_factory=dict)
    program: str = PROGRAM
    launcher: tuple[str, ...] = ()
    reference: str | None = None
    folder: Path = Path()
