"""The sub-command `components`: lists vision towers, connectors and language models, with sizes and token counts."""

from __future__ import annotations

import json
import sys
from contextlib import redirect_stdout
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from llava_steering_plugin.components.base import ImageTokens

UPSTREAM = ("identity", "linear", "mlp2x_gelu")


def components(
    tower: Annotated[
        str | None,
        typer.Argument(help="A vision tower, as --vision_tower names it: its sizes, and its tokens by each connector."),
    ] = None,
    layer: Annotated[int, typer.Option("--mm-vision-select-layer", "--mm_vision_select_layer")] = -1,
    feature: Annotated[str, typer.Option("--mm-vision-select-feature", "--mm_vision_select_feature")] = "patch",
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """List the vision towers, connectors and language models that are installed, and what they need.

    Of a tower that is named, config.json alone is read.
    """
    # What towers import prints to standard output, where JSON is to go.
    with redirect_stdout(sys.stderr):
        from llava_steering_plugin.components.listing import installed

        found = installed()
        sizes = None if tower is None else _sizes(tower, layer, feature)
    if as_json:
        listed = [{**vars(each), "settings": dict(each.settings)} for each in found]
        typer.echo(json.dumps({"components": listed, "tower": sizes}, indent=2))
        return
    from llava_steering_plugin.cli.tables import console

    output = console()
    if sizes is None:
        output.print(_table(found))
        typer.echo(
            f"LLaVA's own: CLIP by its folder or its name on the hub; connectors {', '.join(UPSTREAM)} (mlp3x_gelu, "
            "...); Llama, Mistral and MPT."
        )
    else:
        output.print(_tower_table(sizes))


def _sizes(name: str, layer: int, feature: str) -> dict[str, Any]:
    """Return the sizes of a tower, and the tokens of an image by connector, as plain values.

    Raises:
        SteeringError: there is no such tower, or it does not have that layer or feature.
    """
    from llava_steering_plugin.adapters.fit.base_model import read_config
    from llava_steering_plugin.components.base import ImageTokens
    from llava_steering_plugin.components.image_tokens import clip_shape
    from llava_steering_plugin.components.listing import parameters, tokens_by_connector
    from llava_steering_plugin.components.named import named_tower, unknown_tower
    from llava_steering_plugin.errors import SteeringError

    component = named_tower(name, layer, feature)
    if component is not None:
        shape, count = component.shape(), parameters(component)
    else:
        try:
            described = read_config(name)
        except SteeringError as error:
            raise unknown_tower(name) from error
        if described["model_type"] not in ("clip", "clip_vision_model"):
            raise unknown_tower(name)
        shape, count = clip_shape(described, feature), None
    # The width of the language model changes no count.
    after = tokens_by_connector(shape, shape.tokens.width)
    own = dict.fromkeys(UPSTREAM, shape.tokens)
    return {
        "name": name,
        "image_size": shape.image_size,
        "layers": shape.layers,
        "parameters": count,
        **_tokens(shape.tokens),
        "width": shape.tokens.width,
        "by_connector": {
            each: _tokens(made) if isinstance(made, ImageTokens) else {"refused": made}
            for each, made in {**own, **after}.items()
        },
    }


def _tokens(tokens: ImageTokens) -> dict[str, Any]:
    return {"tokens": tokens.count, "side": tokens.side}


def _table(found: list[Any]) -> Table:
    from rich.markup import escape
    from rich.table import Table

    table = Table(title="Installed components", title_justify="left")
    for heading in ("kind", "name", "package", "what it is, or what it needs", "settings"):
        table.add_column(heading, overflow="fold")
    for each in found:
        settings = ", ".join(f"{name}={value}" for name, value in each.settings.items())
        table.add_row(*map(escape, (each.kind, each.name, each.package, each.missing or each.summary, settings)))
    return table


def _tower_table(sizes: dict[str, Any]) -> Table:
    from rich.markup import escape
    from rich.table import Table

    facts = [f"images of {sizes['image_size']} pixels", f"{sizes['tokens']} tokens of width {sizes['width']}"]
    if sizes["layers"] is not None:
        facts.append(f"{sizes['layers']} layers")
    if sizes["parameters"] is not None:
        facts.append(f"{sizes['parameters']:,} parameters")
    table = Table(title=escape(f"{sizes['name']}: {', '.join(facts)}"), title_justify="left")
    for heading in ("connector", "tokens", "places in the image"):
        table.add_column(heading, overflow="fold")
    for name, made in sizes["by_connector"].items():
        if "refused" in made:
            table.add_row(name, "-", escape(made["refused"]))
        else:
            places = f"{made['side']} x {made['side']}" if made["side"] else "none"
            table.add_row(name, str(made["tokens"]), places)
    return table
