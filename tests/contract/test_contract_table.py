"""The contract's table agrees with itself, with its checks and with docs/compat.md. `make contract` runs them."""

from __future__ import annotations

import ast
import re
from itertools import pairwise
from pathlib import Path

from contract.page import PAGE, page
from contract.table import DOCUMENTS, KINDS, OUTCOMES, load

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def defined() -> set[str]:
    """Names of all checks; read, not imported, since they bring torch and Ray."""
    found: set[str] = set()
    for name in ("local_checks", "command_checks", "server_checks"):
        tree = ast.parse((HERE / f"{name}.py").read_text("utf-8"))
        for node in tree.body:
            if isinstance(node, ast.FunctionDef) and [a.arg for a in node.args.args] == ["site"]:
                found |= set() if node.name.startswith("_") else {node.name}
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                found |= {node.targets[0].id} if isinstance(node.value, ast.Name) else set()
    return found


def test_lines_are_in_order_and_whole() -> None:
    blocks = load()
    assert len(blocks) > 150
    assert len({b.id for b in blocks}) == len(blocks)
    for block in blocks:
        assert block.document in DOCUMENTS, block
        assert 0 < block.first <= block.last, block
        assert re.fullmatch("[0-9a-f]{12}", block.sha), block
        assert block.kind in KINDS, block
        assert block.outcome in OUTCOMES, block
        assert block.title, block
        assert block.what, block
    for document in DOCUMENTS:
        own = [b for b in blocks if b.document == document]
        assert own
        assert all(a.last < b.first for a, b in pairwise(own)), document


def test_every_outcome_is_there() -> None:
    blocks = load()
    named = {b.what for b in blocks if b.outcome == "check"}
    assert named == defined()
    for block in blocks:
        if block.outcome == "pytest":
            file, _, test = block.what.partition("::")
            assert f"def {test}(" in (ROOT / file).read_text("utf-8"), block
        if block.outcome == "next":
            assert block.what in ("images", "quantization", "LoRA adapters"), block


def test_the_page_is_the_table() -> None:
    text = PAGE.read_text("utf-8")
    assert page(load(), text) == text, "make contract ARGS=--write"
