"""Trainings that are killed at random moments and inside their saves end bit-equal to one that is not.

LLAVA_STEERING_KILLS is how often one training is killed (default 6; with two ranks a third of it), and
LLAVA_STEERING_SEED what chooses the moments.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from deepspeed_files import zero
from forks import Forks
from ports import free_port
from rank_runs import assert_equal
from tiny_llava import TinyLlava
from torch.utils import cpp_extension
from training_runs import train_flags

from llava_steering_plugin.adapters.stored.folder import WEIGHTS
from llava_steering_plugin.training.saving import checkpoints, integrity

pytest_plugins = ["fork_fixtures"]
pytestmark = pytest.mark.slow

KILLS = int(os.environ.get("LLAVA_STEERING_KILLS", "6"))
SEED = int(os.environ.get("LLAVA_STEERING_SEED", "0"))

# Two epochs of six steps, in an order by modality and length, with a trained projector.
FLAGS: dict[str, object] = {
    "tuning_mode": "mores",
    "mores_rank": 2,
    "mores_tokens": "all",
    "mores_dropout": 0.1,
    "max_steps": None,
    "num_train_epochs": 2,
    "save_strategy": "steps",
    "save_steps": 2,
    "save_total_limit": 1,
}
TWO_RANKS = {"per_device_train_batch_size": 2}
LAST_STEP_OF_THE_FIRST_EPOCH = 6
LAST_STEP = 12
# Inside a save: it changes files about 15 times, so a killed process comes one checkpoint further, or none.
CHANGES = 20


@pytest.fixture
def forks(patched_forks: Forks) -> Forks:
    return patched_forks


class Job:
    """One start of a training, on one rank or several."""

    def __init__(
        self,
        forks: Forks,
        flags: list[str],
        ranks: int,
        die_at: Mapping[int, int] | None = None,
        env: Mapping[str, str] | None = None,
    ):
        self.forks = forks
        together = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        self.processes, self.logs = [], []
        self.statuses: dict[int, int] = {}
        for rank in range(ranks):
            own = {**together, "RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {}
            process, log = forks.start(flags, env={**own, **(env or {})}, die_at=(die_at or {}).get(rank))
            self.processes.append(process)
            self.logs.append(log)

    def send(self, number: signal.Signals) -> None:
        """To all processes, and those that they have started."""
        for process in self.processes:
            with suppress(ProcessLookupError):
                os.killpg(process, number)

    def wait(self, *ranks: int) -> list[int]:
        """The exit statuses of all ranks, or of these."""
        for rank in ranks or range(len(self.processes)):
            if rank not in self.statuses:
                self.statuses[rank] = self.forks.wait(self.processes[rank])
        return [status for _, status in sorted(self.statuses.items())]

    def said(self) -> str:
        return "".join(f"\n--- {log.name}\n{log.read_text(errors='replace')[-3000:]}" for log in self.logs)


def kill_once(forks: Forks, flags: list[str], ranks: int, rng: random.Random, seconds: float, operations: Path) -> bool:
    """Starts the training and kills it somewhere; False if it came to its end before."""
    for lock in operations.glob("*/lock"):
        lock.unlink()  # a training would do it itself, after waiting for ten minutes
    inside = rng.random() < 0.7
    victim = rng.randrange(ranks)
    env = {"TORCH_EXTENSIONS_DIR": str(operations)}
    job = Job(forks, flags, ranks, {victim: rng.randint(1, CHANGES)} if inside else None, env)
    if inside:
        job.wait(victim)
    else:
        time.sleep(rng.uniform(0, seconds))
    job.send(signal.SIGKILL)  # as a launcher ends them all
    statuses = job.wait()
    # The others may have died of the lost connection before.
    assert set(statuses) == {0} or -signal.SIGKILL in statuses, job.said()
    # Where one rank has ended and another was killed, the training was killed: rank 0 writes the result.
    return set(statuses) != {0}


def copied_operations(folder: Path) -> Path:
    """What DeepSpeed has compiled on this machine, in a folder where a killed process can leave its lock."""
    compiled = Path(cpp_extension._get_build_directory("deepspeed", verbose=False))
    compiled.rmdir()
    return Path(shutil.copytree(compiled.parent, folder))


def history(output: Path) -> list[tuple[Any, ...]]:
    entries = json.loads((output / integrity.STATE).read_text())["log_history"]
    return [(entry["step"], entry["loss"], entry["learning_rate"]) for entry in entries if "loss" in entry]


@pytest.mark.parametrize(("ranks", "deepspeed"), [(1, 0), (2, 0), (2, 2)], ids=["one rank", "two ranks", "ZeRO-2"])
def test_a_training_that_is_killed_again_and_again_ends_bit_equal_to_an_undisturbed_one(
    forks: Forks, tiny: TinyLlava, tmp_path: Path, ranks: int, deepspeed: int
) -> None:
    chosen = {**FLAGS, **(TWO_RANKS if ranks > 1 else {})}
    if deepspeed:
        chosen |= {"deepspeed": zero(tmp_path, deepspeed), "use_cpu": None}
        # DeepSpeed compiles for minutes where it never ran, which is not the time that a training takes.
        first = Job(
            forks, train_flags(tiny, tmp_path / "first", {**chosen, "num_train_epochs": None, "max_steps": 1}), ranks
        )
        assert first.wait() == [0] * ranks, first.said()
    start = time.monotonic()
    whole = Job(forks, train_flags(tiny, tmp_path / "whole", chosen), ranks)
    assert whole.wait() == [0] * ranks, whole.said()
    seconds = time.monotonic() - start

    operations = copied_operations(tmp_path / "operations")

    output, rng = tmp_path / "run", random.Random(SEED + 10 * ranks + deepspeed)
    flags = train_flags(tiny, output, chosen)
    wanted, kills, reached = KILLS if ranks == 1 else -(-KILLS // 3), 0, 0
    # The last start has to find a checkpoint of the second epoch: only there does the order of the data tell.
    while kills < wanted or reached <= LAST_STEP_OF_THE_FIRST_EPOCH:
        left = seconds * (1 - reached / LAST_STEP)  # one that comes to its end begins anew
        if not kill_once(forks, flags, ranks, rng, left, operations):
            assert_ended_alike(tmp_path / "whole", output)
            shutil.rmtree(output)
            reached = 0
            continue
        kills += 1
        # A folder is renamed when it is whole and before it is deleted: what has the name is whole at any moment.
        found = checkpoints.by_step(output) if output.exists() else {}
        assert not {step: problems for step in found if (problems := integrity.checkpoint_problems(found[step]))}
        newest = max(found, default=0)
        assert newest >= reached, "a checkpoint was lost"
        reached = newest
    last = Job(forks, flags, ranks)
    assert last.wait() == [0] * ranks, last.said()
    assert_ended_alike(tmp_path / "whole", output)


def assert_ended_alike(whole: Path, output: Path) -> None:
    """Everything that a training leaves is the same, to the bit, and nothing of the killed ones is left."""
    assert_equal(whole, output)
    assert_equal(whole / "checkpoint-12", output / "checkpoint-12")
    assert history(output) == history(whole)
    assert len(history(output)) == 12
    assert [path.name for path in output.glob("*checkpoint*")] == ["checkpoint-12"]
    assert not list(output.glob(".*")), "partial files of the killed processes are still there"


@pytest.mark.parametrize("ranks", [1, 2], ids=["one rank", "two ranks"])
def test_a_sigterm_to_one_rank_and_its_data_loaders_workers_saves_the_same_step_on_all(
    forks: Forks, tiny: TinyLlava, tmp_path: Path, ranks: int
) -> None:
    output = tmp_path / "run"
    endless = {
        "num_train_epochs": 100_000,
        "save_steps": 5,
        "dataloader_num_workers": 1,
        "lr_scheduler_type": "constant",
    }
    job = Job(forks, train_flags(tiny, output, {**FLAGS, **endless}), ranks)
    wait_for(output / "checkpoint-10", job)
    # All processes of the last rank, as torchrun, deepspeed and Slurm do.
    os.killpg(job.processes[-1], signal.SIGTERM)
    assert job.wait() == [128 + signal.SIGTERM] * ranks, job.said()
    newest = output / f"checkpoint-{max(checkpoints.by_step(output))}"
    assert not integrity.checkpoint_problems(newest)
    assert integrity.ranks_of(newest) == ranks
    assert not (output / WEIGHTS).exists(), "an unfinished training looks finished"


def wait_for(folder: Path, job: Job, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not folder.exists():
        if time.monotonic() > end:
            job.send(signal.SIGKILL)
            raise RuntimeError(f"{folder} did not appear: {job.wait()} {job.said()}")
        time.sleep(0.05)
