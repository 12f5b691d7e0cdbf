"""A chat template that comes with a request: whose is taken, what it may do, and that few are kept.

Mutants seen to fail: templates of all taken; templates kept without end; one in use put out; the model's name left out
of what a template is known by; the failure's param.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from dataclasses import replace

import httpx
import pytest

from router.http.app import create_app
from router.http.config import FrontConfig, ServedModel
from router.http.identity import Identity
from router.text.offload import TextPool
from router.text.request_templates import LIMITS, RequestTemplates
from router.text.templates import Conversation
from workers.api.errors import InvalidRequest, Overloaded

from .conftest import base_of
from .fakes import SPECIALS
from .test_bad_inputs import CHAT
from .test_more_parameters import HI

SHOUT = "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.content | upper }}{% endfor %}"
HELLO = Conversation([{"role": "user", "content": "hello"}])
QUICK = replace(LIMITS, cpu_seconds=0.3, characters=1_000_000)


def runs(pid):
    return os.path.exists(f"/proc/{pid}")


class Somebody:
    """Whoever asks is this one."""

    def __init__(self, **rights):
        self._identity = Identity("anna", **rights)

    def resolve(self, headers, client):
        return self._identity


@contextlib.asynccontextmanager
async def front(tokenizer, generator, status, *, trusts=False, **rights):
    config = FrontConfig(trust_request_chat_template=trusts)
    models = [ServedModel("m", tokenizer, 256), ServedModel("base", base_of(tokenizer), 256)]
    app = create_app(config, models, generator, status, identity=Somebody(**rights))
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://front", timeout=60) as client,
    ):
        yield client


@pytest.fixture
async def templates():
    found = RequestTemplates(2, QUICK)
    yield found
    pids = found.pids
    found.close()
    await asyncio.sleep(0)
    assert not [pid for pid in pids if runs(pid)]


@pytest.fixture
def pool():
    pool = TextPool(1)
    yield pool
    pool.close()


async def test_an_admin_brings_one(tokenizer, generator, status):
    async with front(tokenizer, generator, status, admin=True) as client:
        said = {**HI, "messages": [{"role": "user", "content": f"hi {SPECIALS[2]}"}], "chat_template": SHOUT}
        for model in ("m", "base"):  # which has none of its own
            answer = await client.post(CHAT, json=said | {"model": model, "max_tokens": 2})
            assert answer.status_code == 200, answer.text
        ids = generator.requests[0].prompt_ids
        special = [tokenizer.encode(s)[0] for s in SPECIALS]
        assert tokenizer.decode(ids, skip_special_tokens=False) == f"{SPECIALS[0]}{SPECIALS[1]}HI {SPECIALS[2]}"
        assert [i for i in ids if i in special] == special[:2]
        tokens = (
            await client.post("/tokenize", json={k: said[k] for k in ("model", "messages", "chat_template")})
        ).json()
        assert tokens["tokens"] == list(ids)
        plain = await client.post("/tokenize", json={"model": "m", "prompt": "x", "chat_template": SHOUT})
        assert plain.json()["error"]["param"] == "chat_template"


@pytest.mark.parametrize("path", [CHAT, "/tokenize"])
async def test_others_may_where_the_configuration_says_so(tokenizer, generator, status, path):
    body = {"model": "m", "messages": HI["messages"], "chat_template": SHOUT}
    async with front(tokenizer, generator, status) as client:
        answer = await client.post(path, json=body)
        error = answer.json()["error"]
        assert (answer.status_code, error["param"], error["code"]) == (403, "chat_template", "admin_only")
        assert not generator.requests
        assert (await client.post(path, json=body | {"chat_template": None})).status_code == 200
    async with front(tokenizer, generator, status, trusts=True) as client:
        assert (await client.post(path, json=body)).status_code == 200


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("{% for %}", "messages: it does not compile: "),
        ("{{ 'a' | nofilter }}", "does not compile"),
        ("{{ messages[0].a.b }}", "UndefinedError"),
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "of CPU time"),
        ("{{ 'a' * 10 ** 9 }}", "too much memory"),
        ("{{ ''.__class__.__mro__ }}", "SecurityError"),
        ("{{ 'a' * 1000001 }}", "characters"),
    ],
    ids=["syntax", "filter", "undefined", "loop", "memory", "sandbox", "long"],
)
async def test_one_that_fails_is_named(templates, pool, tokenizer, source, says, caplog):
    with pytest.raises(InvalidRequest, match=says) as refused:
        await templates.encode("m", tokenizer, source, HELLO, pool, limit=256)
    assert (refused.value.param, refused.value.code) == ("chat_template", "chat_template_failed")
    good = await templates.encode("m", tokenizer, SHOUT, HELLO, pool, limit=256)
    assert tokenizer.decode(good) == "HELLO"
    assert not caplog.records  # anybody could fill the log


async def test_one_that_refuses_the_messages_says_so_of_them(templates, pool, tokenizer):
    with pytest.raises(InvalidRequest, match="not today") as refused:
        await templates.encode("m", tokenizer, "{{ raise_exception('not today') }}", HELLO, pool, limit=256)
    assert (refused.value.param, refused.value.code) == ("messages", None)


async def test_few_are_kept(templates, pool, tokenizer):
    seen = set()
    for i in range(4):
        source = SHOUT + f"{i}"
        for _ in range(2):
            ids = await templates.encode("m", tokenizer, source, HELLO, pool, limit=256)
            assert tokenizer.decode(ids) == f"HELLO{i}"
            assert len(templates.pids) <= 2
            seen.update(templates.pids)
    assert len(seen) == 4  # a process each, for both conversations
    await templates.encode("other", tokenizer, SHOUT + "3", HELLO, pool, limit=256)
    assert len({*seen, *templates.pids}) == 5  # another model has other special tokens


async def test_one_that_is_in_use_is_not_put_out(templates, pool, tokenizer):
    busy = "{% for a in range(9999) %}{% for b in range(99) %}{% endfor %}{% endfor %}{{ messages[0].content }}"
    sources = [busy + str(i) for i in range(3)]

    async def ask(source):
        return await templates.encode("m", tokenizer, source, HELLO, pool, limit=256)

    first = [asyncio.create_task(ask(source)) for source in sources[:2]]
    await asyncio.sleep(0)
    with pytest.raises(Overloaded):
        await ask(sources[2])
    assert [tokenizer.decode(await one) for one in first] == ["hello0", "hello1"]
    assert tokenizer.decode(await ask(sources[2])) == "hello2"
