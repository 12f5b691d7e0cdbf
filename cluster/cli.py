"""The command `echelon`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from cluster import __version__
from cluster.api_server_command import SpacedLists, api_client, api_server, proxy
from cluster.chat_command import chat
from cluster.convert_command import convert
from cluster.env_command import check_env
from cluster.keys_command import app as keys_app
from cluster.lite_command import app as lite_app
from cluster.qos_command import app as qos_app
from cluster.serve_command import app as serve_app
from cluster.web_command import gradio
from workers.api.errors import ConfigError, EchelonError

LOCAL_URL = "http://127.0.0.1:23333/v1"

app = typer.Typer(
    help="Echelon serves large language models on a Ray cluster.",
    no_args_is_help=True,
    context_settings={
        "help_option_names": ["-h", "--help"],
        "token_normalize_func": lambda word: word.replace("_", "-"),  # LMDeploy's documents have both spellings
    },
    pretty_exceptions_show_locals=False,
)
app.add_typer(serve_app, name="serve")
serve_app.command()(gradio)
serve_app.command(name="api_server", cls=SpacedLists)(api_server)
serve_app.command(name="api_client")(api_client)
serve_app.command(name="proxy", cls=SpacedLists)(proxy)
app.command()(chat)
app.command()(convert)
app.command(name="check_env")(check_env)
app.add_typer(lite_app, name="lite")
app.add_typer(keys_app, name="keys")
app.add_typer(qos_app, name="qos")
errors = Console(stderr=True, highlight=False)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"echelon {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None:
    """Echelon serves large language models on a Ray cluster."""


@app.command()
def stop(
    port: Annotated[int, typer.Option(help="HTTP port of the one to stop.")] = 23333,
    address: Annotated[
        str | None, typer.Option(help="Stop the one in this Ray cluster, though its `serve` process was killed.")
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="Stop all of this user on this machine.")] = False,
) -> None:
    """Stop an `echelon serve` of this user on this machine, or the one in a Ray cluster."""
    from cluster.serving import stop_all, stop_cluster, stop_running

    if every:
        typer.echo(stop_all())
    else:
        typer.echo(stop_running(port) if address is None else stop_cluster(address))


@app.command()
def node(file: Annotated[Path, typer.Argument(help="The cluster file, as it lies on this host.")]) -> None:
    """Make this host ready for `ray start`: prints what the shell that starts Ray has to export."""
    from cluster.node_command import node_exports

    typer.echo(node_exports(file), nl=False)


@app.command()
def down(file: Annotated[Path, typer.Argument(help="The file that `ray up` was given.")]) -> None:
    """Stop a cluster that `ray up` started: Echelon, then Ray on its head and on every worker."""
    from cluster.down import take_down

    take_down(file, typer.echo)


@app.command()
def upgrade(
    model: Annotated[str, typer.Argument(help="The cluster file, as changed, or a model as for serve.")],
    name: Annotated[str | None, typer.Option(help="Model name, if serve was given one.")] = None,
    replicas: Annotated[int | None, typer.Option(help="Replicas of the model.")] = None,
    port: Annotated[int | None, typer.Option(help="HTTP port of the one to upgrade; default: the file's.")] = None,
    address: Annotated[str | None, typer.Option(help="The one in this Ray cluster, e.g. auto.")] = None,
    restart: Annotated[bool, typer.Option("--restart", help="Replace replicas that have not changed, too.")] = False,
) -> None:
    """Bring a running cluster to the file's model and engine sections, replica by replica."""
    from cluster.serving import upgrade_running

    given = {"name": name, "replicas": replicas, "port": port}
    given = {k: v for k, v in given.items() if v is not None}
    typer.echo(upgrade_running(model, given, address=address, restart=restart))


@app.command()
def drain(
    target: Annotated[str, typer.Argument(help="A replica's id, or a node's id, address or host name.")],
    port: Annotated[int, typer.Option(help="HTTP port of the server on this machine.")] = 23333,
    address: Annotated[str | None, typer.Option(help="The one in this Ray cluster, e.g. auto.")] = None,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds to wait for it.")] = 600.0,
) -> None:
    """Take a replica, or a node's, out of service without a client noticing; another one takes its place."""
    from cluster.serving import drain_running

    typer.echo(drain_running(target, port=port, address=address, timeout=timeout))


@app.command()
def batch(
    source: Annotated[Path, typer.Argument(help="Requests, one JSON object a line: OpenAI's batch lines or bodies.")],
    target: Annotated[Path, typer.Argument(help="Answers in OpenAI's batch format; lines in it are not run again.")],
    url: Annotated[str | None, typer.Option(help=f"The running server; default {LOCAL_URL}.")] = None,
    address: Annotated[str | None, typer.Option(help="Go by Ray handles: its cluster, e.g. auto.")] = None,
    model: Annotated[str | None, typer.Option(help="For lines that name none; default: the server's first.")] = None,
    concurrency: Annotated[int, typer.Option(min=1, max=1024, help="Requests in flight.")] = 64,
    patience: Annotated[float, typer.Option(min=0, help="Seconds to try a line while the server refuses.")] = 600.0,
    timeout: Annotated[float, typer.Option(min=0.001, help="Seconds that one answer may take.")] = 600.0,
) -> None:
    """Run a file of requests; after an interruption the same command goes on where it stopped."""
    from cluster.batch.command import BatchOptions, run_batch

    if url is not None and address is not None:
        raise ConfigError("--url and --address exclude each other")
    options = BatchOptions(source, target, url or LOCAL_URL, address, model, concurrency, patience, timeout)
    raise typer.Exit(run_batch(options))


@app.command()
def align(
    model: Annotated[str, typer.Argument(help="demo, a local folder, or a hub id.")],
    tp: Annotated[int, typer.Option("--tp", min=1, help="Also cut over so many ranks, as threads here.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
    implementation: Annotated[str, typer.Option(help="auto, native, or transformers.")] = "auto",
    model_file: Annotated[list[Path] | None, typer.Option(help="As for serve.")] = None,
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help="As for serve.")] = False,
) -> None:
    """Run a model beside transformers, layer by layer, and name the first module that differs; then exit code 1."""
    from cluster.models_command import run_align

    files = [str(file.absolute()) for file in model_file or ()]
    section = {"implementation": implementation, "model_files": files, "trust_remote_code": trust_remote_code}
    raise typer.Exit(0 if run_align(model, section, tp=tp, as_json=as_json) else 1)


@app.command(name="list")
def list_models(
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
    model_file: Annotated[list[Path] | None, typer.Option(help="As for serve.")] = None,
) -> None:
    """Say which way each architecture is served, and what of it works."""
    from cluster.models_command import run_list

    run_list([str(file.absolute()) for file in model_file or ()], as_json=as_json)


@app.command()
def status(
    address: Annotated[str, typer.Option(help="The Ray cluster; default: the one of this host.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Show nodes, replicas, where their ranks are and how they do, and what waits."""
    from cluster.environment import prepare_ray

    prepare_ray()
    from cluster.status_command import look_at

    view = look_at(address)
    typer.echo(view.as_json() if as_json else view.as_text())


@app.command()
def doctor(
    address: Annotated[str | None, typer.Option(help="Look at all hosts of this Ray cluster, e.g. auto.")] = None,
) -> None:
    """Look at this machine, or at the hosts of a Ray cluster, and say what Echelon would trip over."""
    from cluster.doctor import examine

    findings = examine()
    if address is not None:
        from cluster.environment import prepare_ray

        prepare_ray()
        from cluster.cluster_doctor import examine_cluster

        findings += examine_cluster(address)
    for finding in findings:
        errors.print(f"[{'green' if finding.ok else 'red'}]{'ok ' if finding.ok else 'BAD'}[/] {escape(finding.text)}")
    raise typer.Exit(0 if all(f.ok for f in findings) else 1)


def main() -> None:
    """Entry point: our own errors are one readable line, anything else a traceback."""
    if not {"-h", "--help"}.isdisjoint(sys.argv):
        from cluster.help_table import show_whole_flags

        show_whole_flags()
    try:
        app()
    except EchelonError as e:
        errors.print(f"[bold red]error:[/] {escape(str(e))}", soft_wrap=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
