"""`*_qos` routes and `user`: who a request counts for, and that no body, header or path makes it another one (G7).

Mutants seen to fail: `called` believing `user_id` with keys; the tier or the models taken from a body; "default" taken.
"""

from __future__ import annotations

import json

import pytest

from router.http.app import create_app
from router.http.config import FrontConfig, ServedModel
from router.http.identity import NoKeys
from router.keys.resolver import KeyResolver
from router.keys.ring import KeyEntry, KeyRing, digest_of, make_key
from router.qos.config import QosConfig
from router.qos.file import make_qos_config
from router.qos.source import parse_source

from .fakes import FakeStatus
from .test_access import bearer, call
from .test_bad_inputs import CHAT, COMPLETION, INTERACTIVE

CHAT_QOS, COMPLETION_QOS, INTERACTIVE_QOS = f"{CHAT}_qos", f"{COMPLETION}_qos", f"{INTERACTIVE}_qos"
# As LMDeploy's document shows them, but for the model.
DOCUMENTED_CHAT = {
    "model": "m", "messages": "Hello,Hello", "temperature": 0.7, "top_p": 1, "n": 1, "max_tokens": 100, "stop": False,
    "stream": False, "presence_penalty": 0, "frequency_penalty": 0, "repetition_penalty": 1, "session_id": -1,
    "ignore_eos": False, "user_id": "user_id0",
}  # fmt: skip
DOCUMENTED_COMPLETION = {
    "model": "m", "prompt": "Hello,Hello", "suffix": "string", "temperature": 0.7, "n": 1, "max_tokens": 16,
    "stop": "string", "stream": False, "top_p": 1, "repetition_penalty": 1, "session_id": -1, "ignore_eos": False,
    "user_id": "user_id0",
}  # fmt: skip
DOCUMENTED_INTERACTIVE = {
    "prompt": "Hello,Hello", "session_id": -1, "interactive_mode": False, "stream": False, "stop": False,
    "request_output_len": 100, "top_p": 0.8, "top_k": 40, "temperature": 0.8, "repetition_penalty": 1,
    "ignore_eos": False, "user_id": "user_id0",
}  # fmt: skip
HI = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
TEXT = {"model": "m", "prompt": "hi", "max_tokens": 2}
ASK = {"model": "m", "prompt": "hi", "request_output_len": 2}
GOLD, BRONZE = make_key(), make_key()
TIERS = """
user_groups: [Platinum, Gold, Bronze]
user_group_map:
  Platinum: [{id: vip, quota_pct: 100}, {id: default, quota_pct: 0}]
  Gold: [{id: anna, quota_pct: 60}, {id: rich, quota_pct: 40}]
  Bronze: [{id: cheap, quota_pct: 10}, {id: default, quota_pct: 90}]
"""


@pytest.fixture
def models(tokenizer):
    return [ServedModel("m", tokenizer, 256), ServedModel("secret", tokenizer, 256)]


@pytest.fixture
def keyless(models, generator):
    return create_app(FrontConfig(), models, generator, FakeStatus(), identity=NoKeys(loopback_only=False))


@pytest.fixture
def keyed(models, generator):
    ring = KeyRing(
        KeyEntry(digest_of(key.encode()), owner, tier, frozenset({"m"}))
        for key, owner, tier in ((GOLD, "anna", "Gold"), (BRONZE, "ben", "Bronze"))
    )
    return create_app(FrontConfig(), models, generator, FakeStatus(), identity=KeyResolver(ring))


def body(fields: dict[str, object]) -> bytes:
    return json.dumps(fields).encode()


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        (CHAT_QOS, DOCUMENTED_CHAT),
        (COMPLETION_QOS, DOCUMENTED_COMPLETION),
        (INTERACTIVE_QOS, DOCUMENTED_INTERACTIVE | {"model": "m"}),
    ],
    ids=["chat", "text", "interactive"],
)
async def test_documented_bodies_as_they_stand(keyless, generator, path, fields):
    answer = await call(keyless, path=path, body=body(fields), client="127.0.0.1")
    assert answer.status == 200, answer.body
    shown = json.loads(answer.body)
    assert (shown["tokens"] if path == INTERACTIVE_QOS else shown["usage"]["completion_tokens"]) > 1
    (request,) = generator.requests
    assert (request.owner, request.tier, request.salt, request.sub) == ("user_id0", "", b"user_id0", "")


async def test_a_string_of_messages_is_one_message_of_a_user(keyless, generator):
    for messages in ("hi", HI["messages"]):
        await call(keyless, path=CHAT_QOS, body=body({**HI, "messages": messages}), client="127.0.0.1")
    first, second = generator.requests
    assert first.prompt_ids == second.prompt_ids
    plain = await call(keyless, path=CHAT, body=body({**HI, "messages": "hi"}), client="127.0.0.1")
    assert (plain.status, plain.error["param"]) == (400, "messages")


@pytest.mark.parametrize(
    ("path", "fields"),
    [(CHAT_QOS, HI), (COMPLETION_QOS, TEXT), (INTERACTIVE_QOS, ASK)],
    ids=["chat", "text", "interactive"],
)
@pytest.mark.parametrize("user_id", ["default", "", "a\nb", "x" * 257, 7, ["vip"], {"id": "vip"}, True])
async def test_user_ids_that_nobody_has(keyless, generator, path, fields, user_id):
    answer = await call(keyless, path=path, body=body({**fields, "user_id": user_id}), client="127.0.0.1")
    assert (answer.status, answer.error["param"]) == (400, "user_id")
    assert not generator.requests


async def test_user_id_is_unknown_to_the_plain_routes(keyless):
    for path, fields in ((CHAT, HI), (COMPLETION, TEXT), (INTERACTIVE, ASK)):
        answer = await call(keyless, path=path, body=body({**fields, "user_id": "vip"}), client="127.0.0.1")
        assert (answer.status, answer.error["code"]) == (400, "unknown_parameter")


@pytest.mark.parametrize(
    ("path", "more", "owner", "sub"),
    [
        (CHAT_QOS, {"user_id": "vip"}, "vip", ""),
        (CHAT_QOS, {"user_id": "vip", "user": "u"}, "vip", "u"),
        (CHAT_QOS, {"user_id": None}, "default", ""),
        (CHAT_QOS, {}, "default", ""),
        (CHAT, {"user": "u"}, "default", "u"),
    ],
)
async def test_without_keys(keyless, generator, path, more, owner, sub):
    """This machine is believed; who comes from elsewhere (--no-auth) only divides what all of them have."""
    await call(keyless, path=path, body=body({**HI, **more}), client="127.0.0.1")
    await call(keyless, path=path, body=body({**HI, **more}), client="10.0.0.7")
    near, far = generator.requests
    assert (near.owner, near.sub) == (owner, sub)
    assert (far.owner, far.salt, far.sub) == ("default", b"", more.get("user_id") or more.get("user") or "")


NAMES = ["vip", "rich", "anna", "cheap", "nobody", "Platinum", "anna\u0000vip", "anna/vip", "../vip", "ANNA", "ａnna"]
SPOOFS = [
    *([{field: name} for field in ("user_id", "user") for name in NAMES]),
    *([{"user_id": "vip", "user": "rich"}, {"safety_identifier": "vip"}, {"metadata": {"user_id": "vip"}}]),
    *([{field: "vip"} for field in ("owner", "tier", "api_key", "sub", "salt", "group", "user_group", "identity")]),
    *([{"service_tier": tier} for tier in ("priority", "Platinum", "auto")]),
    *([{"priority": -1}, {"quota_pct": 100}, {"cache_salt": "vip"}, {"request_id": "vip"}, {"session_id": 1}]),
]
HEADERS = [
    (b"x-user-id", b"vip"), (b"x-owner", b"vip"), (b"x-tier", b"Platinum"), (b"openai-organization", b"vip"),
    (b"openai-project", b"vip"), (b"x-api-key", b"vip"), (b"api-key", b"vip"), (b"cookie", b"user=vip"),
    (b"x-forwarded-user", b"vip"), (b"x-forwarded-for", b"127.0.0.1"), (b"x-echelon-edge", b"guess"),
]  # fmt: skip


def rank(qos: QosConfig, owner: str, tier: str) -> tuple[int, float]:
    account = qos.account(owner, tier)
    return account.tier.rank, -account.quota


async def test_spoofs(keyed, generator):
    """Whatever it says, a request counts for its key's owner, and where that stands in the configuration."""
    qos = make_qos_config(parse_source(TIERS, "f", as_json=False))
    trials = escalations = 0
    for key, owner, tier in ((GOLD, "anna", "Gold"), (BRONZE, "ben", "Bronze")):
        for path, base in (
            *((CHAT, HI), (CHAT_QOS, HI), (COMPLETION, TEXT), (COMPLETION_QOS, TEXT)),
            *((INTERACTIVE, ASK), (INTERACTIVE_QOS, ASK)),
        ):
            tries = [(more, []) for more in SPOOFS] + [({}, [header]) for header in HEADERS]
            tries.append(({"user_id": "vip"} if path.endswith("_qos") else {"user": "vip"}, HEADERS[:4]))
            for more, headers in tries:
                trials += 1
                before = len(generator.requests)
                answer = await call(
                    keyed,
                    [bearer(key), *headers],
                    path=path,
                    body=body({**base, **more}),
                    query_string=b"user_id=vip&api_key=vip",
                )
                taken = generator.requests[before:]
                assert answer.status == (200 if taken else 400), (more, headers, answer.body)
                for request in taken:
                    assert (request.owner, request.tier) == (owner, tier)
                    assert request.salt.startswith(owner.encode()) or request.salt[4:].startswith(owner.encode())
                    escalations += rank(qos, request.owner, request.tier) < rank(qos, owner, tier)
    assert trials > 250
    assert escalations == 0
    assert {r.sub for r in generator.requests} >= {"", "vip", "rich", "cheap", "anna/vip"}


@pytest.mark.parametrize("path", [CHAT_QOS, COMPLETION_QOS, INTERACTIVE_QOS])
async def test_a_spoof_needs_a_key_all_the_same(keyed, generator, path):
    fields = {**(HI if path == CHAT_QOS else TEXT if path == COMPLETION_QOS else ASK), "user_id": "vip"}
    assert (await call(keyed, path=path, body=body(fields), client="127.0.0.1")).status == 401
    hidden = await call(keyed, [bearer(GOLD)], path=path, body=body({**fields, "model": "secret"}))
    assert (hidden.status, hidden.error["code"]) == (404, "model_not_found")
    assert not generator.requests
