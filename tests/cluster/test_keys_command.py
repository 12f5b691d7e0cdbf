"""`echelon keys`, and what `batch` and `chat` say of a key that is not taken."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_server import FakeServer

from cluster.access import first_key
from cluster.batch.command import BatchOptions, run_batch
from cluster.chat.remote import RemoteAnswers
from cluster.http_client import NoAccess, Server, Unreachable
from router.keys.file import parse_keys, read_key_file
from router.protocol.errors import answer_for
from workers.api.errors import ConfigError, NotAuthorized

ECHELON = str(Path(sys.executable).with_name("echelon"))
NOT_YOURS = (401, {}, answer_for(NotAuthorized("Incorrect API key provided: ********.")).body)


def keys(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [ECHELON, "keys", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


def test_add_list_revoke(tmp_path: Path) -> None:
    file = tmp_path / "keys.yaml"
    made = keys("add", "--owner", "anna", "--tier", "gold", "--models", "demo, other", file)
    assert made.returncode == 0, made.stderr
    key = made.stdout.strip()
    assert re.fullmatch(r"ek-[A-Za-z0-9_-]{43}", key)
    assert key not in made.stderr + file.read_text()
    anna = parse_keys(read_key_file(file), "").identity(key.encode())
    assert (anna.owner, anna.tier, anna.models) == ("anna", "gold", {"demo", "other"})
    assert keys("add", "--owner", "ben", file).returncode == 0
    listed = keys("list", file).stdout.splitlines()
    assert [line.split()[1:] for line in listed] == [
        ["good", "anna", "gold", "demo,other"],
        ["good", "ben", "-", "all", "models"],
    ]
    gone = keys("revoke", file, listed[0].split()[0])
    assert "anna is revoked" in gone.stdout
    assert "revoked  anna" in keys("list", file).stdout
    with pytest.raises(NotAuthorized, match="revoked"):
        parse_keys(read_key_file(file), "").identity(key.encode())
    wrong = keys("revoke", file, "0123456789")
    assert (wrong.returncode, "0 keys" in wrong.stderr) == (1, True)


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with FakeServer() as s:
        yield s


def test_a_batch_whose_key_is_refused_stops_and_can_go_on(server: FakeServer, tmp_path: Path) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps({"prompt": f"{i}"}) + "\n" for i in range(20)))
    answered: list[int] = []

    def refuse(body: object, times: int) -> tuple[int, dict[str, str], bytes] | None:
        answered.append(1)
        return NOT_YOURS if len(answered) > 5 else None

    server.refuse = refuse
    options = BatchOptions(source, target, server.url, concurrency=2)
    with pytest.raises(Unreachable, match=r"Incorrect API key(.|\n)*ECHELON_API_KEY(.|\n)*5 of 20 lines are done"):
        run_batch(options)
    assert len(target.read_text().splitlines()) == 5
    server.refuse = lambda body, times: None
    assert run_batch(options) == 0
    statuses = [json.loads(line)["response"]["status_code"] for line in target.read_text().splitlines()]
    assert statuses == [200] * 20


def test_chat_says_what_is_missing(server: FakeServer) -> None:
    answers = RemoteAnswers(Server.parse(server.url), None, None)
    server.refuse = lambda body, times: NOT_YOURS
    with pytest.raises(NoAccess, match=r"ECHELON_API_KEY"):
        list(answers.stream([{"role": "user", "content": "hi"}]))


@pytest.mark.parametrize("key", ["ek ey", "ek\n", "schlüssel", "k\x00"])
def test_what_is_no_key_is_not_sent_nor_shown(key: str) -> None:
    with pytest.raises(ConfigError) as e:
        Server.parse("http://127.0.0.1:1/v1", key)
    assert key not in str(e.value)
    assert "secret" not in repr(Server.parse("http://127.0.0.1:1/v1", "secret"))


def test_the_first_key_follows_from_the_secret() -> None:
    assert first_key("a") == first_key("a") != first_key("b")
    assert "a" * 32 not in first_key("a" * 32)
