"""Fakes: a generator whose answers are known, a status that says what it is told."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from router.dispatch.lease import TierRow, WorkRow
from router.dispatch.rounds import SessionCounts
from router.generation import ChoiceDelta, GenerationRequest
from router.http.status import ReplicaRow
from router.text.offload import TextPool
from router.text.templates import Conversation
from workers.api.request import Delta, FinishReason, TokenLogprobs

CHAT_TEMPLATE = """{%- for message in messages %}
{%- if loop.first and message.role != 'system' %}{{ bos_token }}{% endif %}
{{- '<|im_start|>' + message.role + '\\n' + message.content | trim + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

TOOLS_TEMPLATE = """{%- if tools %}{{ tools | tojson }}{% endif %}
{%- for message in messages %}{{ '<|im_start|>' + message.role }}|{{ message.content }}
{%- for call in message.tool_calls or [] %}[{{ call.function.name }}:{{ call.function.arguments | tojson }}]{% endfor %}
{%- if message.tool_call_id %}({{ message.tool_call_id }}){% endif %}{{ '<|im_end|>' }}
{%- endfor %}"""

SPECIALS = ["<|bos|>", "<|im_start|>", "<|im_end|>", "<|pad|>"]
ANSWER = "Hello, wörld! 你好 🎉 The end. And more."


def make_backend() -> tokenizers.Tokenizer:
    """A byte-level BPE of some hundred tokens."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=360, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(["hello there, what is the end of the world? user assistant system"] * 3, trainer)
    backend.add_tokens(["<think>"])
    return backend


def encode_chat(tokenizer, messages, *, limit=None, **how):
    """Ids of a chat, without an event loop of one's own."""
    pool = TextPool(1)
    try:
        return asyncio.run(tokenizer.chat.encode(Conversation(messages, **how), pool, limit=limit))
    finally:
        pool.close()


@dataclass
class FakeStatus:
    """Says what it is told."""

    is_live: bool = True
    is_ready: bool = True
    is_healthy: bool = True
    rows: list[ReplicaRow] = field(default_factory=list)
    unleased: dict[str, int] = field(default_factory=dict)
    tier_rows: list[TierRow] = field(default_factory=list)
    work_rows: list[WorkRow] = field(default_factory=list)
    session_counts: SessionCounts = SessionCounts()

    def live(self):
        return self.is_live

    def ready(self):
        return self.is_ready

    def healthy(self):
        return self.is_healthy

    def replicas(self):
        return self.rows

    def waiting(self):
        return self.unleased

    def tiers(self):
        return self.tier_rows

    def work(self):
        return self.work_rows

    def sessions(self):
        return self.session_counts


@dataclass
class FakeGenerator:
    """Answers every choice with the ids of `answer`, some tokens a step, then the end-of-sequence id.

    `refusal` is raised before the first batch; `failure` after `fail_after` steps; `endless` never ends by itself;
    `pause` is awaited between steps, so is `before_step`. `requests`, `running` and `closed` tell what happened.
    """

    tokenizer: object
    answer: str = ANSWER
    tokens_a_step: int = 1
    refusal: Exception | None = None
    failure: Exception | None = None
    fail_after: int = 3
    error_delta: bool = False
    endless: bool = False
    drop_finish: bool = False
    pause: float = 0.0
    before_step: Callable[[], Awaitable[None]] | None = None
    cached: int = 0
    seed: int | None = None  # not None: steps of random sizes
    requests: list[GenerationRequest] = field(default_factory=list)
    running: int = 0
    closed: int = 0
    steps: int = 0
    trace: dict[str, object] = field(default_factory=dict)  # what it tells of each request

    async def generate(self, request, sink):
        self.requests.append(request)
        for name, value in self.trace.items():
            setattr(request.trace, name, value)
        if self.refusal is not None:
            raise self.refusal
        self.running += 1
        try:
            wanted = sink(())
            async for batch in self._run(request):
                wanted = wanted and sink(batch)
                if not wanted:
                    return
        finally:
            self.running -= 1
            self.closed += 1

    async def _run(self, request):
        tokenizer = self.tokenizer
        sizes = random.Random(self.seed)
        script = tokenizer.encode(self.answer)
        alive = {s.choice: 0 for s in request.samplings}
        while alive:
            self.steps += 1
            if self.before_step is not None:
                await self.before_step()
            if self.pause:
                await asyncio.sleep(self.pause)
            elif self.steps % 16 == 0:
                await asyncio.sleep(0)
            if self.failure is not None and self.steps > self.fail_after:
                raise self.failure
            batch = []
            for sampling in request.samplings:
                at = alive.get(sampling.choice)
                if at is None:
                    continue
                size = self.tokens_a_step if self.seed is None else sizes.randint(1, 5)
                ids, finish = [], None
                while len(ids) < size and finish is None:
                    place = at + len(ids)
                    ends = place >= len(script) and not self.endless
                    ids.append(tokenizer.eos_ids[0] if ends else script[place % len(script)])
                    if ids[-1] in sampling.stop_ids and place + 1 >= sampling.min_tokens:
                        finish = FinishReason.STOP
                    elif place + 1 >= sampling.max_tokens:
                        finish = FinishReason.LENGTH
                delta = Delta(
                    f"{request.id}/{sampling.choice}",
                    at,
                    tuple(ids),
                    self._logprobs(ids, sampling.logprobs, sampling.logprob_ids),
                    finish=None if self.drop_finish else finish,
                    cached_tokens=self.cached if finish else 0,
                    prompt_logprobs=() if at else self._logprobs(request.prompt_ids[1:], sampling.prompt_logprobs),
                )
                if self.error_delta and self.steps > self.fail_after:
                    delta = Delta(delta.request_id, at, finish=FinishReason.ERROR, error="rank 0: the step failed")
                batch.append(ChoiceDelta(sampling.choice, delta))
                alive[sampling.choice] = at + len(ids)
                if delta.finish is not None or finish is not None:
                    del alive[sampling.choice]
            yield tuple(batch)

    @staticmethod
    def _logprobs(ids, wanted, named=()):
        if wanted is None:
            return ()
        if named:
            return tuple(TokenLogprobs(i, -0.5, 1, ((i, -0.5), *((k, -k / 9) for k in named if k != i))) for i in ids)
        return tuple(TokenLogprobs(i, -0.5, 1, tuple(((i + k) % 300, -0.5 - k) for k in range(wanted))) for i in ids)


def all_routes(routes):
    """Those of included routers, too, which newer releases of FastAPI keep apart."""
    for route in routes:
        included = getattr(route, "original_router", None)
        yield from [route] if included is None else all_routes(included.routes)
