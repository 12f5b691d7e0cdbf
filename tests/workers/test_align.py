"""`echelon align` and `echelon list`: nothing is found where nothing is wrong, planted defects are named, JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from align_defects import FAMILIES, KINDS, Bench, Draw, draws
from foreign import checkpoint
from typer.testing import CliRunner

from cluster.cli import app
from workers.models.ways import served

# One for each sort of evidence; all 50 are drawn by benchmarks/align_defects.py.
IN_CI = (
    Draw("llama", 1, "wrong rope base"),
    Draw("qwen2", 0, "dropped bias"),
    Draw("llama", 1, "swapped gate and up"),
    Draw("qwen3", 1, "missing all_reduce after attention"),
    Draw("llama-patched", 0, "wrong scale"),
    Draw("mixtral-by-transformers", 1, "permuted experts"),
)
CAUSES = {
    "wrong rope base": "rotation turns by other angles",
    "dropped bias": "bias is not the checkpoint's",
    "swapped gate and up": "it is that of model.layers.1.mlp.up_proj",
    "missing all_reduce after attention": "sum over the ranks",
    "wrong scale": "its scale is",
    "permuted experts": "another order",
}


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """Checkpoints are made once for the tests of this file."""
    return Bench(tmp_path_factory.mktemp("align"))


@pytest.mark.parametrize("draw", IN_CI, ids=lambda d: f"{d.family}-{d.kind}".replace(" ", "-"))
def test_a_planted_defect_is_named_with_its_cause(bench: Bench, draw: Draw) -> None:
    named, cause = bench.try_one(draw, draw.family, KINDS[draw.kind].ranks)
    assert named == draw.module
    assert CAUSES[draw.kind] in cause


@pytest.mark.parametrize("family", ["qwen3", "mixtral-by-transformers"])
def test_without_a_defect_nothing_is_named(bench: Bench, family: str) -> None:
    assert bench.try_one(None, family, 2) == (None, "")


def test_the_generator_has_twelve_kinds_and_is_seeded() -> None:
    first = draws(50, 0)
    assert len({draw.kind for draw in first}) >= 12
    assert {draw.family for draw in first} == set(FAMILIES)
    assert first == draws(50, 0) != draws(50, 1)


def test_the_command_prints_what_was_cut_and_patched_and_its_exit_code_tells() -> None:
    found = CliRunner().invoke(app, ["align", str(checkpoint("gptj")), "--tp", "2", "--json"])
    assert found.exit_code == 0, found.output
    report = json.loads(found.output)
    assert report["aligned"] is True
    assert report["way"] == "transformers' modules, patched"
    assert any("GPTJAttention" in line for line in report["patched"])
    assert report["plan"] == ["lm_head: colwise_gather_output [linear shapes]"]
    assert [(one["name"], one["ranks"]) for one in report["scenarios"]] == [
        (name, ranks) for ranks in (1, 2) for name in ("alone", "ragged batch", "paged", "chunked")
    ]
    assert all(one["compared"] > 20 for one in report["scenarios"])


def test_a_wrong_model_file_makes_the_command_fail_and_say_where(tmp_path: Path) -> None:
    file = tmp_path / "wrong.py"
    file.write_text(
        "from workers.models.llama import LlamaForCausalLM\n"
        "from workers.models.registry import register\n"
        "class Wrong(LlamaForCausalLM):\n"
        "    def finish_loading(self):\n"
        "        self.model.layers[1].mlp.down_proj.weight.mul_(1.1)\n"
        "register('LlamaForCausalLM', Wrong)\n"
    )
    from workers.models.registry import _models

    kept = _models["LlamaForCausalLM"]
    try:
        found = CliRunner().invoke(app, ["align", str(checkpoint("llama")), "--model-file", str(file)])
    finally:
        _models["LlamaForCausalLM"] = kept
    assert found.exit_code == 1, found.output
    assert "first module that differs: model.layers.1.mlp.down_proj (output)" in found.output
    assert "it is transformers' times 1.1" in found.output
    assert "transformers' [62, 32] mean" in found.output


def test_the_list_says_which_way() -> None:
    ways = {row.architecture: row.way for row in served()}
    assert ways["LlamaForCausalLM"] == "native"
    assert ways["GPTJForCausalLM"] == "patched"
    assert ways["OPTForCausalLM"] == "transformers"
    assert "BloomForCausalLM" not in ways or ways["BloomForCausalLM"] == "native"
    found = CliRunner().invoke(app, ["list", "--json"])
    rows = {row["architecture"]: row for row in json.loads(found.output)}
    assert set(rows) == set(ways)
    assert rows["OPTForCausalLM"]["tensor_parallel"] == "derived"
