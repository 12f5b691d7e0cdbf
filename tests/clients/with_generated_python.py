"""openapi-python-client: a package made from the server's own openapi.json, and calls through it."""

import importlib
import json
import subprocess
import sys
import tempfile
import urllib.request
from pathlib import Path

from said import MESSAGES, MODEL, QUESTION, SUM, URL, tried

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
    respond = importlib.import_module("made_client.api.openai.responses")
    asked = {"model": MODEL, "input": QUESTION, "temperature": 0,
             "tools": [{"type": "function", "name": "add", "parameters": SUM}], "tool_choice": "required"}  # fmt: skip
    response = respond.sync(client=client, body=models.ResponsesResponsesBody.from_dict(asked))
    assert (response.output[0].type_, response.output[0].name) == ("function_call", "add")
    message = importlib.import_module("made_client.api.anthropic.messages")
    asked = {"model": MODEL, "messages": MESSAGES, "max_tokens": 64,
             "tools": [{"name": "add", "input_schema": SUM}], "tool_choice": {"type": "any"}}  # fmt: skip
    used = message.sync(client=client, body=models.MessagesMessagesBody.from_dict(asked))
    assert (used.stop_reason, used.content[0].name) == ("tool_use", "add")
    refused = chat.sync(
        client=client, body=models.ChatCompletionsChatBody.from_dict({**body.to_dict(), "model": "nope"})
    )
    assert refused.error.code == "model_not_found"
tried(
    "openapi-python-client",
    "openapi-python-client",
    "a package without warnings, chat, calls in responses and messages, tokens, models, an error",
)
