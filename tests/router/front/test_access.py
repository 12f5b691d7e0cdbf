"""Section A of bad input: keys. Every case runs beside a stream with a good key, which ends as if it were alone."""

from __future__ import annotations

import asyncio
import json
import logging
import re
from dataclasses import dataclass, field

import httpx
import pytest
from starlette.datastructures import Headers

from router.http.app import create_app
from router.http.config import FrontConfig, ServedModel
from router.http.gate import OPEN_PATHS
from router.http.identity import NoKeys, require_admin
from router.keys.floods import FloodGuard
from router.keys.resolver import LOG_SECONDS, KeyResolver
from router.keys.ring import KeyEntry, KeyRing, digest_of, make_key
from router.protocol.errors import HttpRefusal
from workers.api.hashing import block_hashes

from .fakes import ANSWER, FakeStatus, all_routes
from .test_bad_inputs import CHAT, COMPLETION

GOOD, OTHER, SAME_OWNER, NARROW, REVOKED, STRANGER, ADMIN = (make_key() for _ in range(7))
KEYS = (GOOD, OTHER, SAME_OWNER, NARROW, REVOKED, STRANGER, ADMIN)
HI = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
BASE = json.dumps(HI).encode()


def entry(key: str, owner: str, **more) -> KeyEntry:
    return KeyEntry(digest_of(key.encode()), owner, **more)


ENTRIES = (
    entry(GOOD, "anna", tier="gold"),
    entry(SAME_OWNER, "anna"),
    entry(OTHER, "ben"),
    entry(NARROW, "carl", models=frozenset({"org/base"})),
    entry(REVOKED, "anna", revoked=True),
    entry(ADMIN, "olga", admin=True),
)


class Changing:
    """Keys that a test may change while requests run."""

    def __init__(self) -> None:
        self.ring = KeyRing(ENTRIES)

    def identity(self, key):
        return self.ring.identity(key)


class Seconds:
    """A clock that stands still until it is moved."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def keys() -> Changing:
    return Changing()


@pytest.fixture
def clock() -> Seconds:
    return Seconds()


@pytest.fixture
def guard(clock) -> FloodGuard:
    return FloodGuard(burst=5, rate=0.5, clock=clock)


@pytest.fixture
def models(tokenizer):
    return [ServedModel("m", tokenizer, 256), ServedModel("org/base", tokenizer, 256)]


@pytest.fixture
def app(models, generator, keys, guard, clock):
    generator.pause = 0.001
    resolver = KeyResolver(keys, guard, clock=clock)
    return create_app(FrontConfig(), models, generator, FakeStatus(), identity=resolver)


@dataclass
class Answer:
    """What came back."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def error(self) -> dict[str, str | None]:
        shown = json.loads(self.body)
        assert set(shown) == {"error"}
        assert set(shown["error"]) == {"message", "type", "param", "code"}
        return shown["error"]


def bearer(key: str) -> tuple[bytes, bytes]:
    return (b"authorization", b"Bearer " + key.encode())


async def started_stream(app) -> asyncio.Task[Answer]:
    """A stream with a good key whose 200 has been sent."""
    started = asyncio.Event()
    body = json.dumps(HI | {"stream": True}).encode()
    task = asyncio.create_task(call(app, [bearer(GOOD)], body=body, started=started))
    await started.wait()
    return task


async def call(
    app, headers=(), *, path=CHAT, body=BASE, client="10.0.0.1", method="POST", started=None, **scope
) -> Answer:
    """One request, with headers and scope as a server would hand them over, byte for byte."""
    messages = []
    asked = iter([{"type": "http.request", "body": body}])

    async def receive():
        message = next(asked, None)
        if message is None:
            await asyncio.Event().wait()
        return message

    async def send(message):
        messages.append(message)
        if started is not None:
            started.set()

    whole = {
        "type": "http",
        "method": method,
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "headers": [(b"content-type", b"application/json"), *headers],
        "client": (client, 1) if client else None,
        "server": ("127.0.0.1", 80),
        "scheme": "http",
        "http_version": "1.1",
        "root_path": "",
        **scope,
    }
    await app(whole, receive, send)
    start = messages[0]
    sent = {k.decode(): v.decode() for k, v in start["headers"]}
    return Answer(start["status"], sent, b"".join(m.get("body", b"") for m in messages[1:]))


@dataclass
class Case:
    name: str
    status: int
    headers: list[tuple[bytes, bytes]] = field(default_factory=list)
    code: str | None = None
    says: str = ""
    path: str = CHAT
    scope: dict = field(default_factory=dict)


AUTH = b"authorization"
WRONG = {"status": 401, "code": "invalid_api_key"}
CASES = [
    Case("no header", 401, says="API key"),
    Case("empty header", 401, [(AUTH, b"")]),
    Case("empty key", 401, [(AUTH, b"Bearer ")]),
    Case("scheme alone", 401, [(AUTH, b"Bearer")]),
    Case("wrong key", headers=[bearer(STRANGER)], says=f"{STRANGER[:4]}********{STRANGER[-4:]}", **WRONG),
    Case("short wrong key", headers=[bearer("none")], says=": ********.", **WRONG),
    Case("one character less", headers=[bearer(GOOD[:-1])], **WRONG),
    Case("one character more", headers=[bearer(GOOD + "x")], **WRONG),
    Case("other case", headers=[bearer(GOOD.swapcase())], **WRONG),
    Case("hash for key", headers=[bearer(digest_of(GOOD.encode()).hex())], **WRONG),
    Case("basic", 401, [(AUTH, b"Basic " + GOOD.encode())]),
    Case("no scheme", 401, [(AUTH, GOOD.encode())]),
    Case("lower case scheme", 200, [(AUTH, b"bearer " + GOOD.encode())]),
    Case("upper case scheme", 200, [(AUTH, b"BEARER " + GOOD.encode())]),
    Case("two spaces", 200, [(AUTH, b"Bearer  " + GOOD.encode())]),
    Case("space and tab after it", 200, [(AUTH, b"Bearer " + GOOD.encode() + b" \t")]),
    Case("tab between", 401, [(AUTH, b"Bearer\t" + GOOD.encode())]),
    Case("a space within", headers=[bearer(GOOD[:9] + " " + GOOD[9:])], **WRONG),
    Case("two keys in one header", headers=[(AUTH, b"Bearer " + GOOD.encode() + b", Bearer x")], **WRONG),
    Case("good and bad", 401, [bearer(GOOD), bearer(STRANGER)]),
    Case("bad and good", 401, [bearer(STRANGER), bearer(GOOD)]),
    Case("good twice", 401, [bearer(GOOD), bearer(GOOD)]),
    Case("1 MB", 431, [(AUTH, b"Bearer " + b"k" * (1 << 20))]),
    Case("1 MB elsewhere", 431, [bearer(GOOD), (b"x", b"k" * (1 << 20))]),
    Case("1,000 headers", 431, [bearer(GOOD), *((b"x-%d" % i, b"") for i in range(1000))]),
    Case("0x80 to 0xff", headers=[(AUTH, b"Bearer " + bytes(range(0x80, 0x100)))], says="????********????", **WRONG),
    Case("good key and 0xff", headers=[(AUTH, b"Bearer " + GOOD.encode() + b"\xff")], **WRONG),
    Case("NUL", headers=[(AUTH, b"Bearer " + GOOD.encode() + b"\0")], **WRONG),
    Case("in the query", 401, scope={"query_string": b"api_key=" + GOOD.encode()}),
    Case("in the query as token", 401, scope={"query_string": b"access_token=" + GOOD.encode()}),
    Case("in a header of others", 401, [(b"x-api-key", GOOD.encode()), (b"api-key", GOOD.encode())]),
    Case("in a cookie", 401, [(b"cookie", b"authorization=Bearer " + GOOD.encode())]),
    Case("revoked", headers=[bearer(REVOKED)], says="revoked", **WRONG),
    Case("no right to the model", 404, [bearer(NARROW)], "model_not_found"),
    Case("host with a path", 401, [(b"host", b"x/v1/models?")]),
    Case("host is a health route", 401, [(b"host", b"x/health?")]),
    *(
        Case(f"path {path}", 401, path=path)
        for path in (
            "//v1/chat/completions", "/v1/../v1/chat/completions", "/V1/chat/completions", "/v1/chat/completions/",
            "/v1/chat%2Fcompletions", "/health/../v1/models", "/health/", "//health", "/Health", "/health/live/",
            "/health/live/v1/models", "/health\x00", "/health?x", "/health#", "", "*", "/docs", "/openapi.json",
            "/metrics", "/docs/oauth2-redirect", "/redoc", "/v1/nope", "http://x/health",
        )
    ),
    *(
        Case(f"root path {root}", 401, path=path, scope={"root_path": root})
        for root, path in (
            ("/health", "/health/v1/models"), ("/health", "/health" + CHAT), ("/v1", "/v1/health"),
            ("/health/live", CHAT), ("/", CHAT), (CHAT, CHAT + "/health"),
        )
    ),
    *(
        Case(name, 401, [(name.encode(), b"/health")])
        for name in (
            "x-forwarded-prefix", "x-original-url", "x-rewrite-url", "x-forwarded-path", "x-forwarded-uri",
        )
    ),
    Case("x-forwarded-for", 401, [(b"x-forwarded-for", b"127.0.0.1"), (b"forwarded", b"for=127.0.0.1")]),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name.replace("\x00", "0"))
async def test_case_beside_a_stream(app, generator, case, caplog):
    caplog.set_level(logging.DEBUG)
    stream = await started_stream(app)
    assert generator.running == 1
    answer = await call(app, case.headers, path=case.path, **case.scope)
    assert answer.status == case.status, answer.body
    assert answer.headers["x-request-id"]
    if case.status != 200:
        error = answer.error
        assert error["type"] == "invalid_request_error"
        assert error["code"] == case.code
        assert error["param"] == ("model" if case.status == 404 else None)
        assert case.says in error["message"]
        assert len(error["message"]) < 200
        assert ("www-authenticate" in answer.headers) == (case.status == 401)
        assert len(generator.requests) == 1
    shown = (await stream).body.decode()
    assert shown.endswith("data: [DONE]\n\n")
    assert text_of(shown) == ANSWER
    after = await call(app, [bearer(GOOD)])
    assert json.loads(after.body)["choices"][0]["message"]["content"] == ANSWER
    assert generator.running == 0
    said = caplog.text + answer.body.decode() + str(answer.headers)
    assert not [k for k in KEYS if k in said or k[4:-4] in said]


def text_of(events: str) -> str:
    chunks = [json.loads(line[6:]) for line in events.splitlines() if line.startswith("data: {")]
    return "".join(c["choices"][0]["delta"].get("content") or "" for c in chunks)


async def test_every_route_but_health_asks_for_a_key(app, generator):
    seen = set()
    for route in all_routes(app.routes):
        path = re.sub(r"\{.*?\}", "m", route.path)
        for method in sorted(route.methods or ()):
            without = await call(app, path=path, method=method)
            assert without.status == (200 if path in OPEN_PATHS else 401), path
            seen.add(path)
    ours = {CHAT, COMPLETION, f"{CHAT}_qos", f"{COMPLETION}_qos", "/v1/models", "/v1/models/m", "/metrics"}
    ours |= {"/v1/chat/interactive", "/v1/chat/interactive_qos", "/generate"}
    ours |= {"/tokenize", "/detokenize", "/v1/encode", "/version"}
    assert seen >= {*OPEN_PATHS, *ours, "/requests/m", "/requests/m/explain", "/docs", "/openapi.json"}
    assert not generator.requests
    for path in ("/docs", "/openapi.json", "/v1/models"):
        assert (await call(app, [bearer(GOOD)], path=path, method="GET")).status == 200


async def test_metrics_are_for_admins(app):
    """They name every owner."""
    for key in (GOOD, NARROW):
        refused = await call(app, [bearer(key)], path="/metrics", method="GET")
        assert (refused.status, refused.error["code"]) == (403, "admin_only")
    assert (await call(app, [bearer(ADMIN)], path="/metrics", method="GET")).status == 200


@pytest.mark.parametrize(("client", "is_admin"), [("127.0.0.1", True), ("10.0.0.9", False), (None, True)])
def test_without_keys_loopback_is_admin(client, is_admin):
    who = NoKeys(loopback_only=False).resolve(Headers(), client)
    assert (who.metrics, who.admin) == (True, is_admin)
    if not is_admin:
        with pytest.raises(HttpRefusal) as e:
            require_admin(who)
        assert e.value.status == 403


@pytest.mark.parametrize(
    ("told", "origins", "fine"),
    [
        ({}, (), True),  # no browser
        ({"sec-fetch-site": "cross-site"}, (), True),  # a link that somebody followed
        ({"origin": "http://127.0.0.1:23333", "sec-fetch-site": "same-origin"}, (), True),
        ({"origin": "http://127.0.0.1:23333"}, (), True),  # a browser that does not tell the site
        ({"origin": "https://elsewhere.example", "sec-fetch-site": "cross-site"}, (), False),
        ({"origin": "http://127.0.0.1:8080", "sec-fetch-site": "same-site"}, (), False),
        ({"origin": "https://elsewhere.example"}, (), False),
        ({"origin": "null"}, (), False),
        ({"origin": "https://elsewhere.example", "sec-fetch-site": "cross-site"}, ("https://elsewhere.example",), True),
        ({"origin": "https://elsewhere.example", "sec-fetch-site": "cross-site"}, ("*",), True),
    ],
)
def test_without_keys_pages_of_other_sites_may_not_ask(told, origins, fine):
    headers = Headers({"host": "127.0.0.1:23333", **told})
    if fine:
        assert NoKeys(origins=origins).resolve(headers, "127.0.0.1").admin
        return
    with pytest.raises(HttpRefusal) as e:
        NoKeys(origins=origins).resolve(headers, "127.0.0.1")
    assert (e.value.status, e.value.code) == (403, "other_site")


@pytest.mark.parametrize("root", ["/health", "/health/live", "/health/ready"])
@pytest.mark.parametrize("path", sorted(OPEN_PATHS))
async def test_a_root_path_opens_nothing_but_health(app, path, root):
    """An open path minus any root path is a health route, or none."""
    answer = await call(app, path=path, method="GET", root_path=root)
    assert answer.status in (200, 404)
    if answer.status == 200:
        assert set(json.loads(answer.body)) == {"status", "replicas", "seconds_since_step"}


async def test_no_websocket_passes(app):
    sent = []

    async def receive():
        return {"type": "websocket.connect"}

    async def send(message):
        sent.append(message)

    scope = {"type": "websocket", "path": "/health", "headers": [], "query_string": b"", "root_path": ""}
    await app(scope, receive, send)
    assert sent == [{"type": "websocket.close", "code": 1008}]


async def test_a_flood_of_wrong_keys(app, clock, caplog):
    """Case 17: 401, then 429 with how long; good keys, missing ones and other addresses are answered as ever."""
    wrong = [bearer(STRANGER)]
    answers = [await call(app, wrong) for _ in range(1000)]
    assert [a.status for a in answers] == [401] * 5 + [429] * 995
    last = answers[-1]
    assert (last.headers["retry-after"], last.error["type"]) == ("2", "rate_limit_error")
    assert (await call(app, [bearer(GOOD)])).status == 200
    assert (await call(app)).status == 401
    assert (await call(app, wrong, client="10.0.0.2")).status == 401
    assert (await call(app, wrong, client="::ffff:10.0.0.1")).status == 429
    clock.now += 2.0
    assert [(await call(app, wrong)).status for _ in range(3)] == [401, 429, 429]
    assert [r.name for r in caplog.records].count("echelon.keys") == 1
    clock.now += LOG_SECONDS
    await call(app, wrong)
    assert "1005 wrong API keys" in caplog.records[-1].getMessage()


async def test_a_wall_clock_has_no_say(app, clock, monkeypatch):
    monkeypatch.setattr("time.time", lambda: 0.0)
    assert [(await call(app, [bearer(STRANGER)])).status for _ in range(6)] == [401] * 5 + [429]


def test_the_table_of_addresses_is_bounded(clock):
    guard = FloodGuard(burst=2, addresses=10, clock=clock)
    for host in range(100):
        assert guard.wrong(f"10.0.0.{host}") == 0.0
    assert len(guard) == 10
    assert [guard.wrong("2001:db8::1"), guard.wrong("2001:db8::2"), guard.wrong("2001:db8::3")] == [0.0, 0.0, 1.0]
    assert guard.wrong("2001:db8:0:1::1") == 0.0
    assert [guard.wrong(None), guard.wrong(None), guard.wrong(None) > 0] == [0.0, 0.0, True]


async def test_a_key_revoked_under_its_stream(app, generator, keys):
    """Case 11: what was accepted ends as it would have; the next request is refused."""
    stream = await started_stream(app)
    assert generator.running == 1
    keys.ring = KeyRing(entry(GOOD, "anna", revoked=True) for _ in range(1))
    refused = await call(app, [bearer(GOOD)])
    assert (refused.status, refused.error["code"]) == (401, "invalid_api_key")
    assert generator.running == 1
    shown = (await stream).body.decode()
    assert text_of(shown) == ANSWER
    assert shown.endswith("data: [DONE]\n\n")
    keys.ring = KeyRing(())  # the owner is gone altogether
    assert (await call(app, [bearer(GOOD)])).status == 401


async def test_a_key_sees_its_models_only(app, generator):
    """Case 12: what a key may not use is, for it, not there."""
    mine, others = [bearer(NARROW)], [bearer(GOOD)]
    listed = json.loads((await call(app, mine, path="/v1/models", method="GET")).body)["data"]
    assert [m["id"] for m in listed] == ["org/base"]
    assert len(json.loads((await call(app, others, path="/v1/models", method="GET")).body)["data"]) == 2
    hidden = await call(app, mine, path="/v1/models/m", method="GET")
    absent = await call(app, mine, path="/v1/models/x", method="GET")
    assert hidden.status == absent.status == 404
    assert hidden.body.replace(b"'m'", b"'x'") == absent.body
    body = {"prompt": "hi", "max_tokens": 3}
    refused = await call(app, mine, path=COMPLETION, body=json.dumps({"model": "m", **body}).encode())
    assert (refused.status, refused.error["code"]) == (404, "model_not_found")
    assert not generator.requests
    fine = await call(app, mine, path=COMPLETION, body=json.dumps({"model": "org/base", **body}).encode())
    assert fine.status == 200


async def test_the_owner_reaches_the_engine(app, generator):
    """Owner and tier are the key's; prefixes are shared by an owner's keys and by nobody else, whatever a body says."""
    bodies = [{}, {"cache_salt": "ben"}, {"user": "ben"}]
    for key in (GOOD, SAME_OWNER, OTHER):
        for more in bodies:
            await call(app, [bearer(key)], body=json.dumps(HI | {"max_tokens": 2} | more).encode())
    seen = generator.requests
    assert [(r.owner, r.tier) for r in seen] == [("anna", "gold")] * 3 + [("anna", "")] * 3 + [("ben", "")] * 3
    hashes = [block_hashes(r.prompt_ids, 4, salt=r.salt)[0] for r in seen]
    assert hashes[:3] == hashes[3:6]
    assert not set(hashes[:3]) & set(hashes[6:])
    page = (await call(app, [bearer(ADMIN)], path="/metrics", method="GET")).body.decode()
    assert 'user="anna"' in page
    assert 'user="ben"' in page


async def test_openai_client_with_keys(app):
    import openai

    async def models(key):
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://front/v1") as http:
            client = openai.AsyncOpenAI(base_url="http://front/v1", api_key=key, http_client=http, max_retries=0)
            return [m.id async for m in client.models.list()]

    assert await models(GOOD) == ["m", "org/base"]
    with pytest.raises(openai.AuthenticationError) as e:
        await models(STRANGER)
    assert e.value.code == "invalid_api_key"
