"""The table of docs/compat.md, made from `blocks.tsv`."""

from __future__ import annotations

from pathlib import Path

from contract.table import DOCUMENTS, Block

PAGE = Path(__file__).resolve().parents[2] / "docs" / "compat.md"
BEGIN, END = "<!-- table: make contract ARGS=--write -->", "<!-- end of table -->"


def page(blocks: list[Block], text: str) -> str:
    """`text` with its table as `blocks` say."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    lines = [BEGIN, "", "| where | what | here |", "|---|---|---|"]
    for block in blocks:
        here = {"check": "`{}`", "pytest": "`{}`", "next": "next: {}", "none": "{}"}[block.outcome]
        what = block.what.rpartition("::")[2] if block.outcome == "pytest" else block.what
        lines.append(f"| {block.id} | {block.kind}: {block.title} | {here.format(what)} |")
    counts = {outcome: sum(b.outcome == outcome for b in blocks) for outcome in ("check", "pytest", "next", "none")}
    lines += [
        "",
        f"{len(blocks)} blocks of {len(DOCUMENTS)} documents: {counts['check'] + counts['pytest']} executed, "
        f"{counts['next']} next, {counts['none']} that cannot apply.",
        "",
        END,
    ]
    return before + "\n".join(lines) + after
