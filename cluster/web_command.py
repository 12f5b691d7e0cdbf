"""`echelon serve gradio`: the name is LMDeploy's, the pages are ours."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from workers.api.errors import ConfigError

PORT = 6006


def gradio(
    target: Annotated[str, typer.Argument(help="URL of an API server that runs, or a model as for `echelon serve`.")],
    server_name: Annotated[str, typer.Option(help="Where the pages listen.")] = "127.0.0.1",
    server_port: Annotated[int, typer.Option(help="Port of the pages.")] = PORT,
    no_auth: Annotated[
        bool, typer.Option("--no-auth", help="Listen beyond loopback before a server without API keys.")
    ] = False,
    replicas: Annotated[int | None, typer.Option(help="With a model: replicas of it; default 1.")] = None,
    tp: Annotated[int | None, typer.Option("--tp", help="With a model: GPUs of each replica; default 1.")] = None,
    model_name: Annotated[str | None, typer.Option(help="With a model: its name; default: the folder's.")] = None,
    port: Annotated[int | None, typer.Option(help="With a model: port of its API; default 23333.")] = None,
    api_keys: Annotated[Path | None, typer.Option(help="With a model: key file (echelon keys add).")] = None,
    qos_config_path: Annotated[Path | None, typer.Option(help="With a model: QoS file (echelon qos check).")] = None,
    address: Annotated[str | None, typer.Option(help="With a model: Ray cluster to join, e.g. auto.")] = None,
) -> None:
    """Show the web pages: a chat at /chat, an operator's page at /operator. Until Ctrl-C."""
    from cluster.web_pages import show_before_server, show_with_cluster

    given: dict[str, Any] = {"replicas": replicas, "tensor_parallel": tp, "name": model_name, "port": port}
    given |= {k: str(v.absolute()) for k, v in {"api_keys": api_keys, "qos": qos_config_path}.items() if v is not None}
    flags = {k: v for k, v in given.items() if v is not None}
    if not target.startswith(("http://", "https://")):
        show_with_cluster(target, flags, address=address, name=server_name, port=server_port, no_auth=no_auth)
        return
    if flags or address is not None:
        raise ConfigError("what is said of a model has no meaning with the URL of a server that runs already")
    show_before_server(target, name=server_name, port=server_port, no_auth=no_auth, say=typer.echo)
