"""`echelon align` and `echelon list`: what runs a model, and whether it computes what transformers does."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import typer

from cluster.config import checked_config, resolve_model
from cluster.environment import prepare_torch
from router.text.chat_classes import MODELS


def run_align(model: str, settings: Mapping[str, Any], *, tp: int, as_json: bool) -> bool:
    """Print what `workers.align.align` finds; whether nothing differs. `settings`: more of the model section.

    Raises what it raises.
    """
    prepare_torch()
    from workers.align.align import align  # torch

    path = resolve_model(model, code=bool(settings.get("trust_remote_code")))
    config = checked_config({"model": {**settings, "path": str(path), "name": model}}, "the command line")
    report = align(config.replica_config("auto"), ranks=tp)
    typer.echo(json.dumps(report.to_json()) if as_json else "\n".join(report.lines()))
    return report.difference is None


def run_list(files: Sequence[str], *, as_json: bool) -> None:
    """Print which way each architecture is served."""
    prepare_torch()
    from workers.models.registry import import_model_file  # torch
    from workers.models.ways import served

    for file in files:
        import_model_file(file)
    rows = served()
    if as_json:
        typer.echo(json.dumps([asdict(row) for row in rows]))
        return
    width = max(len(row.architecture) for row in rows)
    for row in rows:
        typer.echo(f"{row.architecture:<{width}}  {row.way:<12}  tp {row.tensor_parallel}  ({row.source})")
    typer.echo("Quantization, LoRA and images: for none of them yet.")
    typer.echo(f"Chat templates (--chat-template NAME): {', '.join(MODELS.names)}")
