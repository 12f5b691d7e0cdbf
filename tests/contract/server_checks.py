"""Counterparts of REST bodies and of clients, against the server that `serve api_server` started."""

from __future__ import annotations

import asyncio
import json

import echelon
from cluster.environment import free_port
from contract.site import NAME, Site
from echelon import APIClient, ChatTemplateConfig

ASKED = [
    {"role": "system", "content": "You are a helpful assistant."},
    {"role": "user", "content": " provide three suggestions about time management"},
]


def api_server(site: Site) -> None:
    assert NAME in site.get(f"{site.url}/v1/models").decode()
    assert "api_server" in site.run("serve", "--help")
    assert "--cache-max-entry-count" in site.run("serve", "api_server", "-h")
    assert b"swagger" in site.get(f"{site.url}/docs")


def api_server_qos(site: Site) -> None:
    status = json.loads(site.get(f"{site.url}/health"))
    assert status["status"] == "ok"
    assert b'tier="Platinum"' in _metrics_after(site, "user_id0")


def _metrics_after(site: Site, user: str) -> bytes:
    site.post("/v1/completions_qos", {"model": NAME, "prompt": "Hello", "user_id": user})
    return site.get(f"{site.url}/metrics")


def openai_client(site: Site) -> None:
    from openai import OpenAI

    client = OpenAI(api_key="YOUR_API_KEY", base_url=f"{site.url}/v1")
    name = client.models.list().data[0].id
    response = client.chat.completions.create(model=name, messages=ASKED, temperature=0.8, top_p=0.8)
    assert response.choices[0].message.content


def openai_async(site: Site) -> None:
    from openai import AsyncOpenAI

    async def ask() -> str:
        async with AsyncOpenAI(api_key="YOUR_API_KEY", base_url=f"{site.url}/v1") as client:
            cards = await client.models.list()._get_page()
            answer = await client.chat.completions.create(
                model=cards.data[0].id, messages=ASKED, temperature=0.8, top_p=0.8
            )
            return answer.choices[0].message.content or ""

    assert asyncio.run(ask())


def apiclient_chat(site: Site) -> None:
    client = APIClient(site.url)
    messages = [{"role": "user", "content": "Say this is a test!"}]
    (item,) = client.chat_completions_v1(model=client.available_models[0], messages=messages)
    assert item["choices"][0]["message"]["content"]


def apiclient_completion(site: Site) -> None:
    client = APIClient(site.url)
    (item,) = client.completions_v1(model=client.available_models[0], prompt="hi")
    assert item["usage"]["completion_tokens"] > 0
    ids, length = client.encode("hi")
    assert len(ids) == length > 0


def apiclient_session(site: Site) -> None:
    client = APIClient(site.url)
    history = []
    for message in ("What is 3 + 4?", "What is 5 + 1?", "Hi!", "What is the capital of France?"):
        (item,) = client.chat_interactive_v1(prompt=message, session_id=1, interactive_mode=True, stream=False)
        history.append(item["history_tokens"])
        assert item["text"]
        assert item["finish_reason"] == "stop"
    assert history == sorted(set(history)), "each turn knows the ones before"


def openapi(site: Site) -> None:
    description = json.loads(site.get(f"{site.url}/openapi.json"))
    assert description["openapi"].startswith("3.")
    for path in ("/v1/models", "/v1/chat/completions", "/v1/completions", "/v1/chat/interactive"):
        assert path in description["paths"]
    body = description["paths"]["/v1/chat/completions"]["post"]["requestBody"]
    assert "messages" in json.dumps(body)


def curl_models(site: Site) -> None:
    listed = json.loads(site.get(f"{site.url}/v1/models"))
    assert [card["id"] for card in listed["data"]] == [NAME]


def curl_chat(site: Site) -> None:
    answer = site.post(
        "/v1/chat/completions", {"model": NAME, "messages": [{"role": "user", "content": "Hello! How are you?"}]}
    )
    assert answer["choices"][0]["message"]["content"]


def curl_completion(site: Site) -> None:
    # The document says the model's name as it is not served: here it must be right.
    answer = site.post("/v1/completions", {"model": NAME, "prompt": "two steps to build a house:"})
    assert answer["choices"][0]["finish_reason"] in ("stop", "length")


def curl_interactive(site: Site) -> None:
    body = {"prompt": "Hello! How are you?", "session_id": 2, "interactive_mode": True}
    answer = site.post("/v1/chat/interactive", body)
    assert set(answer) >= {"text", "tokens", "input_tokens", "history_tokens", "finish_reason"}


def qos_interactive(site: Site) -> None:
    body = {
        "prompt": "Hello,Hello", "session_id": -1, "interactive_mode": False, "stream": False, "stop": False,
        "request_output_len": 512, "top_p": 0.8, "top_k": 40, "temperature": 0.8, "repetition_penalty": 1,
        "ignore_eos": False, "user_id": "user_id0",
    }  # fmt: skip
    assert site.post("/v1/chat/interactive_qos", body)["tokens"] > 0


def qos_chat(site: Site) -> None:
    body = {
        "model": NAME, "messages": "Hello,Hello", "temperature": 0.7, "top_p": 1, "n": 1, "max_tokens": 512,
        "stop": False, "stream": False, "presence_penalty": 0, "frequency_penalty": 0, "repetition_penalty": 1,
        "session_id": -1, "ignore_eos": False, "user_id": "user_id0",
    }  # fmt: skip
    assert site.post("/v1/chat/completions_qos", body)["usage"]["completion_tokens"] > 0


def qos_completion(site: Site) -> None:
    body = {
        "model": NAME, "prompt": "Hello,Hello", "suffix": "string", "temperature": 0.7, "n": 1, "max_tokens": 16,
        "stop": "string", "stream": False, "top_p": 1, "repetition_penalty": 1, "session_id": -1, "ignore_eos": False,
        "user_id": "user_id0",
    }  # fmt: skip
    assert site.post("/v1/completions_qos", body)["usage"]["completion_tokens"] > 0


def api_client(site: Site) -> None:
    said = site.run("serve", "api_client", site.url, "--temperature", "0", said="What is 3 + 4?\n/exit\n")
    assert "3 + 4 = 7." in said


def gradio_url(site: Site) -> None:
    port = free_port()
    pages = site.start("serve", "gradio", site.url, "--server-name", "127.0.0.1", "--server-port", str(port))
    site.await_url(f"http://127.0.0.1:{port}/chat", pages)
    assert b"<html" in site.get(f"http://127.0.0.1:{port}/chat").lower()


def bench_serving(site: Site) -> None:
    from contract.command_checks import benchmark

    benchmark(
        site, "serving.py", site.url + "/v1", "--tokenizer", "configs/demo-model", "--dataset",
        str(site.conversations), "--repeat", "1",
    )  # fmt: skip


def proxy(site: Site) -> None:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    process = site.start(
        "serve", "proxy", "--server_name", "127.0.0.1", "--server_port", str(port), "--strategy",
        "min_expected_latency",
    )  # fmt: skip
    site.await_url(f"{url}/v1/models", process)
    import urllib.request

    def post(route: str, body: object) -> bytes:
        data = json.dumps(body).encode()
        request = urllib.request.Request(url + route, data, {"content-type": "application/json"})
        with urllib.request.urlopen(request, timeout=120) as answer:
            found: bytes = answer.read()
        return found

    post("/nodes/add", {"url": site.url, "status": {"models": [NAME], "speed": 100}})
    assert site.url in site.get(f"{url}/nodes/status").decode()
    said = post("/v1/chat/completions", {"model": NAME, "messages": [{"role": "user", "content": "What is 3 + 4?"}]})
    assert b"choices" in said
    post("/nodes/remove", {"url": site.url})
    assert site.url not in site.get(f"{url}/nodes/status").decode()


def serve_with_template(site: Site) -> None:
    template = ChatTemplateConfig(
        "mine", user="<|begin|><|user|>", eoh="<|end|>", assistant="<|assistant|>", stop_words=["<|end|>"]
    )
    file = site.folder / "served-template.json"
    file.write_text(json.dumps(template.to_dict()))
    config = ChatTemplateConfig.from_json(str(file))
    with echelon.serve("demo", "internlm-chat-7b", chat_template_config=config, server_port=free_port()) as client:
        (answer,) = client.chat_completions_v1(model="internlm-chat-7b", messages="What is 3 + 4?", temperature=0)
        assert answer["choices"][0]["message"]["content"] == "3 + 4 = 7."
        said = "".join(text for text, _, _ in client.chat("hi", 1))
        assert said


serve_and_chat = serve_with_template
