"""`echelon chat`: with a running server, or with a model in this process."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from cluster.pipeline.notices import without_effect
from workers.api.errors import ConfigError

LOCAL_URL = "http://127.0.0.1:23333/v1"


def chat(
    model_path: Annotated[str | None, typer.Argument(help="A model in this process, no server.")] = None,
    url: Annotated[str | None, typer.Option(help="The running server; default: port 23333 here.")] = None,
    model: Annotated[str | None, typer.Option(help="Which of its models; default: the first.")] = None,
    local: Annotated[str | None, typer.Option(help="The same as the argument.")] = None,
    system: Annotated[str | None, typer.Option(help="What the model is told before the conversation.")] = None,
    meta_instruction: Annotated[str | None, typer.Option(help="The same as --system.")] = None,
    meta_instruct: Annotated[str | None, typer.Option(hidden=True)] = None,  # as Code Llama's document has it
    temperature: Annotated[float | None, typer.Option(min=0, max=2, help="0: always the likeliest word.")] = None,
    chat_template: Annotated[
        str | None, typer.Option(help="A built-in name (echelon list), or a file: .json, .jinja or .py.")
    ] = None,
    cap: Annotated[str | None, typer.Option(help="completion, infilling (of <FILL>), chat or python.")] = None,
    tp: Annotated[int, typer.Option("--tp", help="GPUs, by a Ray cluster of this process.")] = 1,
    session_len: Annotated[int | None, typer.Option(help="Longest context in tokens; default: the model's.")] = None,
    cache_max_entry_count: Annotated[
        float | None, typer.Option(help="Part of the free GPU memory for the KV cache; over 1: its blocks.")
    ] = None,
    model_name: Annotated[
        str | None, typer.Option(help="The name of a chat template, for a checkpoint that brings none.")
    ] = None,
    model_format: Annotated[str | None, typer.Option(help="hf.")] = None,
    quant_policy: Annotated[int, typer.Option(help="0.")] = 0,
    rope_scaling_factor: Annotated[float, typer.Option(help="Dynamic NTK; 0: off.")] = 0.0,
    backend: Annotated[str | None, typer.Option(help="turbomind or pytorch: there is one engine here.")] = None,
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help="As for serve.")] = False,
) -> None:
    """Talk to a model in the terminal."""
    from cluster.chat.command import chat_in_process, chat_with_server
    from cluster.pipeline.engine_config import TurbomindEngineConfig, refuse_quantization

    local = model_path or local
    said = system or meta_instruction or meta_instruct
    limits: dict[str, Any] = {"session_len": session_len, "cache_max_entry_count": cache_max_entry_count}
    limits = {name: value for name, value in limits.items() if value is not None}
    if rope_scaling_factor:
        limits["rope_scaling_factor"] = rope_scaling_factor
    refuse_quantization(model_format, quant_policy)
    if local is None:
        given = [chat_template, cap, model_name, *limits.values(), *([tp] if tp > 1 else [])]
        if any(value is not None for value in given):
            raise ConfigError("how a model is loaded is said with the model: echelon chat MODEL ...")
        chat_with_server(url or LOCAL_URL, model, system=said, temperature=temperature)
        return
    if url is not None or model is not None:
        raise ConfigError("--local takes neither --url nor --model")
    if backend is not None:
        without_effect("--backend", "there is one engine here")
    options: dict[str, Any] = {"chat_template": chat_template or _own_or(model_name, local), "capability": cap}
    options |= {"trust_remote_code": trust_remote_code} if trust_remote_code else {}
    if limits or tp > 1:
        options["backend_config"] = TurbomindEngineConfig(tp=tp, enable_prefix_caching=True, **limits)
    chat_in_process(local, system=said, temperature=temperature, **options)


def _own_or(name: str | None, model: str) -> str | None:
    """`name` for a checkpoint without a chat template, where there is one of that name; None: the checkpoint's."""
    from cluster.config import resolve_model
    from router.text.chat_classes import MODELS
    from router.text.checkpoint import has_template

    return name if name in MODELS.names and not has_template(resolve_model(model)) else None
