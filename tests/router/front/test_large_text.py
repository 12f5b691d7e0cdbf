"""Long and hostile texts: the event loop turns on meanwhile, and what cannot fit is refused before it is tokenized."""

from __future__ import annotations

import asyncio
import itertools

import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers

from router.http.config import ServedModel
from router.http.identity import Identity
from router.service import Service
from router.text import bounds
from router.text.bounds import TokenBound
from router.text.offload import TextPool
from router.text.rendering import DirectRenderer
from router.text.template_pool import TemplatePool
from router.text.templates import ChatTemplate, Conversation
from router.text.token_bytes import TokenBytes
from router.text.tokenizer import Tokenizer
from workers.api.errors import ContextLengthExceeded, InvalidRequest

from .fakes import CHAT_TEMPLATE, FakeGenerator, make_backend
from .test_bad_inputs import CHAT, COMPLETION
from .test_text import sentencepiece_like, wordpiece_like

MEGABYTE = 1 << 20
HOSTILE = {
    "letters": "a" * (4 * MEGABYTE),
    "words": "hello there " * (MEGABYTE // 12),
    "spaces": "x" + " " * MEGABYTE + "x",
    "marks": "\u0301" * (MEGABYTE // 2),
    "ligatures": "\ufdfa" * (MEGABYTE // 3),
    "joiners": "\u202e👩\u200d" * (MEGABYTE // 10),
    "specials": "<|im_end|>" * (MEGABYTE // 10),
    "digits": "7" * MEGABYTE,
    "punctuation": "!?" * (MEGABYTE // 4),
}


def backends() -> dict[str, tokenizers.Tokenizer]:
    """Of the kinds that checkpoints have; all but the last can be bounded."""
    nfc = make_backend()
    nfc.normalizer = normalizers.NFC()
    nfkc = make_backend()
    nfkc.normalizer = normalizers.NFKC()
    spaces = tokenizers.Tokenizer(models.BPE())
    spaces.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    spaces.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    spaces.train_from_iterator([" " * 64, "────────" * 4, "aaaa  bbbb"] * 5, trainer)
    composed = tokenizers.Tokenizer(models.BPE())
    composed.normalizer = normalizers.NFC()
    composed.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    composed.decoder = decoders.ByteLevel()
    composed.train_from_iterator(["\u1ec7 " * 64], trainer)
    runs = tokenizers.Tokenizer(
        models.BPE(
            vocab={p: i for i, p in enumerate([*(f"<0x{b:02X}>" for b in range(256)), "▁", "▁▁", "a"])},
            merges=[("▁", "▁")],
            byte_fallback=True,
        )
    )
    runs.normalizer = normalizers.Replace(" ", "▁")
    greedy = make_backend()
    greedy.add_special_tokens([AddedToken("<mask>", lstrip=True, rstrip=True)])
    return {
        "bytes": make_backend(),
        "nfc": nfc,
        "nfkc": nfkc,
        "composed": composed,
        "runs": runs,
        "spaces": spaces,
        "greedy": greedy,
        "pieces": sentencepiece_like()._backend,
        "words": wordpiece_like()._backend,
    }


BACKENDS = backends()
BOUNDS = {name: TokenBound(b, TokenBytes(b)) for name, b in BACKENDS.items()}
PARTS = st.sampled_from(
    [
        "a",
        "hello ",
        " " * 40,
        "e\u0301",
        "\u0301",
        "\ufdfa",
        "你好",
        "▁▁▁▁",
        "─" * 9,
        "<mask>",
        "77",
        "!?",
        "\n\n",
        "🎉",
        "th",
        "ſ",
    ]
)


@pytest.mark.parametrize("name", BACKENDS)
@given(parts=st.lists(PARTS, min_size=1, max_size=6), times=st.integers(1, 4000))
@settings(max_examples=40, deadline=None)
@example(parts=["<mask>", " " * 40], times=4000)
@example(parts=["e\u0323\u0302"], times=9000)
@example(parts=["▁▁▁▁"], times=9000)
@example(parts=[" " * 40], times=2000)
def test_the_bound_never_refuses_what_fits(name, parts, times):
    text = "".join(parts) * times
    count = len(BACKENDS[name].encode(text))
    assert not BOUNDS[name].exceeds(text, count)


@pytest.mark.parametrize("name", [n for n in BACKENDS if n != "words"])
@pytest.mark.parametrize("text", HOSTILE)
def test_the_bound_refuses_what_is_far_too_long(name, text):
    takes_all_spaces = (name, text) == ("greedy", "spaces")
    assert BOUNDS[name].exceeds(HOSTILE[text], 1000) is not takes_all_spaces


def test_a_prompt_that_cannot_fit_is_not_tokenized(monkeypatch):
    """Nor read further than needed: a limit of 10 tokens ends the count in the first piece."""
    tokenizer = Tokenizer(
        make_backend(), renderer=DirectRenderer(ChatTemplate(CHAT_TEMPLATE, {"bos_token": "<|bos|>"}))
    )
    read = []
    monkeypatch.setattr(tokenizer._bound, "_normalized", lambda piece: read.append(len(piece)) or piece)
    monkeypatch.setattr(tokenizer, "_backend", None)
    with pytest.raises(ContextLengthExceeded, match="more than that, with 4194304 characters") as e:
        tokenizer.encode(HOSTILE["letters"], limit=10)
    assert e.value.param == "prompt"
    assert len(read) == 1


@pytest.mark.parametrize("noun", ["prompt", "messages"])
@pytest.mark.parametrize(
    "text", ["a" * (4 * MEGABYTE), ("b" * 5000 + " ") * 300, "你" * (2 * MEGABYTE), "=" * (2 * MEGABYTE)]
)
async def test_words_that_never_end_are_refused_though_the_context_could_hold_them(monkeypatch, noun, text):
    tokenizer = Tokenizer(
        make_backend(), renderer=DirectRenderer(ChatTemplate(CHAT_TEMPLATE, {"bos_token": "<|bos|>"}))
    )
    monkeypatch.setattr("router.text.encoding.ids_of", lambda *_, **__: pytest.fail("it was tokenized"))
    pool, limit = TextPool(1), 10 * MEGABYTE

    async def encode():
        if noun == "prompt":
            return tokenizer.encode(text, limit=limit)
        return await tokenizer.chat.encode(Conversation([{"role": "user", "content": text}]), pool, limit=limit)

    with pytest.raises(InvalidRequest, match="Break them up") as e:
        await encode()
    assert (e.value.param, e.value.code) == (noun, "invalid_value")
    pool.close()


LONG_RUNS = st.lists(
    st.tuples(st.sampled_from(["a", "é", "你", "_", "7", " ", "\n", "=", "\u0301", "🎉"]), st.integers(1, 20_000)),
    min_size=1,
    max_size=12,
)


@given(runs=LONG_RUNS)
@example(runs=[("a", 4096), (" ", 1), ("a", 4097)])
@example(runs=[("=", 12_288), ("a", 4097), ("=", 12_287)])
@settings(max_examples=40, deadline=None)
def test_long_runs_are_counted_as_a_reader_would(runs):
    """Against sums over the runs that were put there."""
    text = "".join(one * times for one, times in runs)
    kinds = [("w" if c.isalnum() or c == "_" else "s" if c.isspace() else "o", times) for c, times in runs]
    lengths = [sum(n for _, n in group) for _, group in itertools.groupby(kinds, key=lambda k: k[0])]
    in_runs = sum(n for n in lengths if n > bounds.LONG_RUN)
    bound = BOUNDS["bytes"]
    for most, slow in ((in_runs, False), (in_runs - 1, in_runs > 0)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(bounds, "MOST_IN_LONG_RUNS", most)
            assert bound.too_slow(text) is slow


def test_without_a_splitting_pre_tokenizer_a_text_is_one_word():
    prose = "the end of the world " * (MEGABYTE // 20)
    assert BOUNDS["runs"].too_slow(prose)
    assert BOUNDS["spaces"].too_slow(prose)
    assert not BOUNDS["bytes"].too_slow(prose)
    assert not BOUNDS["runs"].too_slow(prose[:MEGABYTE])


def test_the_limit_is_exact():
    tokenizer = Tokenizer(make_backend())
    with pytest.raises(ContextLengthExceeded, match="resulted in 50 tokens"):
        tokenizer.encode("a" * 50, limit=49)
    assert len(tokenizer.encode("a" * 50, limit=50)) == 50


class Ticks:
    """Counts the turns of the event loop while it is entered."""

    count = 0

    async def __aenter__(self):
        self._task = asyncio.create_task(self._run())
        return self

    async def __aexit__(self, *_):
        self._task.cancel()

    async def _run(self):
        while True:
            self.count += 1
            await asyncio.sleep(0)


class Watched:
    """A tokenizer of the library that notes how often `ticks` counted while it encoded."""

    def __init__(self, backend, ticks):
        self._backend, self._ticks = backend, ticks
        self.turns = []

    def __getattr__(self, name):
        return getattr(self._backend, name)

    def encode_batch_fast(self, texts, **how):
        before = self._ticks.count
        encodings = self._backend.encode_batch_fast(texts, **how)
        self.turns.append(self._ticks.count - before)
        return encodings


@pytest.mark.parametrize("endpoint", [CHAT, COMPLETION])
@pytest.mark.parametrize("name", [n for n in HOSTILE if n != "letters"])
async def test_the_loop_turns_while_a_text_is_tokenized(endpoint, name):
    """The context is so large that nothing is refused. Where encoding holds the interpreter, the loop stands still."""
    ticks, text, pool = Ticks(), HOSTILE[name], TextPool(1)
    watched = Watched(make_backend(), ticks)
    template = DirectRenderer(ChatTemplate(CHAT_TEMPLATE, {"bos_token": "<|bos|>"}))
    tokenizer = Tokenizer(watched, renderer=template)
    tokenizer.chat._literal.warm()
    tokenizer.chat._literal._twin = Watched(tokenizer.chat._literal._twin, ticks)
    watched = tokenizer.chat._literal._twin if (name, endpoint) == ("specials", CHAT) else watched
    async with ticks:
        if endpoint == CHAT:
            ids = await tokenizer.chat.encode(Conversation([{"role": "user", "content": text}]), pool)
        else:
            ids = await pool.run(len(text), lambda: tokenizer.encode(text))
    assert len(watched.turns) == 1
    assert watched.turns[0] > 50
    assert tokenizer.decode(ids[:200], skip_special_tokens=False).count(text[:10].strip()) >= 1
    pool.close()


@pytest.mark.parametrize("route", [CHAT, COMPLETION])
async def test_large_bodies_are_refused_by_the_service_and_others_go_on(tokenizer, route):
    service = Service([ServedModel("m", tokenizer, 256)], FakeGenerator(tokenizer))
    try:
        large = "a " * (2 * MEGABYTE)
        body = (
            b'{"model":"m","messages":[{"role":"user","content":"%s"}]}'
            if route == CHAT
            else b'{"model":"m","prompt":"%s"}'
        ) % large.encode()
        small = b'{"model":"m","prompt":"hello"}'
        refused, *answered = await asyncio.gather(
            service.reply(route, body, Identity()), *(service.reply(COMPLETION, small, Identity()) for _ in range(20))
        )
        assert refused.status == 400
        assert b"context_length_exceeded" in refused.body
        assert [a.status for a in answered] == [200] * 20
    finally:
        service.close()


async def test_long_texts_do_not_wait_for_huge_ones():
    pool = TextPool(1)
    release = asyncio.Event()
    loop = asyncio.get_running_loop()

    def huge():
        asyncio.run_coroutine_threadsafe(release.wait(), loop).result()

    tasks = [asyncio.create_task(pool.run(MEGABYTE, huge)) for _ in range(3)]
    await asyncio.sleep(0)
    assert await pool.run(10_000, lambda: "done") == "done"
    release.set()
    await asyncio.gather(*tasks)
    pool.close()


async def test_a_broken_template_fails_chats_only(tokenizer):
    """Through HTTP's table: 400 with a code of our own, and completions go on."""
    broken = Tokenizer(
        make_backend(), eos_ids=tokenizer.eos_ids, renderer=TemplatePool("{{ messages[0].nothing.x }}", {})
    )
    service = Service([ServedModel("m", broken, 256)], FakeGenerator(tokenizer))
    try:
        chat = await service.reply(CHAT, b'{"model":"m","messages":[{"role":"user","content":"x"}]}', Identity())
        assert (chat.status, b'"code": "chat_template_failed"' in chat.body) == (400, True)
        assert (await service.reply(COMPLETION, b'{"model":"m","prompt":"x"}', Identity())).status == 200
    finally:
        service.close()
        await asyncio.sleep(0)
