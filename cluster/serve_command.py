"""`echelon serve`: a model or a cluster file by its name alone, or a command of LMDeploy's (`api_server`, ...)."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

MODEL = "model"  # the command that is meant where none is named


class ModelFirst(TyperGroup):
    """Commands of which one need not be named: what is none of them, and no request for help, are its arguments."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put the command in front where there is none."""
        named = args and (args[0] in ("-h", "--help") or args[0].replace("-", "_") in self.commands)
        named = named or (not args and ctx.resilient_parsing)  # a shell asks what could stand here
        rest: list[str] = super().parse_args(ctx, args if named else [MODEL, *args])
        return rest

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """The commands, then the options of the one that need not be named."""
        super().format_help(ctx, formatter)
        command = self.commands[MODEL]
        command.format_help(type(ctx)(command, info_name=MODEL, parent=ctx), formatter)


app = typer.Typer(
    cls=ModelFirst,
    help="Serve a model over HTTP. `echelon serve demo` is short for `echelon serve model demo`.",
)


@app.command(name=MODEL)
def serve_model(
    model: Annotated[str, typer.Argument(help="demo, a local folder, a hub id, or a cluster file (.yaml).")] = "demo",
    host: Annotated[str | None, typer.Option(help="Where HTTP listens; default 127.0.0.1.")] = None,
    port: Annotated[int | None, typer.Option(help="HTTP port; default 23333.")] = None,
    replicas: Annotated[int | None, typer.Option(help="Replicas of the model; default 1.")] = None,
    no_auth: Annotated[
        bool | None, typer.Option("--no-auth", help="Listen beyond loopback without API keys: anybody may come.")
    ] = None,
    api_keys: Annotated[
        Path | None, typer.Option(help="Key file (echelon keys add): who has a key may come, from anywhere.")
    ] = None,
    tls_cert: Annotated[Path | None, typer.Option(help="PEM file of a certificate and its chain: serve HTTPS.")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="PEM file of the certificate's key.")] = None,
    qos_config_path: Annotated[
        Path | None, typer.Option(help="QoS file, JSON or YAML: tiers, users, quotas (echelon qos check).")
    ] = None,
    tp: Annotated[int | None, typer.Option("--tp", help="GPUs of each replica (tensor parallel); default 1.")] = None,
    name: Annotated[str | None, typer.Option(help="Model name for clients; default: the folder's.")] = None,
    address: Annotated[str | None, typer.Option(help="Ray cluster to join, e.g. auto; default: an own one.")] = None,
    nodes: Annotated[int | None, typer.Option(min=1, help="Wait for so many nodes of the Ray cluster.")] = None,
    detach: Annotated[bool, typer.Option("--detach", help="Return once it answers; it goes on by itself.")] = False,
    model_file: Annotated[
        list[Path] | None, typer.Option(help="Python file that registers a model or rewrites; may be repeated.")
    ] = None,
    implementation: Annotated[
        str | None, typer.Option(help="native, transformers (its modules, patched), or auto: native if there is one.")
    ] = None,
    trust_remote_code: Annotated[
        bool | None, typer.Option("--trust-remote-code", help="Run modelling code that lies in the checkpoint.")
    ] = None,
    session_len: Annotated[
        int | None,
        typer.Option(min=2, help="Longest context (prompt and answer) in tokens; default: the checkpoint's."),
    ] = None,
    rope_scaling_factor: Annotated[
        float | None,
        typer.Option(help="Dynamic NTK: rotations for contexts of up to so many times the trained one."),
    ] = None,
    chat_template: Annotated[
        str | None, typer.Option(help="A built-in name (echelon list), or a file: .json, .jinja or .py.")
    ] = None,
    cap: Annotated[str | None, typer.Option(help="What chats ask for: completion, infilling, chat or python.")] = None,
    tool_call_parser: Annotated[
        str | None, typer.Option(help="How answers show tool calls; default: by the template.")
    ] = None,
    reasoning_parser: Annotated[
        str | None, typer.Option(help="How answers show thoughts; default: by the template.")
    ] = None,
    batch_invariant: Annotated[
        bool | None,
        typer.Option("--batch-invariant", help="GPU: a text does not depend on what runs beside it, nor on a replay."),
    ] = None,
    eviction_type: Annotated[
        str | None,
        typer.Option(help="What becomes of KV blocks that others need: recompute, or copy (to host memory and back)."),
    ] = None,
) -> None:
    """Serve a model over HTTP until Ctrl-C or `echelon stop`."""
    from cluster.serving import cluster_config, note_path, run_until_stopped

    given: dict[str, Any] = {"host": host, "port": port, "replicas": replicas, "tensor_parallel": tp, "name": name}
    given |= {"no_auth": no_auth, "nodes": nodes, "implementation": implementation}
    given |= {"trust_remote_code": trust_remote_code, "max_model_len": session_len}
    given |= {"rope_scaling_factor": rope_scaling_factor}
    given |= {"batch_invariant": batch_invariant, "eviction_type": eviction_type}
    given |= {"chat_template": chat_template, "capability": cap}
    given |= {"tool_call_parser": tool_call_parser, "reasoning_parser": reasoning_parser}
    if model_file:
        given["model_files"] = tuple(str(file.absolute()) for file in model_file)
    files = {"api_keys": api_keys, "tls_cert": tls_cert, "tls_key": tls_key, "qos": qos_config_path}
    given |= {k: str(v.absolute()) for k, v in files.items() if v is not None}
    flags = {k: v for k, v in given.items() if v is not None}
    if detach:
        from cluster.detached import serve_detached

        said = [one for one in sys.argv[2:] if one != "--detach"]
        serve_detached(said, note_path(cluster_config(model, flags).http.port), typer.echo)
    else:
        run_until_stopped(model, flags, address=address)
