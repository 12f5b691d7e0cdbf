"""`echelon qos`: look at a QoS configuration before it is used."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Tiers and quotas.", no_args_is_help=True)


@app.callback()
def root() -> None:
    """Tiers and quotas."""


@app.command()
def check(file: Annotated[Path, typer.Argument(help="The file, JSON or YAML, as --qos-config-path names it.")]) -> None:
    """Say in words what FILE means, with each user's share; or what is wrong with it, line by line."""
    from router.qos.file import load_qos_config

    for line in load_qos_config(file).explain():
        typer.echo(line)
