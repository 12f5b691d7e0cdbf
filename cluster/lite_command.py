"""`echelon lite`: LMDeploy's quantization commands. None is done yet, and each says so."""

from __future__ import annotations

from typing import Annotated

import typer

from workers.api.errors import ConfigError

COMMANDS = {
    "auto_awq": "4-bit weights by AWQ",
    "calibrate": "statistics for quantization",
    "kv_qparams": "scales of a quantized KV cache",
    "smooth_quant": "8-bit weights and activations by SmoothQuant",
}
app = typer.Typer(help="Quantize a model: not done yet.", no_args_is_help=True)


def _add(name: str, what: str) -> None:
    @app.command(name=name, help=f"{what}: not done yet.", context_settings={"ignore_unknown_options": True})
    def refuse(
        arguments: Annotated[list[str] | None, typer.Argument(help="As documented.")] = None,
    ) -> None:
        raise ConfigError(f"echelon lite {name}: {what} are not done yet; checkpoints are served in bf16, fp16 or fp32")


for _name, _what in COMMANDS.items():
    _add(_name, _what)
