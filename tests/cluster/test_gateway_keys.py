"""Keys on the way by Ray handles: the gateway, called as Ray would call it, in this process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cluster.access import first_key
from cluster.client import Handle
from cluster.config import ClusterConfig, HttpSection
from cluster.gateway_actor import Gateway, Served
from router.generation import ChoiceDelta, GenerationRequest, Sink
from router.keys.edit import add_key, revoke_key
from router.keys.ring import make_key
from router.service import Service
from workers.api.errors import ModelNotFound, NotAuthorized
from workers.api.request import Delta, FinishReason


class OneToken:
    """A `Generator` of one token; `asked` tells for whom."""

    def __init__(self) -> None:
        self.asked: list[GenerationRequest] = []

    async def generate(self, request: GenerationRequest, sink: Sink) -> None:
        self.asked.append(request)
        sink((ChoiceDelta(0, Delta(request.id, 0, (5,), finish=FinishReason.LENGTH)),))


class Method:
    """A method of an actor; `remote` gives what `ray.get` would await."""

    def __init__(self, method: Any) -> None:
        self.remote = method

    def options(self, **_: Any) -> Method:
        return self


class Actor:
    """A gateway as an actor's handle shows it."""

    def __init__(self, gateway: Gateway) -> None:
        self.generate, self.reply, self.models = map(Method, (gateway.generate, gateway.reply, gateway.models))


def gateway_with(generator: OneToken, keys: Path | None) -> Gateway:
    gateway = Gateway(Served(ClusterConfig(http=HttpSection(api_keys=keys and str(keys))), "secret", {"demo": "v1"}))
    gateway._service = Service(gateway._models, generator)
    return gateway


async def test_without_keys_everybody_is_the_default_owner() -> None:
    generator = OneToken()
    actor = Actor(gateway_with(generator, None))
    for key in (None, "any"):
        await Handle(actor, key).generate.remote("x", max_tokens=1)
    assert [(r.owner, r.salt) for r in generator.asked] == [("default", b"")] * 2
    assert await Handle(actor).models.remote() == ("demo",)


async def test_with_keys_a_handle_is_its_owner(tmp_path: Path) -> None:
    keys, good, narrow = tmp_path / "keys.yaml", make_key(), make_key()
    entry = add_key(keys, good, "anna", tier="gold")
    add_key(keys, narrow, "ben", models=["other"])
    generator = OneToken()
    gateway = gateway_with(generator, keys)
    actor = Actor(gateway)
    mine = Handle(actor, good)
    assert (await mine.generate.options(name="x").remote("x", max_tokens=1)).token_ids == (5,)
    body = json.dumps({"model": "demo", "prompt": "x", "max_tokens": 1}).encode()
    assert (await mine.reply.remote("/v1/completions", body)).status == 200
    assert [(r.owner, r.tier, r.salt) for r in generator.asked] == [("anna", "gold", b"anna")] * 2
    for key in (None, "", make_key(), "schlüssel\ud800"):
        stranger = Handle(actor, key)
        with pytest.raises(NotAuthorized):
            await stranger.generate.remote("x", max_tokens=1)
        with pytest.raises(NotAuthorized):
            await stranger.models.remote()
        refusal = await stranger.reply.remote("/v1/completions", body)
        assert refusal.status == 401
        assert not key or key.encode(errors="replace") not in refusal.body
    with pytest.raises(ModelNotFound):
        await Handle(actor, narrow).generate.remote("x", max_tokens=1)
    assert await Handle(actor, narrow).models.remote() == ()
    assert await Handle(actor, first_key("secret")).models.remote() == ("demo",)
    assert len(generator.asked) == 2
    revoke_key(keys, entry.id)
    gateway._keys.look()  # type: ignore[attr-defined]
    with pytest.raises(NotAuthorized, match="revoked"):
        await mine.generate.remote("x", max_tokens=1)
    gateway._keys.close()  # type: ignore[attr-defined]


def test_a_handle_does_not_show_its_key() -> None:
    handle = Handle(Actor.__new__(Actor), "ek-secret")
    assert "secret" not in repr(handle)
