"""What the scripts share: the server's address, the questions, and how they say what was tried."""

from __future__ import annotations

import importlib.metadata
import json
import sys

MODEL = "demo"
URL = sys.argv[1].rstrip("/") if len(sys.argv) > 1 else ""  # http://127.0.0.1:23333
QUESTION = "What is 3 + 4?"
MESSAGES = [{"role": "user", "content": QUESTION}]
SUM = {  # what a function takes
    "type": "object",
    "properties": {"sum": {"type": "integer", "minimum": 0, "maximum": 99}, "sure": {"type": "boolean"}},
    "required": ["sum", "sure"],
    "additionalProperties": False,
}


def tried(client: str, package: str, *what: str) -> None:
    """The line that the runner reads; a script that ends without it has failed."""
    version = importlib.metadata.version(package)
    print("TRIED " + json.dumps({"client": client, "version": version, "what": ", ".join(what)}))
