"""Options that several commands of `diagnose` share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Output = Annotated[Path, typer.Option(help="Folder for measurements, tables and pictures.")]
ModelBase = Annotated[str | None, typer.Option(help="Where the base of adapters and LoRAs is, if it has moved.")]
TaskData = Annotated[
    list[str],
    typer.Option(metavar="[TASK=]FILE", help='LLaVA\'s training JSON; its samples name a "task", or all are TASK.'),
]
Version = Annotated[
    str | None, typer.Option(help="Conversation template of the training; default: each adapter's own, else v1.")
]
