"""Check the flags that measure a training while it runs: --steering_diagnostics_steps and its samples."""

from __future__ import annotations

from typing import Any

STEPS, SAMPLES = "steering_diagnostics_steps", "steering_diagnostics_samples"
STEPS_HELP = (
    "with a tuning mode: measure attention to the image, updates and routers before the first step, every so many "
    "steps and at the end; 0: never"
)
SAMPLES_HELP = "on so many samples of --eval_data_path, or else of --data_path (default: 4)"
DEFAULT_SAMPLES = 4


def samples(flags: Any) -> int:
    """Return on how many samples to measure."""
    given = getattr(flags, SAMPLES, None)
    return DEFAULT_SAMPLES if given is None else int(given)


def diagnostics_problems(flags: Any) -> list[str]:
    """Return what keeps a training with a tuning mode from measuring as its flags ask."""
    steps, given = getattr(flags, STEPS, 0), getattr(flags, SAMPLES, None)
    problems = []
    if steps < 0:
        problems.append(f"--{STEPS} is {steps}; it must be at least 1, or 0 to measure nothing")
    if given is not None and given < 1:
        problems.append(f"--{SAMPLES} is {given}; it must be at least 1")
    elif given is not None and not steps:
        problems.append(f"--{SAMPLES} {given} has no effect without --{STEPS}")
    return problems


def problems_without_mode(flags: Any) -> list[str]:
    """Return the flags that a training without a tuning mode does not know."""
    given = {name: getattr(flags, name, None) for name in (STEPS, SAMPLES)}
    return [
        f"--{name} {value} works with a tuning mode only; add --tuning_mode" for name, value in given.items() if value
    ]
