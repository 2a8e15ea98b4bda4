"""The sub-commands `patch`, `unpatch` and `doctor`: they look after the LLaVA checkout on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from llava_steering_plugin.checkout.find import Llava

LlavaOption = Annotated[
    Path | None,
    typer.Option(
        "--llava", metavar="PATH", help="A LLaVA checkout or its llava folder; default: the one that Python imports."
    ),
]


def patch(llava: LlavaOption = None) -> None:
    """Add the plugin block to llava/__init__.py."""
    from llava_steering_plugin.checkout.find import find_llava
    from llava_steering_plugin.checkout.patch import patch as write_block

    used = find_llava(llava)
    if write_block(used):
        typer.echo(f"patched {used.init}; undo with `llava-steering unpatch`")
    else:
        typer.echo(f"{used.init} is already patched; nothing to do")
    _mention_others(used)


def unpatch(llava: LlavaOption = None) -> None:
    """Remove the plugin block; every other byte stays."""
    from llava_steering_plugin.checkout.find import find_llava
    from llava_steering_plugin.checkout.patch import unpatch as remove_block

    used = find_llava(llava)
    if remove_block(used):
        typer.echo(f"removed the block from {used.init}")
    else:
        typer.echo(f"{used.init} is not patched; nothing to do")
    _mention_others(used)


def doctor(
    llava: LlavaOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Show which LLaVA this is, what the plugin finds in it, and what to do next. Status 1 if something is wrong."""
    from llava_steering_plugin.checkout.doctor import examine
    from llava_steering_plugin.cli.tables import console, doctor_table

    report = examine(llava)
    if as_json:
        typer.echo(json.dumps(report.as_dict(), indent=2))
    else:
        console(plain=True).print(doctor_table(report))
    if report.problems:
        raise typer.Exit(1)


def _mention_others(used: Llava) -> None:
    from llava_steering_plugin.checkout.find import other_llavas

    for other in other_llavas(used):
        typer.echo(f"note: there is another LLaVA, left as it is: {other.package} ({other.found_by})")
