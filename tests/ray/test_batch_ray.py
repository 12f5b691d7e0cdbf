"""Batch by Ray handles: `ray.get` gives what HTTP gives, errors as themselves, and nothing is left behind."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import echelon
from cluster.names import GATEWAY, NAMESPACE
from workers.api.errors import ConfigError, ContextLengthExceeded, EchelonError, InvalidRequest, ModelNotFound

pytestmark = pytest.mark.ray

ECHELON = str(Path(sys.executable).with_name("echelon"))
ENDLESS: dict[str, Any] = {"max_tokens": 1500, "ignore_eos": True}


def chats(count: int) -> list[list[dict[str, str]]]:
    return [[{"role": "user", "content": f"What is {i} + {i * 7 % 50}?"}] for i in range(count)]


def test_ray_get_equals_http(cluster: Any) -> None:
    import ray

    handle = echelon.connect()
    prompts = chats(50)
    ours = ray.get([handle.generate.remote(p, temperature=0, max_tokens=40) for p in prompts], timeout=120)
    with ThreadPoolExecutor(16) as pool:
        body = {"temperature": 0, "max_tokens": 40}
        theirs = list(pool.map(lambda p: cluster.chat(p[0]["content"], **body), prompts))
    for mine, http in zip(ours, theirs, strict=True):
        assert mine.text == http["choices"][0]["message"]["content"]
        assert mine.finish_reason == http["choices"][0]["finish_reason"]
        assert mine.usage.prompt_tokens == http["usage"]["prompt_tokens"]
        assert len(mine.token_ids) == mine.usage.completion_tokens == http["usage"]["completion_tokens"]
    assert sum(m.finish_reason == "stop" for m in ours) > 40


def test_completions_ids_and_choices(cluster: Any) -> None:
    import ray

    handle = echelon.connect("auto")
    body: dict[str, Any] = {"max_tokens": 12, "n": 2, "seed": 5}
    mine = ray.get(handle.generate.remote("3 + 4", **body), timeout=60)
    status, http = cluster.post("/completions", {"model": "demo", "prompt": "3 + 4", **body})
    assert status == 200
    assert [c.text for c in mine.choices] == [c["text"] for c in http["choices"]]
    first = ray.get(handle.generate.remote([5, 6, 7], temperature=0, max_tokens=4, ignore_eos=True), timeout=60)
    more = ray.get(
        handle.generate.remote([5, 6, 7, *first.token_ids], temperature=0, max_tokens=4, ignore_eos=True), timeout=60
    )
    whole = ray.get(handle.generate.remote([5, 6, 7], temperature=0, max_tokens=8, ignore_eos=True), timeout=60)
    assert whole.token_ids == first.token_ids + more.token_ids
    assert ray.get(handle.models.remote(), timeout=60) == ("demo", "second")
    likely, unlikely = ray.get(handle.get_ppl.remote(["The capital of France is Paris.", "is of Paris capital The."]))
    assert 0 < likely < unlikely
    body = {"model": "demo", "prompt": "The capital of France is Paris.", "max_tokens": 1, "prompt_logprobs": 0}
    status, http = cluster.post("/completions", body)
    assert status == 200
    given = [next(iter(token.values()))["logprob"] for token in http["choices"][0]["prompt_logprobs"][1:]]
    assert likely == pytest.approx(-sum(given) / len(given), abs=1e-4)


@pytest.mark.parametrize(
    ("prompt", "sampling", "kind", "words"),
    [
        ("x", {"tempreature": 1}, InvalidRequest, "Unknown parameter: 'tempreature'."),
        ("x", {"model": "nope"}, ModelNotFound, "The model 'nope' does not exist"),
        ("x", {"max_tokens": 10**9}, ContextLengthExceeded, "maximum context length"),
        ("x", {"stream": True}, InvalidRequest, "stream"),
        ("x", {"stop": {1}}, InvalidRequest, "JSON"),
        ([], {}, InvalidRequest, "prompt"),
    ],
)
def test_errors_are_themselves(cluster: Any, prompt: Any, sampling: Any, kind: type[EchelonError], words: str) -> None:
    import ray

    with pytest.raises(kind) as e:
        ray.get(echelon.connect().generate.remote(prompt, **sampling), timeout=60)
    assert words in str(e.value).strip().splitlines()[-1]
    assert words in str(e.value.cause)
    assert "router/" not in str(e.value), "the caller should not have to read our frames"
    assert e.value.code == pickle.loads(pickle.dumps(e.value.cause)).code


def test_a_cancelled_call_frees_its_blocks(cluster: Any) -> None:
    import ray

    handle = echelon.connect()
    refs = [handle.generate.remote("1 2 3", **ENDLESS) for _ in range(4)]
    short = ray.get(handle.generate.remote("1 2 3", max_tokens=2, ignore_eos=True), timeout=60)
    assert short.usage.completion_tokens == 2
    for ref in refs:
        ray.cancel(ref)
    ended = 0
    for ref in refs:
        try:
            ray.get(ref, timeout=60)
            ended += 1
        except ray.exceptions.TaskCancelledError:
            pass
    assert ended < 4
    # the fixture checks that nothing is left behind


def test_a_gateway_that_dies_does_its_calls_again(cluster: Any) -> None:
    import ray

    handle = echelon.connect()
    asked: dict[str, Any] = {"temperature": 0, "max_tokens": 300, "ignore_eos": True}
    wanted = ray.get(handle.generate.remote("1 2 3", **asked), timeout=60)
    refs = [handle.generate.remote("1 2 3", **asked) for _ in range(4)]
    ray.get(handle.generate.remote("1 2 3", max_tokens=2), timeout=60)
    ray.kill(ray.get_actor(GATEWAY, namespace=NAMESPACE), no_restart=False)
    assert [r.token_ids for r in ray.get(refs, timeout=120)] == [wanted.token_ids] * 4


def test_connect_says_what_is_wrong(cluster: Any) -> None:
    with pytest.raises(ConfigError, match="has joined the Ray cluster at"):
        echelon.connect("10.1.2.3:6379")


def test_batch_command_by_ray_handles(cluster: Any, tmp_path: Path) -> None:
    import ray

    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    lines = [{"messages": m, "temperature": 0, "max_tokens": 30} for m in chats(20)] + [{"prompt": "x", "nope": 1}]
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    address = ray.get_runtime_context().gcs_address
    command = [ECHELON, "batch", str(source), str(target), "--address", address]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=120, env={**os.environ, "RAY_ADDRESS": ""}
    )
    assert done.returncode == 0, done.stderr
    records = {r["line"]: r["response"] for r in map(json.loads, target.read_text().splitlines())}
    assert sorted(records) == list(range(1, 22))
    for number, messages in enumerate(chats(20), start=1):
        http = cluster.chat(messages[0]["content"], temperature=0, max_tokens=30)
        assert records[number]["body"]["choices"] == http["choices"]
    assert records[21]["status_code"] == 400
