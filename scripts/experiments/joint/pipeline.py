"""Compare joint modes with their parts, at the same steps, seeds, order of samples and budget of learning rates.

The task is the demo's: a camera with permuted colour channels is taught to its base. scripts/joint.sh sets everything
up and starts it. It uses the demo's base, and makes it if it is not there.
"""

from __future__ import annotations

from experiments import camera, comparing
from experiments.joint.settings import FULL, QUICK
from experiments.program import (
    OUTPUT,
    OutputOption,
    ProcessesOption,
    QuickOption,
    SeedsOption,
    StepsOption,
    runner_of,
    sized,
)


def main(
    output: OutputOption = OUTPUT,
    quick: QuickOption = False,
    steps: StepsOption = None,
    seeds: SeedsOption = None,
    processes: ProcessesOption = None,
) -> None:
    """Tune the demo's base with MoReS, LoRA and MixLoRA alone, and with MoReS and one of the others at once."""
    settings = sized(QUICK if quick else FULL, steps, seeds, processes)
    with runner_of("joint", output, quick) as runner:
        compared = camera.compare("joint", settings, runner)
    runner.console.print(comparing.table_of(compared.document))
    tables = runner.root / "joint" / comparing.OUTPUT / "results.md"
    runner.console.print(f"[bold]{tables}[/bold] has paired differences, costs and learning rates")
