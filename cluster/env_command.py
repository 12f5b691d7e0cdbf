"""`echelon check_env`: what this machine and its Python have, for a report of a problem."""

from __future__ import annotations

import importlib.metadata
import platform

import typer

from cluster import __version__
from cluster.doctor import examine
from cluster.environment import cpu_count, prepare_torch

PACKAGES = (
    "ray", "torch", "triton", "transformers", "tokenizers", "safetensors", "fastapi", "uvicorn", "pydantic", "openai",
)  # fmt: skip


def check_env() -> None:
    """Print versions, processors and GPUs, and what `echelon doctor` finds."""
    prepare_torch()
    import torch

    typer.echo(f"echelon: {__version__}")
    typer.echo(f"Python: {platform.python_version()} ({platform.python_implementation()})")
    typer.echo(f"system: {platform.platform()}, {cpu_count()} processors")
    typer.echo(f"CUDA: {torch.version.cuda or 'none'}, available: {torch.cuda.is_available()}")
    for number in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(number)
        typer.echo(f"GPU {number}: {properties.name}, {properties.total_memory / 2**30:.1f} GiB")
    for package in PACKAGES:
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            version = "not installed"
        typer.echo(f"{package}: {version}")
    for finding in examine():
        if not finding.ok:
            typer.echo(f"BAD: {finding.text}")
