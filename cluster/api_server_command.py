"""`echelon serve api_server`, `api_client` and `proxy`: LMDeploy's commands, with its flags."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from cluster.names import PORT
from cluster.pipeline.notices import without_effect
from workers.api.errors import ConfigError

if TYPE_CHECKING:  # the packages of a server, which other commands should not wait for
    from router.text.chat_classes import ChatTemplateConfig

LISTS = ("--api-keys", "--allow-origins", "--allow-methods", "--allow-headers", "--adapters", "--node")


class SpacedLists(TyperCommand):
    """Options of several values take them one after the other, too: `--api-keys a b` is `--api-keys a --api-keys b`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Say the option's name before each of its values."""
        spread: list[str] = []
        name = ""
        for word in args:
            if word.startswith("-"):
                name = word.replace("_", "-") if word.startswith("--") else word
                spread.append(word)
            elif name in LISTS and spread[-1].replace("_", "-") != name:
                spread += [name, word]
            else:
                spread.append(word)
        rest: list[str] = super().parse_args(ctx, spread)
        return rest


Model = Annotated[str, typer.Argument(help="demo, a local folder, or a hub id.")]
Host = Annotated[
    str | None, typer.Option(help="Where HTTP listens; default: loopback without API keys, else every address.")
]
Port = Annotated[int, typer.Option(help="HTTP port.")]
Keys = Annotated[list[str] | None, typer.Option(help="API keys, or one key file (echelon keys add).")]
Ssl = Annotated[bool, typer.Option("--ssl", help="HTTPS with the files of $SSL_CERTFILE and $SSL_KEYFILE.")]
Origins = Annotated[list[str] | None, typer.Option(help="Origins of web pages that may ask (CORS), or '*'.")]
Credentials = Annotated[bool, typer.Option("--allow-credentials", help="CORS: cookies may come along.")]
Methods = Annotated[list[str] | None, typer.Option(help="CORS: HTTP methods; default all.")]
Headers = Annotated[list[str] | None, typer.Option(help="CORS: headers; default all.")]
NoAuth = Annotated[bool, typer.Option("--no-auth", help="Listen beyond loopback without API keys: anybody may come.")]


def api_server(
    model: Model,
    server_name: Host = None,
    server_port: Port = PORT,
    tp: Annotated[int, typer.Option("--tp", help="GPUs of the replica (tensor parallel).")] = 1,
    session_len: Annotated[int | None, typer.Option(help="Longest context in tokens; default: the model's.")] = None,
    max_batch_size: Annotated[int, typer.Option(help="Sequences that run at once.")] = 128,
    cache_max_entry_count: Annotated[
        float, typer.Option(help="Part of the free GPU memory for the KV cache; over 1: its blocks.")
    ] = 0.8,
    cache_block_seq_len: Annotated[int, typer.Option(help="Tokens of a block of the KV cache.")] = 64,
    enable_prefix_caching: Annotated[bool, typer.Option("--enable-prefix-caching", hidden=True)] = True,
    no_prefix_caching: Annotated[
        bool, typer.Option("--no-prefix-caching", help="Do not share what prompts begin with.")
    ] = False,
    model_name: Annotated[str | None, typer.Option(help="Name for clients; default: the folder's.")] = None,
    model_format: Annotated[str | None, typer.Option(help="hf.")] = None,
    quant_policy: Annotated[int, typer.Option(help="0.")] = 0,
    rope_scaling_factor: Annotated[float, typer.Option(help="Dynamic NTK; 0: off.")] = 0.0,
    num_tokens_per_iter: Annotated[int, typer.Option(help="Query tokens of a step; 0: max-prefill-token-num.")] = 0,
    max_prefill_token_num: Annotated[int, typer.Option(help="Query tokens of a step.")] = 8192,
    chat_template: Annotated[
        str | None, typer.Option(help="A built-in name (echelon list), or a file: .json, .jinja or .py.")
    ] = None,
    cap: Annotated[str | None, typer.Option(help="completion, infilling, chat or python.")] = None,
    meta_instruction: Annotated[str | None, typer.Option(help="The system message, with --chat-template.")] = None,
    tool_call_parser: Annotated[str | None, typer.Option(help="As for serve.")] = None,
    reasoning_parser: Annotated[str | None, typer.Option(help="As for serve.")] = None,
    adapters: Annotated[list[str] | None, typer.Option(help="LoRA adapters: not yet.")] = None,
    qos_config_path: Annotated[Path | None, typer.Option(help="QoS file: tiers, users, quotas.")] = None,
    api_keys: Keys = None,
    ssl: Ssl = False,
    no_auth: NoAuth = False,
    allow_origins: Origins = None,
    allow_credentials: Credentials = False,
    allow_methods: Methods = None,
    allow_headers: Headers = None,
    backend: Annotated[str | None, typer.Option(help="turbomind or pytorch: there is one engine here.")] = None,
    log_level: Annotated[str, typer.Option(help="CRITICAL, ERROR, WARNING, INFO or DEBUG.")] = "ERROR",
    revision: Annotated[str | None, typer.Option(help="Of a hub id.")] = None,
    download_dir: Annotated[str | None, typer.Option(help="Where a hub's model is kept; default: its cache.")] = None,
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help="As for serve.")] = False,
) -> None:
    """Serve one model, with LMDeploy's flags, until Ctrl-C or `echelon stop`."""
    from cluster.pipeline.engine_config import TurbomindEngineConfig, refuse_quantization
    from cluster.pipeline.server_config import ServerOptions, server_config
    from cluster.serving import serve_until_stopped
    from router.text.template_choice import inlined

    refuse_quantization(model_format, quant_policy)
    if adapters:
        raise ConfigError("--adapters: LoRA adapters are not done yet")
    engine = TurbomindEngineConfig(
        tp=tp, session_len=session_len, max_batch_size=max_batch_size, cache_max_entry_count=cache_max_entry_count,
        cache_block_seq_len=cache_block_seq_len, enable_prefix_caching=enable_prefix_caching and not no_prefix_caching,
        rope_scaling_factor=rope_scaling_factor, num_tokens_per_iter=num_tokens_per_iter,
        max_prefill_token_num=max_prefill_token_num, revision=revision, download_dir=download_dir,
    )  # fmt: skip
    fields: dict[str, Any] = {"capability": cap, "trust_remote_code": trust_remote_code, "backend": backend}
    fields |= {"tool_call_parser": tool_call_parser, "reasoning_parser": reasoning_parser}
    options = ServerOptions(
        server_name=server_name,
        server_port=server_port,
        log_level=log_level,
        api_keys=api_keys or (),
        ssl=ssl,
        no_auth=no_auth,
        qos_config_path=None if qos_config_path is None else str(qos_config_path),
        cors=cors_fields(allow_origins, allow_credentials, allow_methods, allow_headers),
    )
    template = with_meta_instruction(chat_template, meta_instruction)
    pieces = None if isinstance(template, str) else template
    if isinstance(template, str):
        fields["chat_template"] = inlined(template)
    config = server_config(model, model_name, engine, pieces, options, fields)
    serve_until_stopped(config, address=None)


def api_client(
    url: Annotated[str, typer.Argument(help="Of the API server, e.g. http://127.0.0.1:23333.")],
    api_key: Annotated[str | None, typer.Option(help="Default: $ECHELON_API_KEY.")] = None,
    model: Annotated[str | None, typer.Option(help="Which of its models; default: the first.")] = None,
    system: Annotated[str | None, typer.Option(help="What the model is told before the conversation.")] = None,
    temperature: Annotated[float | None, typer.Option(min=0, max=2, help="0: always the likeliest word.")] = None,
) -> None:
    """Talk to a running API server in the terminal."""
    from cluster.chat.command import chat_with_server

    local = url.replace("//0.0.0.0", "//127.0.0.1")
    chat_with_server(local, model, system=system, temperature=temperature, key=api_key)


def proxy(
    server_name: Host = None,
    server_port: Annotated[int, typer.Option(help="HTTP port.")] = 8000,
    strategy: Annotated[
        str, typer.Option(help="min_expected_latency, min_observed_latency, random, round_robin, power_of_two.")
    ] = "min_expected_latency",
    node: Annotated[list[str] | None, typer.Option(help="URLs of API servers; others come by /nodes/add.")] = None,
    api_keys: Keys = None,
    ssl: Ssl = False,
    no_auth: NoAuth = False,
    allow_origins: Origins = None,
    allow_credentials: Credentials = False,
    allow_methods: Methods = None,
    allow_headers: Headers = None,
    log_level: Annotated[str, typer.Option(help="CRITICAL, ERROR, WARNING, INFO or DEBUG.")] = "ERROR",
) -> None:
    """Dispatch to API servers that run elsewhere, ours or others', until Ctrl-C. No Ray, no models of its own."""
    from cluster.pipeline.server_config import ServerOptions
    from cluster.proxy_server import run_proxy

    options = ServerOptions(
        server_name=server_name,
        server_port=server_port,
        log_level=log_level,
        api_keys=api_keys or (),
        ssl=ssl,
        no_auth=no_auth,
        cors=cors_fields(allow_origins, allow_credentials, allow_methods, allow_headers),
    )
    run_proxy(options, strategy.replace("-", "_"), node or (), typer.echo)


def cors_fields(
    origins: list[str] | None, credentials: bool, methods: list[str] | None, headers: list[str] | None
) -> dict[str, Any]:
    """Fields of `http` that are given."""
    given = {"allow_origins": origins, "allow_methods": methods, "allow_headers": headers}
    fields: dict[str, Any] = {name: values for name, values in given.items() if values}
    if credentials:
        fields["allow_credentials"] = True
    if fields and not origins:
        without_effect("--allow-credentials, --allow-methods or --allow-headers", "no page may ask (--allow-origins)")
    return fields


def with_meta_instruction(template: str | None, said: str | None) -> ChatTemplateConfig | str | None:
    """The template with `said` for its system message. Raises ConfigError where it is not one of pieces."""
    if said is None:
        return template
    if template is None or template.endswith((".jinja", ".py")):
        raise ConfigError("--meta-instruction needs a --chat-template of pieces: a built-in name, or a .json file")
    from router.text.chat_classes import ChatTemplateConfig

    config = ChatTemplateConfig.from_json(template) if template.endswith(".json") else ChatTemplateConfig(template)
    config.meta_instruction = said
    return config
