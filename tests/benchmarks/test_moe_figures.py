"""The benchmark of mixtures on tiny models of both families: figures, experts that are read, bytes of a step."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from moe import OURS, config_of, ours, parsed


@pytest.mark.parametrize(("shape", "experts", "chosen"), [("mixtral-8x7b", 8, 2), ("deepseek-moe-16b", 64, 6)])
def test_figures_of_a_tiny_mixture(tmp_path: Path, shape: str, experts: int, chosen: int) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config_of(shape, OURS, small=True)))
    args = parsed(["--small", "--batch", "1", "3", "--out", "3", "--repeat", "1"])
    *_, found = ours(tmp_path, args)
    one, three = found["batches"][1], found["batches"][3]
    assert one["active_experts"] == chosen
    assert chosen < three["active_experts"] <= min(experts, 3 * chosen)
    assert three["figures"]["output_tok_per_s"]["median"] > 0
    assert three["figures"]["failed"]["max"] == 0
    # fp32, gate, up and down of the chosen experts in each layer that has them, and nothing of the others.
    inner, layers = (96, 2) if shape.startswith("mixtral") else (24, 1)
    assert one["bytes_a_step"]["weights_of_chosen_experts"] == chosen * 3 * inner * 64 * 4 * layers
    assert three["bytes_a_step"]["weights_of_all"] == one["bytes_a_step"]["weights_of_all"]
