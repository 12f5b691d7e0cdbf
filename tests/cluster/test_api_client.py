"""`APIClient` against a scripted server: what it asks, and what it makes of answers, streams and refusals."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from fake_server import FakeServer

from cluster.http_client import NoAccess, Unreachable
from cluster.pipeline import notices
from echelon import APIClient, client
from workers.api.errors import EchelonError


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with FakeServer() as s:
        s.say = lambda body: ["3 + 4", " = 7."]
        yield s


@pytest.fixture
def api(server: FakeServer) -> APIClient:
    return client(server.url.removesuffix("/v1"))


def test_the_url_may_be_written_as_in_the_documents() -> None:
    for url in ("http://0.0.0.0:23333", "http://0.0.0.0:23333/", "http://127.0.0.1:23333/v1"):
        assert APIClient(url).url == "http://127.0.0.1:23333/v1"
    assert client().url == "http://127.0.0.1:23333/v1"


def test_whole_answers_are_one_item(server: FakeServer, api: APIClient) -> None:
    assert api.available_models == ["fake", "other"]
    messages = [{"role": "user", "content": "What is 3 + 4?"}]
    (answer,) = api.chat_completions_v1(model="fake", messages=messages, max_tokens=5, seed=3)
    assert answer["choices"][0]["message"]["content"] == "3 + 4 = 7."
    (answer,) = api.completions_v1(model="fake", prompt="hi")
    assert answer["choices"][0]["text"] == "3 + 4 = 7."
    chat, completion = server.bodies
    assert chat == {
        "model": "fake", "messages": messages, "temperature": 0.7, "top_p": 1.0, "n": 1, "max_tokens": 5,
        "stream": False, "seed": 3,
    }  # fmt: skip
    assert completion["max_tokens"] == 16


def test_streams_are_items_as_they_come(server: FakeServer, api: APIClient) -> None:
    items = api.chat_completions_v1(model="fake", messages="What is 3 + 4?", stream=True)
    said = [item["choices"][0]["delta"].get("content") for item in items]
    assert said == ["3 + 4", " = 7.", None]
    assert server.bodies[0]["messages"] == [{"role": "user", "content": "What is 3 + 4?"}]


def test_a_session_of_a_plain_route_is_left_out(
    server: FakeServer, api: APIClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(notices, "_said", set())
    with pytest.warns(UserWarning, match="chat_interactive_v1 has sessions"):
        list(api.chat_completions_v1(model="fake", messages="hi", session_id=3))
    assert "session_id" not in server.bodies[0]
    list(api.chat_interactive_v1("hi", session_id=3, interactive_mode=True, request_output_len=9))
    assert server.bodies[1]["session_id"] == 3
    assert server.bodies[1]["interactive_mode"] is True
    assert server.bodies[1]["model"] == "fake"


def test_refusals_are_errors(server: FakeServer, api: APIClient) -> None:
    server.refuse = lambda body, times: (400, {}, b'{"error": {"message": "too long"}}')
    with pytest.raises(EchelonError, match="too long"):
        list(api.completions_v1(model="fake", prompt="hi"))
    server.refuse = lambda body, times: (401, {}, b'{"error": {"message": "no key"}}')
    with pytest.raises(NoAccess, match="no key"):
        list(api.completions_v1(model="fake", prompt="hi"))
    server.refuse = lambda body, times: (0, {}, b"")
    with pytest.raises(Unreachable, match="broke"):
        list(api.completions_v1(model="fake", prompt="hi"))


def test_the_key_goes_along(server: FakeServer) -> None:
    list(APIClient(server.url, api_key="ek-anna").completions_v1(model="fake", prompt="hi"))
    assert server.keys == {"Bearer ek-anna"}
