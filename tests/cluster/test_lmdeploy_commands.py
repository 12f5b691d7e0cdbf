"""LMDeploy's commands: their flags become a cluster config, and what is not done says so."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from fake_server import FakeServer
from typer.testing import CliRunner

from cluster import cli, serving
from cluster.chat import command as chat_command
from cluster.config import ClusterConfig, resolve_model
from cluster.convert_command import converted
from cluster.environment import free_port
from router.keys.file import parse_keys, read_key_file
from router.keys.ring import digest_of
from router.text.tokenizer import Tokenizer
from workers.api.errors import ConfigError, EchelonError


def run(*arguments: str) -> Any:
    return CliRunner().invoke(cli.app, list(arguments))


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[ClusterConfig]:
    """The configs with which a server would have been started."""
    configs: list[ClusterConfig] = []
    monkeypatch.setenv("ECHELON_STATE_DIR", str(tmp_path))
    monkeypatch.setattr(serving, "serve_until_stopped", lambda config, address: configs.append(config))
    return configs


def test_flags_of_the_api_server(started: list[ClusterConfig], tmp_path: Path) -> None:
    (tmp_path / "t.json").write_text(json.dumps({"model_name": "mine", "user": "<|user|>"}))
    (tmp_path / "tiers.json").write_text("{}")
    result = run(
        "serve", "api_server", "demo", "--server-name", "127.0.0.1", "--server_port", "23999", "--tp", "2",
        "--session-len", "512", "--max-batch-size", "16", "--cache-max-entry-count", "0.2", "--model-name", "m",
        "--model-format", "hf", "--quant-policy", "0", "--rope-scaling-factor", "2.0", "--log-level", "INFO",
        "--chat-template", str(tmp_path / "t.json"), "--cap", "completion", "--qos-config-path",
        str(tmp_path / "tiers.json"), "--allow-origins", "https://a.example", "https://b.example",
        "--allow-credentials", "--allow-methods", "GET", "POST", "--backend", "pytorch",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    (config,) = started
    model, engine, http = config.model, config.engine, config.http
    assert (http.host, http.port, model.tensor_parallel, model.name) == ("127.0.0.1", 23999, 2, "m")
    assert (model.max_model_len, model.rope_scaling_factor, model.capability) == (512, 2.0, "completion")
    assert model.chat_template == {"model_name": "mine", "user": "<|user|>"}
    assert (engine.max_num_seqs, engine.cache_fraction) == (16, 0.2)
    assert http.allow_origins == ("https://a.example", "https://b.example")
    assert (http.allow_credentials, http.allow_methods) == (True, ("GET", "POST"))
    assert (config.log.level, config.dispatch.qos) == ("info", str(tmp_path / "tiers.json"))


def test_keys_are_kept_by_their_hashes(started: list[ClusterConfig]) -> None:
    assert run("serve", "api_server", "demo", "--api-keys", "key-one", "key-two").exit_code == 0
    assert run("serve", "api_server", "demo").exit_code == 0
    with_keys, without = started
    assert (with_keys.http.host, without.http.host) == ("0.0.0.0", "127.0.0.1")
    assert without.http.api_keys is None
    assert without.engine.prefix_caching
    assert run("serve", "api_server", "demo", "--no-prefix-caching").exit_code == 0
    assert not started.pop().engine.prefix_caching
    file = Path(with_keys.http.api_keys or "")
    entries = parse_keys(read_key_file(file), str(file)).entries
    assert [e.digest for e in entries] == [digest_of(b"key-one"), digest_of(b"key-two")]
    assert b"key-one" not in file.read_bytes()
    given = run("serve", "api_server", "demo", "--api-keys", str(file))
    assert given.exit_code == 0
    assert started[-1].http.api_keys == str(file)


def test_the_system_message_of_a_template(started: list[ClusterConfig]) -> None:
    said = ("--chat-template", "codellama", "--meta-instruction", "Provide answers in Python")
    assert run("serve", "api_server", "demo", *said).exit_code == 0
    template = started[0].model.chat_template
    assert template == {"model_name": "codellama", "meta_instruction": "Provide answers in Python"}
    assert "of pieces" in str(run("serve", "api_server", "demo", *said[2:]).exception)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["lite", "auto_awq", "m", "--w-bits", "4"], "AWQ are not done yet"),
        (["lite", "smooth_quant", "m", "--work-dir", "./x"], "SmoothQuant are not done yet"),
        (["serve", "api_server", "demo", "--quant-policy", "8"], "KV cache is not done yet"),
        (["serve", "api_server", "demo", "--model-format", "awq"], "quantized weights are not done yet"),
        (["serve", "api_server", "demo", "--adapters", "a=b"], "LoRA adapters are not done yet"),
        (["serve", "api_server", "demo", "--ssl"], "SSL_CERTFILE"),
        (["serve", "api_server", "demo", "--log-level", "loud"], "log_level"),
        (["serve", "proxy", "--strategy", "fastest"], "strategy"),
        (["chat", "--cap", "python"], "echelon chat MODEL"),
        (["convert", "vicnua", "demo"], "there is no family"),
        (["convert", "vicuna", "./nowhere"], "neither a folder"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value[:3]),
)
def test_what_cannot_be_done_is_said(started: list[ClusterConfig], arguments: list[str], reason: str) -> None:
    error = run(*arguments).exception
    assert isinstance(error, EchelonError)
    assert reason in str(error)
    assert not started


def test_chat_takes_a_model_or_a_server(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []
    monkeypatch.setattr(chat_command, "chat_in_process", lambda model, **o: asked.append((model, o)))
    monkeypatch.setattr(chat_command, "chat_with_server", lambda url, model, **o: asked.append((url, o)))
    for arguments in (
        ["chat", "demo", "--cap", "chat", "--meta-instruct", "Be brief.", "--session-len", "128"],
        ["chat", "demo", "--model-name", "vicuna"],
        ["chat", "--system", "s"],
        ["serve", "api_client", "http://0.0.0.0:23333"],
    ):
        result = run(*arguments)
        assert result.exit_code == 0, result.output
    (_, first), (_, second), (url, _), (client_url, _) = asked
    assert first["system"] == "Be brief."
    assert (first["capability"], first["backend_config"].session_len) == ("chat", 128)
    assert second["chat_template"] is None  # the demo model has its own
    assert (url, client_url) == ("http://127.0.0.1:23333/v1", "http://127.0.0.1:23333")


def test_convert_adds_what_a_checkpoint_lacks(tmp_path: Path) -> None:
    source, target = tmp_path / "bare", tmp_path / "made"
    source.mkdir()
    for file in resolve_model("demo").iterdir():
        if file.name != "chat_template.jinja":
            (source / file.name).symlink_to(file)
    said = converted("vicuna", source, target)
    assert "1 files of weights" in said[0]
    made = Tokenizer.from_folder(target)
    assert made.chat is not None
    made.chat.close()
    assert "USER: " in (target / "chat_template.jinja").read_text()
    assert (target / "model.safetensors").stat().st_size > 1 << 20
    with pytest.raises(ConfigError, match="is not empty"):
        converted("vicuna", source, target)
    (source / "model.safetensors").unlink()
    (source / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ConfigError, match="pickled"):
        converted("vicuna", source, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_the_shell_completes_commands_and_flags() -> None:
    for words, at, wanted in (
        ("echelon serve api", 2, {"api_server", "api_client"}),
        ("echelon chat --cap", 2, {"--cap"}),
    ):
        asked = {"_ECHELON_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(at)}
        code = "import sys; sys.argv[0] = 'echelon'; from cluster.cli import main; main()"
        shown = subprocess.run(
            [sys.executable, "-c", code], env=os.environ | asked, capture_output=True, text=True, check=False
        )
        assert set(shown.stdout.split()) == wanted, shown.stderr


def test_a_proxy_dispatches_without_ray() -> None:
    port = free_port()
    with FakeServer() as node:
        root = node.url.removesuffix("/v1")
        code = "from cluster.cli import main; main()"
        command = [sys.executable, "-c", code, "serve", "proxy", "--server-port", str(port), "--node", root]
        proxy = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        try:
            assert proxy.stdout is not None
            assert f"127.0.0.1:{port}/v1" in proxy.stdout.readline()
            body = {"model": "fake", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}
            answer = _eventually(f"http://127.0.0.1:{port}/v1/chat/completions", body)
            assert answer["choices"][0]["message"]["content"].startswith("answer ")
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/nodes/status") as status:
                assert root in json.load(status)
            proxy.send_signal(signal.SIGINT)
            assert proxy.wait(timeout=30) == 0
        finally:
            proxy.kill()
            proxy.communicate()
    with socket.create_server(("127.0.0.1", port)):
        pass  # the port is free again


def _eventually(url: str, body: dict[str, Any]) -> Any:
    """The answer, once the proxy has looked at its node: until then it waits, or says that there is no such model."""
    data = json.dumps(body).encode()
    for _ in range(600):
        request = urllib.request.Request(url, data, {"content-type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as e:
            if e.code not in (404, 503):
                raise
            time.sleep(0.05)
    raise AssertionError("the node was never asked")
