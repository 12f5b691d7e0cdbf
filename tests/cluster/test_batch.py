"""`echelon batch`: every line once, whatever happens to the server, the process or the input."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_server import FakeServer, answer_to

from cluster.batch.command import BatchOptions, run_batch
from cluster.batch.job import BatchJob, Retry
from cluster.batch.journal import Journal
from cluster.batch.lines import BadLine, Line, Record, answered, read_lines, retry_after, to_be_retried
from cluster.batch.transport import HttpTransport
from cluster.http_client import Server, Unreachable
from router.service import Reply
from workers.api.errors import ConfigError, EchelonError

ECHELON = str(Path(sys.executable).with_name("echelon"))
BUSY = (429, {"retry-after": "0.01"}, b'{"error": {"message": "full"}}')


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with FakeServer() as s:
        yield s


def write_jsonl(path: Path, lines: list[Any]) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def openai_lines(count: int) -> list[dict[str, Any]]:
    return [
        {
            "custom_id": f"id-{i}",
            "method": "POST",
            "url": "/v1/chat/completions",
            "body": {"model": "fake", "messages": [{"role": "user", "content": f"question {i}"}]},
        }
        for i in range(count)
    ]


def records(path: Path) -> list[dict[str, Any]]:
    text = path.read_text()
    assert text == "" or text.endswith("\n")
    return [json.loads(line) for line in text.splitlines()]


def check_complete(path: Path, lines: list[dict[str, Any]]) -> None:
    """Every line of `lines` (OpenAI's) is there once, with its own answer."""
    found = {r["custom_id"]: r["response"]["body"]["choices"][0]["message"]["content"] for r in records(path)}
    assert len(records(path)) == len(found) == len(lines)
    assert found == {line["custom_id"]: answer_to(line["body"]) for line in lines}


def run(source: Path, target: Path, server: FakeServer, **options: Any) -> int:
    return run_batch(BatchOptions(source, target, server.url, **options))


# lines


def parsed(*lines: Any) -> list[Line | BadLine]:
    raw = [(line if isinstance(line, str) else json.dumps(line)).encode() + b"\n" for line in lines]
    return list(read_lines(raw, "m0"))


def test_openai_lines_and_plain_bodies() -> None:
    one, two, three = parsed(
        openai_lines(1)[0], "", {"prompt": "x", "max_tokens": 3}, {"custom_id": "a", "messages": [], "model": "m1"}
    )
    assert one == Line(1, "id-0", "/v1/chat/completions", json.dumps(openai_lines(1)[0]["body"]).encode())
    assert isinstance(two, Line)
    assert (two.number, two.key, two.route) == (3, ("line", 3), "/v1/completions")
    assert json.loads(two.body) == {"model": "m0", "prompt": "x", "max_tokens": 3}
    assert isinstance(three, Line)
    assert (three.key, three.route, json.loads(three.body)["model"]) == (("id", "a"), "/v1/chat/completions", "m1")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "JSON"),
        ("[1]", "must be an object"),
        ('{"prompt": "x", "prompt": "y"}', "twice"),
        ('{"prompt": NaN}', "NaN"),
        ({"model": "m"}, "either 'prompt' or 'messages'"),
        ({"prompt": "x", "messages": []}, "either 'prompt' or 'messages'"),
        ({"prompt": "x", "stream": True}, "stream"),
        ({"prompt": "x", "custom_id": 5}, "custom_id"),
        ({"prompt": "x", "custom_id": ""}, "custom_id"),
        ({"body": {}, "url": "/v1/completions", "method": "POST"}, "custom_id"),
        (openai_lines(1)[0] | {"method": "GET"}, "method"),
        (openai_lines(1)[0] | {"url": "/v1/../x"}, "url"),
        (openai_lines(1)[0] | {"url": "http://elsewhere/v1/completions"}, "url"),
        (openai_lines(1)[0] | {"body": "x"}, "body"),
        (openai_lines(1)[0] | {"more": 1}, "Unknown parameter: 'more'"),
    ],
)
def test_bad_lines_say_why(line: Any, words: str) -> None:
    (bad,) = parsed(line)
    assert isinstance(bad, BadLine)
    assert words in bad.message
    assert bad.key == ("line", 1)


def test_the_second_of_two_equal_ids_is_bad() -> None:
    first, second = parsed(*openai_lines(1), *openai_lines(1))
    assert isinstance(first, Line)
    assert second == BadLine(2, "id-0", "the same custom_id is on an earlier line")


@pytest.mark.parametrize(
    ("reply", "again", "after"),
    [
        (Reply(200, b"{}"), False, 0.0),
        (Reply(400, b'{"error": {}}'), False, 0.0),
        (Reply(429, b"", {"retry-after": "2"}), True, 2.0),
        (Reply(503, b'{"error": {}}', {"retry-after": "Wed, 21 Oct 2026 07:28:00 GMT"}), True, 0.0),
        (Reply(500, b'{"error": {"code": "engine_fault"}}'), False, 0.0),
        (Reply(502, b"<html>bad gateway</html>", {"retry-after": "-1"}), True, 0.0),
    ],
)
def test_what_is_tried_again(reply: Reply, again: bool, after: float) -> None:
    assert (to_be_retried(reply), retry_after(reply)) == (again, after)


def test_delays_grow_and_honour_the_server() -> None:
    retry = Retry(patience=600, first=0.25, last=30)
    assert [retry.delay(a, 0, 0) for a in (0, 1, 2, 10, 5000)] == [0.25, 0.5, 1, 30, 30]
    assert retry.delay(0, 7, 0) == 7
    assert retry.delay(0, 1, 0.999) < 1.25


def test_an_answer_that_is_no_json_is_an_error() -> None:
    line = Line(4, None, "/v1/completions", b"{}")
    good = answered(line, Reply(200, b"<html>"))
    assert good.failed
    assert json.loads(good.text)["error"]["code"] == "invalid_response"
    bad = json.loads(answered(line, Reply(404, b"<html>")).text)
    assert bad["line"] == 4
    assert bad["response"]["body"]["error"]["message"] == "<html>"


# journal


def record(i: int, size: int = 10) -> Record:
    line = Line(i, None if i % 2 else f"id-{i}", "/v1/completions", b"{}")
    return answered(line, Reply(200, json.dumps({"text": "x" * size, "usage": {"completion_tokens": 1}}).encode()))


def test_a_line_torn_at_any_byte_is_cut_and_done_again(tmp_path: Path) -> None:
    whole, last = record(1).text + record(2).text, record(3)
    path = tmp_path / "out.jsonl"
    for cut in range(len(last.text)):
        path.write_bytes(whole + last.text[:cut])
        journal = Journal(path)
        assert journal.torn == (cut > 0)
        assert journal.done == {("line", 1), ("id", "id-2")}
        journal.append(last)
        journal.close()
        assert path.read_bytes() == whole + last.text
    path.write_bytes(whole + b"\0" * 100)
    Journal(path).close()
    assert path.read_bytes() == whole


@pytest.mark.parametrize("foreign", ["hello", "hello\n", '{"prompt": "x"}\n', '{"id": "batch_req_1"}\n', "\n"])
def test_a_file_that_is_not_ours_stays_as_it_is(tmp_path: Path, foreign: str) -> None:
    path = tmp_path / "out.jsonl"
    for before in ("", record(1).text.decode()):
        path.write_text(before + foreign)
        with pytest.raises(ConfigError, match="no output of a batch job"):
            Journal(path)
        assert path.read_text() == before + foreign


def test_two_jobs_do_not_share_a_file(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "out.jsonl")
    with pytest.raises(ConfigError, match="another batch job"):
        Journal(tmp_path / "out.jsonl")
    journal.close()
    Journal(tmp_path / "out.jsonl").close()


def test_a_line_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    path.write_bytes(record(2).text + record(2).text)
    with pytest.raises(ConfigError, match="second time"):
        Journal(path)


def test_a_full_disk_stops_the_job(server: FakeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = openai_lines(9)
    source, target = write_jsonl(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl"
    real, room = os.write, [1000]

    def write(file: int, data: Any) -> int:
        if not room[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        written = real(file, bytes(data)[: room[0]])
        room[0] -= written
        return written

    with monkeypatch.context() as patched:
        patched.setattr(os, "write", write)
        with pytest.raises(EchelonError, match="No space left on device; make room"):
            run(source, target, server)
    assert target.stat().st_size == 1000
    assert run(source, target, server) == 0
    check_complete(target, lines)


# the whole job


def test_all_lines_with_bounded_work_in_flight(server: FakeServer, tmp_path: Path) -> None:
    lines = openai_lines(200)
    server.delay = 0.002
    source, target = write_jsonl(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl"
    assert run(source, target, server, concurrency=7) == 0
    check_complete(target, lines)
    assert 2 <= server.most_at_once <= 7  # how many meet depends on the machine; more than seven must not
    assert {r["response"]["request_id"] for r in records(target)} == {"req-1"}
    assert run(source, target, server) == 0
    check_complete(target, lines)
    assert server.asked.total() == 200


def test_bad_lines_become_error_lines(server: FakeServer, tmp_path: Path) -> None:
    bad = (400, {}, b'{"error": {"message": "too hot"}}')
    server.refuse = lambda body, times: bad if body.get("temperature") else None
    lines = [
        {"prompt": "a"},
        "{nonsense",
        {"custom_id": "x", "prompt": "b", "temperature": 9},
        "",
        {"prompt": "a"},
        "[]",
    ]
    source, target = write_jsonl(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl"
    for _ in range(2):  # the second time there is nothing left to do
        assert run(source, target, server, model="other") == 0
        found = {r["custom_id"] or r["line"]: r for r in records(target)}
        assert len(records(target)) == len(found) == 5
        assert found[1]["response"]["body"]["choices"][0]["text"] == answer_to({"prompt": "a"})
        assert found[5]["response"]["body"]["model"] == "other"
        assert found[2]["response"] is None
        assert "JSON" in found[2]["error"]["message"]
        assert found["x"]["response"]["body"]["error"]["message"] == "too hot"
        assert found[6]["error"]["code"] == "invalid_line"
        assert server.asked.total() == 3


def test_refusals_and_broken_connections_are_tried_again(server: FakeServer, tmp_path: Path) -> None:
    rng = random.Random(11)
    faults = [BUSY, (503, {"retry-after": "0"}, b""), (502, {}, b"<html>"), (0, {}, b""), None, None]
    server.refuse = lambda body, times: rng.choice(faults) if times < 4 else None
    lines = openai_lines(60)
    source, target = write_jsonl(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl"
    with_fast_retries(source, target, server)
    check_complete(target, lines)
    assert server.asked.total() > 60
    assert server.dropped > 0


def with_fast_retries(source: Path, target: Path, server: FakeServer, patience: float = 600.0) -> None:
    journal = Journal(target)
    transport = HttpTransport(Server.parse(server.url), 30)
    retry = Retry(patience, first=0.001, last=0.01)
    job = BatchJob(transport, journal, concurrency=8, retry=retry, rng=random.Random(5))
    try:
        with source.open("rb") as f:
            assert job.run(read_lines(f, "fake"), lambda record: None)
    finally:
        transport.close()
        journal.close()


def test_patience_ends_with_the_refusal_as_the_answer(server: FakeServer, tmp_path: Path) -> None:
    server.refuse = lambda body, times: BUSY
    source, target = write_jsonl(tmp_path / "in.jsonl", openai_lines(3)), tmp_path / "out.jsonl"
    with_fast_retries(source, target, server, patience=0.0)
    assert [r["response"]["status_code"] for r in records(target)] == [429] * 3
    assert server.asked.total() == 3


def test_a_slow_answer_is_given_up(server: FakeServer, tmp_path: Path) -> None:
    server.gate.clear()
    source, target = write_jsonl(tmp_path / "in.jsonl", openai_lines(2)), tmp_path / "out.jsonl"
    assert run(source, target, server, timeout=0.05) == 0
    assert [r["error"]["code"] for r in records(target)] == ["timeout"] * 2


def test_a_server_that_is_gone_stops_the_job_and_nothing_is_lost(server: FakeServer, tmp_path: Path) -> None:
    lines = openai_lines(40)
    source, target = write_jsonl(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl"
    server.refuse = lambda body, times: (0, {}, b"") if server.asked.total() > 20 else None
    with pytest.raises(Unreachable, match="run the same command to go on"):
        run(source, target, server, patience=0.0, concurrency=4)
    done = len(records(target))
    assert 0 < done <= 20
    server.refuse = lambda body, times: None
    assert run(source, target, server) == 0
    check_complete(target, lines)


def test_nothing_is_written_where_there_is_no_server(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", openai_lines(1))
    with FakeServer() as server:
        url = server.url
        with pytest.raises(EchelonError, match="404"):
            run_batch(BatchOptions(source, tmp_path / "out.jsonl", f"{url}/wrong"))
    with pytest.raises(Unreachable, match="cannot connect"):
        run_batch(BatchOptions(source, tmp_path / "out.jsonl", url))
    assert not (tmp_path / "out.jsonl").exists()


def test_the_input_is_not_taken_for_the_output(server: FakeServer, tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", openai_lines(1))
    with pytest.raises(ConfigError, match="is the input"):
        run(source, source, server)
    with pytest.raises(ConfigError, match="cannot read"):
        run(tmp_path / "none.jsonl", tmp_path / "out.jsonl", server)


@pytest.mark.parametrize("url", ["127.0.0.1:80", "ftp://x/v1", "http://", "http://x:99999/v1", "http://x/v1?a=b"])
def test_a_url_that_is_none(url: str) -> None:
    with pytest.raises(ConfigError, match=r"is not"):
        Server.parse(url)


def test_urls() -> None:
    assert Server.parse("http://x").url == "http://x:80/v1"
    assert Server.parse("https://[::1]/api/v1/").url == "https://[::1]:443/api/v1"
    assert Server.parse("https://x/api/v1").path("/v1/completions") == "/api/v1/completions"
    assert "secret" not in repr(Server.parse("http://x", "secret"))


# the process


def start(source: Path, target: Path, server: FakeServer, **environment: str) -> subprocess.Popen[str]:
    command = [ECHELON, "batch", str(source), str(target), "--url", server.url, "--concurrency", "8"]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, **environment})


def await_lines(target: Path, count: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 60
    while not target.exists() or target.read_bytes().count(b"\n") < count:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_killed_half_way_again_and_again_every_line_is_there_once(server: FakeServer, tmp_path: Path) -> None:
    lines = openai_lines(400)
    source, target = write_jsonl(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl"
    server.delay = 0.005
    for count in (60, 150, 250):
        process = start(source, target, server, ECHELON_API_KEY="key-1")
        await_lines(target, count, process)
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        with target.open("ab") as f:  # as if it had died in the middle of a write
            f.write(record(2, 9000).text[: 17 * count])
    process = start(source, target, server, ECHELON_API_KEY="key-1")
    told = process.communicate(timeout=60)[1]
    assert process.returncode == 0, told
    assert "torn" in told
    check_complete(target, lines)
    assert server.asked.total() <= 400 + 3 * 8  # only what was in flight was asked twice
    assert server.keys == {"Bearer key-1"}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_ends_cleanly_and_says_how_to_go_on(server: FakeServer, tmp_path: Path, number: signal.Signals) -> None:
    lines = openai_lines(100)
    source, target = write_jsonl(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl"
    last = {line["body"]["messages"][0]["content"] for line in lines[30:]}
    busy = (429, {"retry-after": "3000"}, b"")
    server.refuse = lambda body, times: busy if body["messages"][0]["content"] in last else None
    process = start(source, target, server)
    await_lines(target, 30, process)
    process.send_signal(number)
    told = process.communicate(timeout=60)[1]
    assert process.returncode == 130, told
    assert "30 of 100 lines done; run the same command to go on" in told
    assert "Traceback" not in told
    server.refuse = lambda body, times: None
    assert run(source, target, server) == 0
    check_complete(target, lines)


def test_url_and_address_exclude_each_other(tmp_path: Path) -> None:
    command = [ECHELON, "batch", "a", "b", "--url", "http://x/v1", "--address", "auto"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, "exclude each other" in done.stderr) == (1, True)
