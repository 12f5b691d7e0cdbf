"""Counterparts of the documents' command lines and files, each in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tokenizers import Tokenizer

import echelon
from cluster.pipeline.server_config import ServerOptions, server_config
from cluster.qos_file import QosFile
from contract.site import TIERS, Site
from echelon import TurbomindEngineConfig
from router.qos.file import load_qos_config
from router.text.chat_form import ChatForm
from router.text.template_choice import chosen, renderer_of
from router.text.templates import Conversation

ROOT = Path(__file__).resolve().parents[2]


def benchmark(site: Site, script: str, *arguments: str) -> str:
    """What a benchmark of ours prints, which must succeed."""
    done = subprocess.run(
        [sys.executable, f"benchmarks/{script}", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=600,
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'benchmarks'}"}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, (done.stdout + done.stderr)[-2000:]
    return done.stdout


def bench_latency(site: Site) -> None:
    said = benchmark(
        site, "latency.py", "demo", "--concurrency", "1", "--prompt-tokens", "16", "--completion-tokens", "8",
        "--rounds", "1", "--repeat", "1",
    )  # fmt: skip
    assert "tok" in said, said


def bench_throughput(site: Site) -> None:
    benchmark(site, "throughput.py", "demo", "--dataset", str(site.conversations), "--repeat", "1")


def chat_command(site: Site) -> None:
    assert "3 + 4 = 7." in site.run("chat", "demo", "--temperature", "0", said="What is 3 + 4?\n/exit\n")


def cap_chat(site: Site) -> None:
    said = site.run(
        "chat", "demo", "--cap", "chat", "--meta-instruct", "Provide answers in Python", "--temperature", "0",
        said="What is 3 + 4?\n/exit\n",
    )  # fmt: skip
    assert "7" in said


def cap_completion(site: Site) -> None:
    said = site.run("chat", "demo", "--cap", "completion", "--temperature", "0", said="Once\n!!\n/exit\n")
    assert "upon a time" in said  # what follows, and no answer to a question


def cap_python(site: Site) -> None:
    said = site.run("chat", "demo", "--cap", "python", "--temperature", "0", said="Once\n!!\n/exit\n")
    assert "upon a time" in said


def cap_infilling(site: Site) -> None:
    import asyncio

    backend = Tokenizer.from_file(str(ROOT / "configs/demo-model/tokenizer.json"))
    backend.add_special_tokens(["▁<PRE>", "▁<SUF>", "▁<MID>", "▁<EOT>"])
    form = chosen("codellama", "infilling")
    assert isinstance(form, ChatForm)
    renderer, complete = renderer_of(form, backend)
    asked = 'def remove_non_ascii(s: str) -> str:\n    """ <FILL>\n    return result'
    text = asyncio.run(renderer.render(Conversation([{"role": "user", "content": asked}])))
    before, after = asked.split("<FILL>")
    assert text.endswith(f"▁<PRE>{before}▁<SUF>{after}▁<MID>")
    assert "▁<EOT>" in complete.stop_words


def convert(site: Site) -> None:
    _converted(site, "internlm")


def convert_codellama(site: Site) -> None:
    _converted(site, "codellama")


def _converted(site: Site, family: str) -> Path:
    folder = site.folder / f"converted-{family}"
    if not folder.exists():
        said = site.run("convert", family, "demo", "--dst-path", str(folder), "--trust-remote-code")
        assert f"echelon serve {folder}" in said
    return folder


def convert_and_use(site: Site) -> None:
    folder = _converted(site, "internlm")
    with echelon.pipeline(str(folder)) as pipe:
        assert pipe("What is 3 + 4?").text == "3 + 4 = 7."
    said = site.run(
        "chat", str(folder), "--model-name", "internlm", "--temperature", "0", said="What is 3 + 4?\n/exit\n"
    )
    assert "3 + 4 = 7." in said


def hub_commands(site: Site) -> None:
    said = site.run("chat", "demo", "--model-name", "qwen-7b", "--temperature", "0", said="What is 3 + 4?\n/exit\n")
    assert "3 + 4 = 7." in said
    options = ServerOptions(server_name="127.0.0.1")
    config = server_config("demo", "qwen-7b", TurbomindEngineConfig(tp=1), None, options, {})
    assert config.model_name == "qwen-7b"
    assert "vicuna" in site.run("list")


def cache_flags(site: Site) -> None:
    said = site.run(
        "chat", "demo", "--cache-max-entry-count", "0.2", "--temperature", "0", said="What is 3 + 4?\n/exit\n"
    )
    assert "3 + 4 = 7." in said
    options = ServerOptions()
    config = server_config("demo", None, TurbomindEngineConfig(cache_max_entry_count=0.2), None, options, {})
    assert config.engine.cache_fraction == 0.2


def api_server_name(site: Site) -> None:
    config = server_config(
        str(_converted(site, "codellama")), None, TurbomindEngineConfig(tp=1), None,
        ServerOptions(server_name="127.0.0.1", server_port=23999), {},
    )  # fmt: skip
    assert (config.http.host, config.http.port, config.model_name) == ("127.0.0.1", 23999, "converted-codellama")


def template_command(site: Site) -> None:
    file = site.folder / "cli-template.json"
    file.write_text('{"model_name": "mine", "user": "<|begin|><|user|>", "assistant": "<|end|><|assistant|>"}')
    said = site.run("chat", "demo", "--chat-template", str(file), "--temperature", "0", said="What is 3 + 4?\n/exit\n")
    assert "3 + 4 = 7." in said


def qos_config(site: Site) -> None:
    config = load_qos_config(site.qos_file)
    assert config is not None
    assert QosFile(site.qos_file).look() is not None or len(TIERS) == 4
    assert "Platinum" in site.run("qos", "check", str(site.qos_file))


def gradio_model(site: Site) -> None:
    from cluster.environment import free_port

    port, api = free_port(), free_port()
    site.close_pipe_of_two()
    process = site.start(
        "serve", "gradio", "demo", "--server-name", "127.0.0.1", "--server-port", str(port), "--port", str(api)
    )
    site.await_url(f"http://127.0.0.1:{port}/chat", process)
    assert b"<html" in site.get(f"http://127.0.0.1:{port}/chat").lower()
    process.terminate()
    process.wait(120)
