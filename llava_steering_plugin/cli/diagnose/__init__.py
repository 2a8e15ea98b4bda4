"""The sub-command `diagnose`: measures what a tuned model does, and draws it. A file for each measure."""

from __future__ import annotations

import typer

from llava_steering_plugin.cli.diagnose.image import image
from llava_steering_plugin.cli.diagnose.interference import interference
from llava_steering_plugin.cli.diagnose.modality import modality
from llava_steering_plugin.cli.diagnose.routing import routing
from llava_steering_plugin.cli.diagnose.steering import steering

app = typer.Typer(no_args_is_help=True, help="Measure attention, interference, steering or routing.")


@app.callback()
def _group() -> None:
    """Measure attention, interference, steering or routing."""


app.command(short_help="Measure each layer's attention to image and text.")(modality)
app.command(short_help="Show where on one image a model looks.")(image)
app.command(short_help="Measure how much tasks help or harm each other.")(interference)
app.command(short_help="Measure how MoReS steers, and which layers matter.")(steering)
app.command(short_help="Measure what MixLoRA chooses, and if it matters.")(routing)
