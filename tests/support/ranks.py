"""Several trainings by upstream's train() in one group of processes, because starting one takes longer than training.

    torchrun --nproc_per_node 2 tests/support/ranks.py RUNS.json

RUNS.json: a list of lists of flags. Run as a script only; `run_on_ranks` starts it.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path

from ports import free_port
from quantising import quantising_on_cpu
from training_runs import subprocess_environment, upstream_globals_restored


def run_on_ranks(
    runs: Sequence[Sequence[str]],
    llava: Path,
    folder: Path,
    *,
    ranks: int = 2,
    env: Mapping[str, str] | None = None,
    timeout: float = 400,
) -> None:
    """Trains one after the other with these flags, on `ranks` processes of this machine.

    Raises:
        RuntimeError: with the end of the output, if one failed.
    """
    listed = folder / "runs.json"
    listed.write_text(json.dumps([list(map(str, run)) for run in runs]))
    command = [*torchrun(ranks), __file__, str(listed)]
    process = subprocess.Popen(
        command,
        env=subprocess_environment(llava, env),
        cwd=folder,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        # torchrun ends its ranks when it is asked to, not when it is killed.
        process.terminate()
        output, _ = process.communicate()
        raise RuntimeError(f"training on {ranks} rank(s) took more than {timeout} s:\n{output[-8000:]}") from None
    if process.returncode:
        raise RuntimeError(f"training on {ranks} rank(s) ended with {process.returncode}:\n{output[-8000:]}")


def torchrun(ranks: int) -> list[str]:
    """torchrun's command on a port that nobody uses."""
    return [script("torchrun"), "--nproc_per_node", str(ranks), "--master_port", str(free_port())]


def starved(llava: Path) -> dict[str, str]:
    """The environment of ranks whose exchange waits for its turn; without mending, they abort when Python ends."""
    path = os.pathsep.join([str(Path(__file__).with_name("starved")), str(llava), os.environ.get("PYTHONPATH", "")])
    return {"PYTHONPATH": path}


def script(name: str) -> str:
    """A console script of this environment, which need not be activated."""
    return str(Path(sys.executable).with_name(name))


def main(listed: Path) -> None:
    from llava_steering_plugin.upstream.cuda_to_cpu import redirect_cuda_to_cpu

    redirect_cuda_to_cpu()
    import torch

    runs = json.loads(listed.read_text())
    if any("--deepspeed" in flags for flags in runs):
        from llava_steering_plugin.training.deepspeed import start_on_cpu

        start_on_cpu()
    from llava.train import train as upstream

    gc.freeze()  # what was imported is no garbage: every training would look for it there
    for flags in runs:
        with upstream_globals_restored(), quantising_on_cpu() if "--bits" in flags else nullcontext():
            sys.argv = ["train.py", *flags]
            torch.manual_seed(0)  # the projector is drawn before the Trainer seeds anything
            upstream.train()
        # transformers asks a weak reference to the last run's config whether ZeRO-3 is on.
        gc.collect()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
