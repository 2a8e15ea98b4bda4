"""Define the command line of the benchmarks. Each command imports its module when it runs, so that `--help` is quick.

Every command ends with status 0 if its criteria are met, and with 1 if they are not.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    name="benchmarks",
    help="Measure what the plugin costs. docs/benchmarks.md shows results.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Quick = Annotated[bool, typer.Option("--quick", help="Run a small version that takes a few minutes.")]
JsonFile = Annotated[Path | None, typer.Option("--json", help="Write all results to this file.")]
Threads = Annotated[
    int, typer.Option(min=1, help="Number of torch threads. With more than one, wall-clock time is measured.")
]
Dtype = Annotated[str, typer.Option(help="Data type of the model: float32, bfloat16 or float16.")]


@app.command()
def mores(quick: Quick = False, json_file: JsonFile = None, threads: Threads = 1, dtype: Dtype = "float32") -> None:
    """Measure what MoReS costs beside the frozen model.

    Time, FLOPs, parameters and buffers, on real Llama layer shapes with random weights.

    Passes if no setting takes more than 3 % longer in forward, forward + backward or a decode step, and if FLOPs,
    parameters and buffers equal the formulas. With --quick, a time fails only if its whole interval is above the limit.
    """
    from .mores import run

    raise typer.Exit(run(quick, json_file, threads, dtype))


@app.command()
def transformers(
    quick: Quick = False, json_file: JsonFile = None, threads: Threads = 1, dtype: Dtype = "float32"
) -> None:
    """Measure what MoReS costs on transformers' own Llava.

    A training step and a decode step, beside the frozen model and PEFT's LoRA, with random weights. It needs
    transformers 5: run it with the Python of .venv-transformers. It ends with status 2 where transformers is older.

    Passes if no setting of MoReS takes more than 3 % longer than the frozen model. With --quick, a time fails only if
    its whole interval is above the limit.
    """
    from .own_classes import run

    raise typer.Exit(run(quick, json_file, threads, dtype))


@app.command()
def mixlora(
    quick: Quick = False,
    json_file: JsonFile = None,
    threads: Threads = 1,
    dtype: Dtype = "float32",
    longest: Annotated[
        float, typer.Option("--seconds", min=1, help="Longest wall-clock time for the rounds of one case.")
    ] = 300.0,
) -> None:
    """Measure what MixLoRA costs beside PEFT's LoRA.

    Time, FLOPs and peak memory, on linears of LLaVA-1.5-7B's sizes with random weights.

    Passes if forward + backward takes at most 5 % longer at 128 and 704 positions, a decode step of seven linears at
    most 10 %, peak memory at 704 positions is at most that of PEFT's LoRA, and the FLOPs equal the formula.
    """
    from .mixlora import run

    raise typer.Exit(run(quick, json_file, threads, dtype, longest))


@app.command()
def serving(
    quick: Quick = False,
    json_file: JsonFile = None,
    threads: Threads = 1,
    dtype: Dtype = "float32",
    clients: Annotated[
        bool, typer.Option("--clients", help="Measure a worker's answers to several clients at once instead.")
    ] = False,
    engine: Annotated[
        str | None, typer.Option(metavar="vllm", help="Measure adapters in this engine instead: vllm, in .venv-vllm.")
    ] = None,
) -> None:
    """Measure what many resident adapters cost.

    Memory, selection, prefill and decode steps with 1 to 1,000 adapters on one model.

    Passes if no decode step with MoReS is slower than the base by more than the control's spread, and if selecting an
    adapter of a pool takes less than a millisecond. With --quick, decoding fails only if its whole interval is above
    the spread.

    With --clients, two workers in float32 answer 1, 4 and 16 clients at once in turns, with batches and without.
    Passes if 16 clients get at least 3 times as many tokens a second, one client as many, and if 4 and 16 do not wait
    longer for their first token; a difference within the control's noise counts as none. This takes up to a quarter of
    an hour on two quiet cores.

    With --engine vllm, 1, 8 and 32 requests at once are answered in turns, in float32, by vLLM's base, 1 to 32 adapters
    of MoReS in vLLM, LoRAs of PEFT's in vLLM and our own worker. Passes if vLLM with MoReS makes at least 0.95 times as
    many tokens a second as its base; a difference within the control's noise counts as none. This takes up to a quarter
    of an hour on two quiet cores. It ends with status 2 where there is no .venv-vllm.
    """
    if engine is not None:
        if engine != "vllm":
            raise typer.BadParameter(f"{engine!r} is not measured; vllm is", param_hint="--engine")
        if clients:
            raise typer.BadParameter("--engine asks several at once by itself; leave one out", param_hint="--clients")
        if dtype != "float32":
            raise typer.BadParameter("with --engine, all is in float32", param_hint="--dtype")
        from .serving_engine import run as run_engines

        raise typer.Exit(run_engines(quick, json_file, threads))
    if clients:
        from .serving_requests import run as run_requests

        raise typer.Exit(run_requests(quick, json_file, threads))
    from .serving import run

    raise typer.Exit(run(quick, json_file, threads, dtype))


@app.command()
def diagnose(quick: Quick = False, json_file: JsonFile = None, threads: Threads = 1, dtype: Dtype = "float32") -> None:
    """Measure what `llava-steering diagnose modality` costs beside the same plain generation.

    Time and peak memory, of a random LLaVA that answers in batches, as the base and with MoReS.

    Passes if the measurement takes at most 2 times the time and 1.1 times the peak memory of the generation, and if
    ten times as many questions take at most 2 % more memory.
    """
    from .diagnose import run

    raise typer.Exit(run(quick, json_file, threads, dtype))


@app.command()
def memory(
    only: Annotated[str, typer.Option(help="Run only the settings whose description contains this text.")] = "",
    json_file: JsonFile = None,
) -> None:
    """Compare predicted and measured training memory.

    The prediction is that of `llava-steering plan`, the training that of upstream.

    Fails if a prediction is off by more than 20 %, or if a training fails.
    """
    from .memory import run

    raise typer.Exit(run(only, json_file))


@app.command()
def soak(
    url: Annotated[str, typer.Argument(help="Address of a worker on this machine.")],
    minutes: Annotated[float, typer.Option(min=0.1, help="Duration of the load. A fifth of it is the warm-up.")] = 5.0,
    clients: Annotated[int, typer.Option(min=1, help="Number of concurrent clients.")] = 12,
    tolerance: Annotated[float, typer.Option(help="Growth of memory that is allowed, in MB.")] = 25.0,
    json_file: JsonFile = None,
) -> None:
    """Put a running worker under load and look for leaks.

    Compares memory, open files and threads after a warm-up and at the end.

    With LLAVA_STEERING_ADMIN_TOKEN in the environment, an adapter is also reloaded every second.
    """
    from .soak import run

    raise typer.Exit(run(url, minutes, clients, tolerance, json_file))


@app.command()
def routing(
    adapter: Annotated[Path, typer.Argument(help="Folder of a MixLoRA adapter.")],
    data: Annotated[Path, typer.Option(help="Conversations in LLaVA's training format.")],
    pictures: Annotated[Path, typer.Option(help="Folder with the images of the conversations.")],
    template: Annotated[str, typer.Option(help="LLaVA's --version of the training.")] = "v1",
    count: Annotated[int, typer.Option(min=2, help="Number of conversations.")] = 300,
    seed: Annotated[int, typer.Option(help="Seed of the sample of conversations.")] = 0,
    json_file: JsonFile = None,
) -> None:
    """Compare MixLoRA's choices in training and in a chat, turn by turn."""
    from .routing import run

    run(adapter, data, pictures, template, count, seed, json_file)


@app.command()
def balance(
    seeds: Annotated[int, typer.Option(min=1, help="Number of seeds.")] = 5,
    quick: Quick = False,
    json_file: JsonFile = None,
) -> None:
    """Measure MixLoRA's load-balance loss on a problem made for routing, by the rows that it sees at once."""
    from .balance import run

    run(seeds, quick, json_file)


@app.command()
def launches(
    mode: Annotated[list[str] | None, typer.Option(help="A tuning mode; may be repeated. Default: both.")] = None,
    json_file: JsonFile = None,
) -> None:
    """Count the operations that an adapter adds to the frozen model: what a GPU launches.

    For each host, in every kind of pass, beside PEFT's LoRA. Exact, and the same on every machine.
    """
    from .launches import run

    raise typer.Exit(run(tuple(mode or ()), json_file))


@app.command()
def diagnostics(quick: Quick = False, json_file: JsonFile = None, threads: Threads = 1) -> None:
    """Measure what --steering_diagnostics_steps costs: a pass over 4 samples beside training steps.

    On a random LLaVA with narrow layers and 576 tokens an image.

    Passes if a pass every 100 steps takes at most 2 % of their time, whatever the batch.
    """
    from .diagnostics import run

    raise typer.Exit(run(quick, json_file, threads))


@app.command()
def startup(
    rounds: Annotated[int, typer.Option(min=1, help="Number of starts of every program.")] = 5,
    json_file: JsonFile = None,
) -> None:
    """Measure what starting a program costs, beside what importing upstream's training costs.

    Passes if `llava-steering plan` takes at most 1.2 times the processor time of these imports without torch's
    compiler, and if every --help takes at most a second at best.
    """
    from .startup import run

    raise typer.Exit(run(rounds, json_file))


@app.command()
def gpu(
    tiny: Annotated[bool, typer.Option("--tiny", help="Use a tiny model, which also runs without a GPU.")] = False,
    output: Annotated[Path, typer.Option(help="Folder for gpu_check.json.")] = Path("gpu-check"),
    tests: Annotated[bool, typer.Option(help="Also run the tests that need CUDA.")] = True,
) -> None:
    """Measure training and generation on a GPU.

    On a random LLaVA-1.5-7B: frozen, with the tuning modes and with LoRA, in bf16 and 4 bits.

    scripts/gpu_check.sh starts this command. It ends with status 2 if there is no GPU.
    """
    from .gpu import run

    raise typer.Exit(run(tiny, output, tests))
