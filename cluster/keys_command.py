"""`echelon keys`: make, list and revoke API keys."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="API keys: make, list and revoke them.", no_args_is_help=True)

File = Annotated[Path, typer.Argument(help="The key file, as http.api_keys or --api-keys names it.")]


@app.command()
def add(
    file: File,
    owner: Annotated[str, typer.Option(help="Whom the key's requests count for.")],
    tier: Annotated[str, typer.Option(help="The owner's tier.")] = "",
    models: Annotated[str | None, typer.Option(help="Models it may use, with commas between; default: all.")] = None,
    admin: Annotated[
        bool, typer.Option("--admin", help="It opens /metrics, and what is said of others' requests.")
    ] = False,
) -> None:
    """Make a key and print it, this once; the file gets its SHA-256."""
    from router.keys.edit import add_key
    from router.keys.ring import make_key

    key = make_key()
    names = None if models is None else [name.strip() for name in models.split(",")]
    entry = add_key(file, key, owner, tier=tier, models=names, admin=admin)
    typer.echo(key)  # alone on stdout, so that a script may take it
    typer.echo(f"key {entry.id} of {owner} is in {file}; it is shown only now", err=True)


@app.command("list")
def list_keys(file: File) -> None:
    """Show the ids of all keys and what they stand for."""
    from router.keys.file import parse_keys, read_key_file

    for entry in parse_keys(read_key_file(file), str(file)).entries:
        models = "all models" if entry.models is None else ",".join(sorted(entry.models)) or "no models"
        state = "revoked" if entry.revoked else "good"
        rights = f"{models}  admin" if entry.admin else models
        typer.echo(f"{entry.id}  {state:7}  {entry.owner}  {entry.tier or '-'}  {rights}")


@app.command()
def revoke(
    file: File, key: Annotated[str, typer.Argument(help="Its id, as `list` shows it, or the key itself.")]
) -> None:
    """Let a key be good no more: running servers refuse it within two seconds, streams under way end normally."""
    from router.keys.edit import revoke_key

    entry = revoke_key(file, key)
    typer.echo(f"key {entry.id} of {entry.owner} is revoked")
