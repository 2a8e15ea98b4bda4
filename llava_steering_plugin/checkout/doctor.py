"""Examine this Python and its LLaVA, without importing llava: will the plugin work, and which commands of it?"""

from __future__ import annotations

import importlib.metadata
import platform
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

from llava_steering_plugin.checkout.find import Llava, distribution_of, find_llava, git_commit, other_llavas
from llava_steering_plugin.checkout.patch import ENTRY_POINT, State, entry_point_problem, state
from llava_steering_plugin.errors import UpstreamError
from llava_steering_plugin.upstream.seams import COMMANDS, SEAMS, TRAIN, missing_seams
from llava_steering_plugin.upstream.source import package_folder
from llava_steering_plugin.upstream.train_source import broken_trainer

PACKAGES = (
    "llava-steering-plugin",
    "torch",
    "transformers",
    "tokenizers",
    "accelerate",
    "peft",
    "deepspeed",
    "bitsandbytes",
    "flash-attn",
    "numpy",
    "safetensors",
    "huggingface-hub",
    "wrapt",
    "gradio",
)


@dataclass
class LlavaReport:
    """Describes the LLaVA that was examined."""

    path: str
    found_by: str
    distribution: str | None
    version: str | None
    commit: str | None
    state: str
    others: list[str]


@dataclass
class SeamReport:
    """Says whether one name that the plugin needs is there, and which commands do not work without it."""

    name: str
    purpose: str
    found: bool
    stops: list[str]


@dataclass
class Report:
    """Holds everything that `llava-steering doctor` found.

    Attributes:
        stopped: the commands that do not work, because of names that are missing.
        problems: what keeps the plugin from working; empty when all of it works.
    """

    python: str
    executable: str
    llava: LlavaReport | None = None
    entry_point: str | None = None
    seams: list[SeamReport] = field(default_factory=list)
    packages: dict[str, str | None] = field(default_factory=dict)
    devices: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    next_steps: list[str] = field(default_factory=list)
    stopped: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, object]:
        """Return the report as plain values, for JSON."""
        return asdict(self)


def examine(path: Path | None = None) -> Report:
    """Examine the llava at `path`, or the one that `import llava` finds, and its surroundings."""
    report = Report(python=platform.python_version(), executable=sys.executable)
    report.packages = {name: _version(name) for name in PACKAGES}
    _examine_entry_point(report)
    try:
        _examine_llava(report, find_llava(path))
    except UpstreamError as error:
        report.problems.append(str(error))
    _examine_devices(report)
    if not report.problems:
        report.next_steps.append(
            "Add `--tuning_mode mores` to a training script of LLaVA; `llava-steering --help` lists what else there is."
        )
    return report


def _examine_entry_point(report: Report) -> None:
    problem = entry_point_problem()
    if problem is None:
        report.entry_point = ENTRY_POINT
    else:
        report.problems.append(problem)


def _examine_llava(report: Report, llava: Llava) -> None:
    distribution = distribution_of(llava)
    found = state(llava)
    report.llava = LlavaReport(
        path=str(llava.package),
        found_by=llava.found_by,
        distribution=distribution.metadata["Name"] if distribution else None,
        version=distribution.version if distribution else None,
        commit=git_commit(llava),
        state=found.value,
        others=[f"{other.package} ({other.found_by})" for other in other_llavas(llava)],
    )
    if found is State.CLEAN:
        report.next_steps.append(
            "Run `llava-steering patch` once; or, to edit nothing, start programs with "
            "`python -m llava_steering_plugin.launch MODULE ...`."
        )
    elif found is State.EDITED:
        report.problems.append(f"{llava.init}: the plugin block was edited; `llava-steering patch` says what to do.")
    if report.llava.others:
        report.next_steps.append("There is more than one LLaVA; `llava-steering patch --llava PATH` chooses one.")
    _examine_seams(report, llava)


def _examine_seams(report: Report, llava: Llava) -> None:
    missing = set(missing_seams(llava.package))
    report.seams = [SeamReport(str(seam), seam.purpose, seam not in missing, list(seam.stops)) for seam in SEAMS]
    report.stopped = [command for command in COMMANDS if any(command in seam.stops for seam in missing)]
    if broken := broken_trainer(llava.package):
        report.problems.append(f"{broken}.")
        report.stopped = [command for command in COMMANDS if command == TRAIN or command in report.stopped]
    if package_folder("transformers") is None:
        report.problems.append("transformers is not installed in this Python; install the version that LLaVA pins.")
        missing = {seam for seam in missing if not seam.module.startswith("transformers.")}
    for seam in SEAMS:
        if seam in missing:
            owner = "LLaVA" if seam.module.startswith("llava.") else "transformers"
            report.problems.append(
                f"this {owner} has no {seam}, which {seam.purpose}. Without it, these do not work: "
                f"{', '.join(seam.stops)}."
            )


def _examine_devices(report: Report) -> None:
    """Report name, memory and architecture of each CUDA device, or the processor.

    This imports torch: nothing else knows them.
    """
    try:
        import torch
    except ImportError as error:
        report.problems.append(f"torch cannot be imported: {error}. Install a build that fits this machine.")
        return
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        memory = device.total_memory / 2**30
        report.devices.append(f"cuda:{index} {device.name}, {memory:.0f} GiB, sm_{device.major}{device.minor}")
    if not report.devices:
        report.devices.append(f"cpu {platform.machine()}, {torch.get_num_threads()} threads")


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
