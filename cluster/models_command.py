"""`echelon align` and `echelon list`: what runs a model, and whether it computes what transformers does."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict

import typer

from cluster.config import checked_config, resolve_model
from cluster.environment import prepare_torch


def run_align(model: str, *, tp: int, implementation: str, files: Sequence[str], as_json: bool) -> bool:
    """Print what `workers.align.align` finds; whether nothing differs. Raises what it raises."""
    prepare_torch()
    from workers.align.align import align  # torch

    section = {"path": str(resolve_model(model)), "name": model, "implementation": implementation, "model_files": files}
    config = checked_config({"model": section}, "the command line")
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
