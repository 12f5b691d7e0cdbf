"""openapi-python-client: a package made from the server's own openapi.json, and calls through it."""

import importlib
import json
import subprocess
import sys
import tempfile
import urllib.request
from pathlib import Path

from said import MESSAGES, MODEL, URL, tried

with tempfile.TemporaryDirectory() as name:
    folder = Path(name)
    with urllib.request.urlopen(URL + "/openapi.json") as answer:
        document = json.load(answer)
    (folder / "openapi.json").write_text(json.dumps(document))
    (folder / "config.yml").write_text(
        "package_name_override: made_client\nproject_name_override: made\npost_hooks: []\n"
    )
    made = subprocess.run(
        [str(Path(sys.executable).with_name("openapi-python-client")), "generate", "--path", "openapi.json",
         "--config", "config.yml", "--output-path", "made", "--meta", "none"],
        cwd=folder, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "WARNING" not in (said := made.stdout + made.stderr), said
    (folder / "made").rename(folder / "made_client")
    sys.path.insert(0, name)
    made_client = importlib.import_module("made_client")
    models = importlib.import_module("made_client.models")
    chat = importlib.import_module("made_client.api.openai.chat_completions")
    tokenize = importlib.import_module("made_client.api.tokens.tokenize")
    listed = importlib.import_module("made_client.api.openai.list_models")
    client = made_client.Client(base_url=URL)
    body = models.ChatCompletionsChatBody.from_dict({"model": MODEL, "messages": MESSAGES, "temperature": 0})
    whole = chat.sync(client=client, body=body)
    assert "7" in whole.choices[0].message.content
    ids = tokenize.sync(client=client, body=models.TokenizeTokenizeBody.from_dict({"model": MODEL, "prompt": "3 + 4"}))
    assert ids.count == len(ids.tokens) > 1
    assert MODEL in [m.id for m in listed.sync(client=client).data]
    refused = chat.sync(
        client=client, body=models.ChatCompletionsChatBody.from_dict({**body.to_dict(), "model": "nope"})
    )
    assert refused.error.code == "model_not_found"
tried("openapi-python-client", "openapi-python-client", "a package without warnings, chat, tokens, models, an error")
