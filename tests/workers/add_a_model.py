"""The examples of docs/add-a-model.md, and a checkpoint of the family that it invents."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from foreign import _SIZES
from safetensors.torch import load_file, save_file
from transformers import Qwen2Config, Qwen2ForCausalLM

PAGE = Path(__file__).parents[2] / "docs" / "add-a-model.md"
_NAMES = {"mlp.gate_proj": "feed_forward.w1", "mlp.up_proj": "feed_forward.w3", "mlp.down_proj": "feed_forward.w2"}


def blocks() -> dict[str, str]:
    """Its Python examples by the file that each stands for."""
    return dict(re.findall(r"```python file=(\S+)\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL))


def muse_checkpoint(root: Path, architecture: str = "MuseForCausalLM") -> tuple[Path, Any]:
    """A folder of a Muse model, and transformers' Qwen2 with the same weights."""
    torch.manual_seed(5)
    model = Qwen2ForCausalLM(Qwen2Config(**_SIZES)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0.0, 0.3)
    model.generation_config.eos_token_id = None
    folder = root / architecture
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    for old, new in _NAMES.items():
        tensors = {name.replace(old, new): tensor for name, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config |= {"architectures": [architecture], "model_type": "muse", "norm_epsilon": config.pop("rms_norm_eps")}
    (folder / "config.json").write_text(json.dumps(config))
    return folder, model
