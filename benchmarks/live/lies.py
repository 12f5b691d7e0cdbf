"""The tries of G7: requests that say in body, headers, query or key to be somebody else's."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

NAMES = (
    *("vip", "rich", "anna", "root", "nobody", "default", "Platinum", "VIP", "vip ", " vip", "../vip", "ben/../vip"),
    *("ben\u0000vip", "ben\nvip", "ｖip", "v\u0131p", "vip\u202e", '{"id":"vip"}', "vip,ben", "*", "", "x" * 256),
)
FIELDS = ("user_id", "user", "owner", "tier", "api_key", "account", "sub", "salt", "group", "user_group", "identity")
SHAPES: tuple[Any, ...] = (["vip"], {"id": "vip"}, {"user_id": "vip"}, 0, True, None, 1e308)
MORE: tuple[dict[str, Any], ...] = (
    {"metadata": {"user_id": "vip", "tier": "Platinum"}}, {"safety_identifier": "vip"}, {"prompt_cache_key": "vip"},
    {"service_tier": "priority"}, {"service_tier": "Platinum"}, {"service_tier": "flex"}, {"priority": -1},
    {"priority": 10**9}, {"quota_pct": 100}, {"cache_salt": "vip"}, {"request_id": "VIP-ID"}, {"session_id": 1},
    {"extra_body": {"user_id": "vip"}}, {"user_id": "vip", "user": "rich"}, {"USER_ID": "vip"}, {"user_id ": "vip"},
    {"accepted": True}, {"resumed_ids": [1, 2]}, {"age": 1e9}, {"lease_id": "VIP-ID"}, {"model": "demo@vip"},
)  # fmt: skip
HEADERS = (
    *(
        "x-user-id",
        "x-user",
        "x-owner",
        "x-tier",
        "x-api-key",
        "api-key",
        "x-forwarded-user",
        "x-remote-user",
        "remote-user",
    ),
    *(
        "openai-organization",
        "openai-project",
        "x-echelon-edge",
        "x-echelon-user",
        "x-priority",
        "serve-multiplexed-model-id",
    ),
    *(
        "x-forwarded-for",
        "forwarded",
        "x-real-ip",
        "via",
        "proxy-authorization",
        "x-original-url",
        "x-http-method-override",
    ),
)
ROUTES = ("/v1/completions", "/v1/completions_qos", "/v1/chat/completions", "/v1/chat/completions_qos")
FOR_ADMINS = (
    ("GET", "/metrics", None), ("GET", "/nodes/status", None), ("POST", "/nodes/add", {"url": "http://127.0.0.1:9/v1"}),
    ("POST", "/nodes/remove", {"url": "http://127.0.0.1:9/v1"}), ("GET", "/METRICS", None), ("GET", "//metrics", None),
    ("GET", "/metrics/", None), ("GET", "/%6detrics", None), ("GET", "/health/../metrics", None),
    ("GET", "/health/live/../../metrics", None), ("GET", "/-/routes", None),
)  # fmt: skip


@dataclass
class Try:
    """One request of the impostor's; `data` None: a GET."""

    what: str
    path: str
    data: bytes | None = None
    headers: tuple[tuple[str, str], ...] = ()
    method: str = ""
    keyed: bool = True  # with the impostor's own key


def _base(path: str) -> dict[str, Any]:
    base: dict[str, Any] = {"model": "demo", "max_tokens": 1}
    return base | ({"messages": [{"role": "user", "content": "hi"}]} if "chat" in path else {"prompt": "hi"})


def requests() -> Iterator[Try]:
    """Generating requests that lie in body, headers or query."""
    for path in ROUTES:
        base = _base(path)

        def body(more: dict[str, Any], base: dict[str, Any] = base) -> bytes:
            return json.dumps({**base, **more}).encode()

        lies = [{f: name} for f, name in itertools.product(FIELDS[:2], NAMES)]
        lies += [{f: name} for f, name in itertools.product(FIELDS[2:], ("vip", "Platinum"))]
        lies += [{f: shape} for f, shape in itertools.product(FIELDS[:2], SHAPES)]
        for lie in (*lies, *MORE):
            yield Try(f"body {lie}", path, body(lie))
        plain = body({})
        for twice in (b'"user_id": "x", "user_id": "vip"', b'"user": "x", "user": "vip"', b'"user_id": "\\u0076ip"'):
            yield Try(f"body {twice!r}", path, plain[:-1] + b", " + twice + b"}")
        for name in HEADERS:
            for value in ("vip", "Platinum", "127.0.0.1", "for=127.0.0.1;user=vip"):
                yield Try(f"header {name}: {value}", path, plain, ((name, value),))
        yield Try("cookie", path, plain, (("cookie", "user_id=vip; tier=Platinum"),))
        for query in ("user_id=vip", "user=vip&tier=Platinum", "api_key=vip", "route=/v1/completions_qos&user_id=vip"):
            yield Try(f"query {query}", f"{path}?{query}", plain)


def credentials(keys: dict[str, str]) -> Iterator[Try]:
    """Keys that are nobody's, made of what may be known of the vip's. No more than the guard against floods allows."""
    digest = hashlib.sha256(keys["vip"].encode()).hexdigest()
    plain = json.dumps(_base(ROUTES[0])).encode()
    guesses = (
        "vip",
        digest,
        digest[:12],
        keys["vip"][:-1],
        keys["vip"].swapcase(),
        keys["vip"] + "\u00e9",
        keys["ben"] + ",vip",
    )
    for guess in guesses:
        header = ("authorization", f"Bearer {guess}")
        yield Try(f"key {guess[:6]}...", ROUTES[0], plain, (header,), keyed=False)
    yield Try("no key", ROUTES[1], json.dumps({**_base(ROUTES[1]), "user_id": "vip"}).encode(), keyed=False)
    yield Try("basic", ROUTES[0], plain, (("authorization", "Basic dmlwOnZpcA=="),), keyed=False)
    yield Try("two keys", ROUTES[0], plain, (("authorization", "Bearer vip"),))


def others(vip_id: str) -> Iterator[Try]:
    """What belongs to another one: the requests of the vip, its idempotency key, its cached prompt; the admins'."""
    for name in (vip_id, vip_id.upper(), f"{vip_id}/../{vip_id}", f"%2e%2e/{vip_id}", f"{vip_id}?owner=vip"):
        yield Try(f"GET {name}", f"/requests/{name}")
        yield Try(f"explain {name}", f"/requests/{name}/explain", headers=(("x-user-id", "vip"),))
    for method, path, fields in FOR_ADMINS:
        data = None if fields is None else json.dumps(fields).encode()
        yield Try(f"{method} {path}", path, data, (("x-admin", "true"), ("x-forwarded-for", "127.0.0.1")), method)
