"""The table of what the seed documents show, block by block, and what stands for each here.

`blocks.tsv` has a line for each REST body, Python block, command line and configuration file: where it stands (document
and lines), the start of its SHA-256, a title of ours, and its outcome:

    check: NAME      a function of that name in `local_checks`, `server_checks` or `command_checks` does the same
    pytest: ID       a test of the suite does
    next: WHAT       it works when WHAT does
    none: REASON     it cannot apply here
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

FILE = Path(__file__).with_name("blocks.tsv")
DOCUMENTS = {
    "lmdeploy": "lmdeploy-docs-2024-05.txt",
    "model": "lmdeploy-support-new-model.md",
    "cacheflow": "cacheflow-adding-a-new-model.rst",
    "rfc": "vllm-rfc-9098-forward-context.txt",
}
KINDS = ("rest", "python", "command", "config", "install", "text")
OUTCOMES = ("check", "pytest", "next", "none")


@dataclass(frozen=True, slots=True)
class Block:
    """One block. Lines count from 1, both ends included; `sha` is of their text, joined by newlines."""

    document: str
    first: int
    last: int
    sha: str
    kind: str
    title: str
    outcome: str
    what: str

    @property
    def id(self) -> str:
        """Where it stands."""
        return f"{self.document}:{self.first}-{self.last}"


def load() -> list[Block]:
    """All of the table, in the order of the documents."""
    blocks = []
    for line in FILE.read_text("utf-8").splitlines():
        if not line.startswith("#"):
            document, first, last, sha, kind, title, outcome = line.split("\t")
            how, _, what = outcome.partition(": ")
            blocks.append(Block(document, int(first), int(last), sha, kind, title, how, what))
    return blocks


def moved(blocks: list[Block], folder: Path) -> list[str]:
    """Blocks whose text in the documents of `folder` is not what the table says."""
    lines = {name: (folder / file).read_text("utf-8").split("\n") for name, file in DOCUMENTS.items()}
    wrong = []
    for block in blocks:
        text = "\n".join(lines[block.document][block.first - 1 : block.last])
        if hashlib.sha256(text.encode()).hexdigest()[: len(block.sha)] != block.sha:
            wrong.append(block.id)
    return wrong
