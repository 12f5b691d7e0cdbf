"""One HTTP request as work: generation requests, the choices that read them, and the format that writes them."""

from __future__ import annotations

import functools
import uuid
from collections.abc import Callable
from dataclasses import dataclass

from router.generation import GenerationRequest, Generator
from router.http.choice import Choice
from router.http.config import FrontConfig, ServedModel
from router.http.identity import Identity
from router.http.rounds import Round, RoundChoice, Stoppable
from router.protocol.answers import ChatFormat, CompletionFormat, Format, PromptShown
from router.protocol.errors import HttpRefusal
from router.protocol.interactive import InteractiveBody, InteractiveFormat
from router.protocol.openai import ChatBody, Common, CompletionBody
from router.protocol.sampling import check_ids, check_products, room, samplings
from router.protocol.validation import path
from router.request_context import unique_id
from router.text.grammars import GrammarChecks
from router.text.offload import TextPool
from router.text.templates import Conversation
from router.text.tokenizer import Tokenizer
from workers.api.errors import InvalidRequest

CUT_CONTEXTS = 8  # contexts in a text that `truncate_prompt_tokens` shortens


@dataclass(slots=True)
class Job:
    """`choices[p * n + c]` reads choice c of `requests[p]`."""

    model: str
    requests: tuple[GenerationRequest, ...]
    choices: list[Choice]
    format: Format
    stream: bool
    usage_wanted: bool
    logprobs: bool
    round: Round | None = None  # of an interactive session

    @property
    def prompt_tokens(self) -> int:
        """Over all prompts."""
        return sum(len(r.prompt_ids) for r in self.requests)

    def by(self, generator: Generator) -> Generator:
        """`generator`, made to stop when the round is cancelled."""
        return generator if self.round is None else Stoppable(generator, self.round, self.choices[0])


class JobMaker:
    """Turns checked bodies into jobs. `draw_seed` gives 64 random bits, `now` seconds since 1970."""

    def __init__(
        self, config: FrontConfig, pool: TextPool, draw_seed: Callable[[], int], now: Callable[[], float]
    ) -> None:
        self._config, self._pool, self._draw_seed, self._now = config, pool, draw_seed, now
        self._grammars = GrammarChecks()

    async def chat(self, body: ChatBody, model: ServedModel, identity: Identity) -> Job:
        """The job of a chat. Raises InvalidRequest, HttpRefusal."""
        route = "/v1/chat/completions"
        check_products(body, 1, self._config.limits)
        await self._check_grammar(body, model)
        ids = await self._rendered(body, model, route)
        request_id = f"chatcmpl-{body.request_id or uuid.uuid4().hex}"
        form = ChatFormat(
            request_id,
            int(self._now()),
            model.name,
            model.tokenizer.token_bytes,
            usage_in_chunks=_usage_wanted(body),
        )
        return self._job(body, model, identity, [ids], form, route, "messages", [""])

    async def interactive(
        self, asked: InteractiveBody, model: ServedModel, identity: Identity, round_: Round | None = None
    ) -> Job:
        """The job of a chat as LMDeploy asks for it, the next of its session's rounds or one by itself.

        Raises InvalidRequest, HttpRefusal.
        """
        route, form = "/v1/chat/interactive", InteractiveFormat()
        body = asked.as_chat(model.name, asked.prompt if round_ is None else round_.history.before(asked.prompt))
        try:
            ids = await self._rendered(body, model, route)
        except InvalidRequest as e:
            e.param = "prompt" if e.param == "messages" else e.param  # as it is called here
            raise
        kind = Choice if round_ is None else functools.partial(RoundChoice, round_)
        job = self._job(body, model, identity, [ids], form, route, "prompt", [""], kind)
        before = 0
        if round_ is not None:
            job.round, before = round_, round_.history.shared(model.name, ids)
            round_.asks(model.name, body.messages, ids)
        form.follow(job.choices[0], len(ids) - before, before)
        return job

    async def completion(self, body: CompletionBody, model: ServedModel, identity: Identity) -> Job:
        """The job of a completion, with one generation request a prompt. Raises InvalidRequest."""
        tokenizer, n = model.tokenizer, body.n or 1
        check_products(body, len(body.prompt), self._config.limits)
        await self._check_grammar(body, model)
        prompts: list[tuple[int, ...]] = []
        echoes: list[str] = []
        for prompt in body.prompt:
            if isinstance(prompt, str):
                ids, text = await self._encoded(prompt, body, model), prompt
            else:
                check_ids(prompt, tokenizer.vocab_size, "prompt")
                fits = len(prompt) <= prompt_limit(body, model)  # else it is refused below
                ids, text = prompt, await self._decoded(prompt, model) if body.echo and fits else ""
            prompts.append(ids)
            echoes += [text if body.echo else ""] * n
        request_id = f"cmpl-{body.request_id or uuid.uuid4().hex}"
        form = CompletionFormat(
            request_id,
            int(self._now()),
            model.name,
            tokenizer.token_bytes,
            echoes=echoes,
            usage_in_chunks=_usage_wanted(body),
        )
        job = self._job(body, model, identity, prompts, form, "/v1/completions", "prompt", echoes)
        if body.asked_prompt_logprobs is not None:
            ids_of = [request.prompt_ids for request in job.requests for _ in range(n)]
            form.prompt_shown = PromptShown(ids_of, body.prompt_logprobs, body.logprobs if body.echo else None)
        return job

    async def _check_grammar(self, body: Common, model: ServedModel) -> None:
        """Raises InvalidRequest for structured output that cannot be."""
        asked = body.asked_grammar
        if asked is None:
            return
        name = path(asked.at)
        if not (model.facts.eos_ids or body.stop_token_ids):
            raise InvalidRequest(f"Unsupported parameter: '{name}': this model has no token that ends an answer, and "
                                 "'stop_token_ids' names none.", param=name, code="unsupported_parameter")  # fmt: skip
        fault = await self._pool.run(len(asked.spec.source), lambda: self._grammars.fault(asked.spec), inline=0)
        if fault is not None:
            name = path((*asked.at, *fault.inside))
            raise InvalidRequest(f"Invalid '{name}': {fault.words}.", param=name, code="invalid_value")

    async def _rendered(self, body: ChatBody, model: ServedModel, route: str) -> tuple[int, ...]:
        chat = model.tokenizer.chat
        if chat is None:
            refusal = HttpRefusal(
                404,
                f"This is not a chat model and thus not supported in the {route[1:]} endpoint. "
                "Did you mean to use v1/completions?",
            )
            refusal.param = "model"
            raise refusal
        add_prompt = body.add_generation_prompt
        conversation = Conversation(
            [{"role": m.role, "content": m.content, "name": m.name} for m in body.messages],
            add_generation_prompt=not body.continue_final_message if add_prompt is None else add_prompt,
            continue_final_message=bool(body.continue_final_message),
        )
        return tuple(await chat.encode(conversation, self._pool, limit=prompt_limit(body, model)))

    async def _encoded(self, text: str, body: Common, model: ServedModel) -> tuple[int, ...]:
        limit = prompt_limit(body, model)
        return tuple(await self._pool.run(len(text), lambda: model.tokenizer.encode(text, limit=limit)))

    async def _decoded(self, ids: tuple[int, ...], model: ServedModel) -> str:
        return await self._pool.run(len(ids), lambda: model.tokenizer.decode(ids))

    def _job(
        self,
        body: Common,
        model: ServedModel,
        identity: Identity,
        prompts: list[tuple[int, ...]],
        form: Format,
        route: str,
        param: str,
        echoes: list[str],
        kind: Callable[..., Choice] = Choice,
    ) -> Job:
        limits, facts, n = self._config.limits, model.facts, body.n or 1
        asked = body.asked_grammar
        requests: list[GenerationRequest] = []
        choices: list[Choice] = []
        for ids in prompts:
            if body.truncate_prompt_tokens is not None:
                ids = ids[-body.truncate_prompt_tokens :]
            if not ids:
                raise InvalidRequest(f"Invalid '{param}': it has no tokens.", param=param, code="invalid_value")
            max_tokens = room(body, len(ids), n * len(prompts), facts, limits, param)
            params = samplings(body, len(ids), max_tokens, self._draw_seed(), facts, limits)
            requests.append(
                GenerationRequest(
                    id=unique_id(),
                    model=model.target or model.name,
                    prompt_ids=ids,
                    samplings=params,
                    owner=identity.owner,
                    tier=identity.tier,
                    sub=identity.sub,
                    route=route,
                    salt=_salt(identity.salt, body.cache_salt),
                    adapter=model.adapter,
                    grammar=None if asked is None else asked.within(max_tokens),
                )
            )
            choices += [self._choice(body, model.tokenizer, len(choices) + c, echoes, kind) for c in range(n)]
        return Job(
            model.name,
            tuple(requests),
            choices,
            form,
            bool(body.stream),
            _usage_wanted(body),
            body.asked_logprobs is not None,
        )

    @staticmethod
    def _choice(
        body: Common, tokenizer: Tokenizer, index: int, echoes: list[str], kind: Callable[..., Choice]
    ) -> Choice:
        return kind(
            index,
            tokenizer.detokenizer(skip_special_tokens=body.skip_special_tokens is not False),
            stops=body.stop if body.ignore_eos else (*body.stop, *tokenizer.stop_words),
            min_tokens=body.min_tokens or 0,
            wants_logprobs=body.asked_logprobs is not None,
            wants_prompt=body.asked_prompt_logprobs is not None,
            offset=len(echoes[index]) if index < len(echoes) else 0,
        )


def prompt_limit(body: Common, model: ServedModel) -> int:
    """Tokens that a text may have: those of the context, and where it is cut anyway (its end stays) some more."""
    return model.max_model_len * (1 if body.truncate_prompt_tokens is None else CUT_CONTEXTS)


def _usage_wanted(body: Common) -> bool:
    return bool(body.stream_options and body.stream_options.include_usage)


def _salt(own: bytes, asked: str | None) -> bytes:
    # The owner's part has a length before it: no choice of cache_salt reaches another owner's prefixes.
    return own if asked is None else len(own).to_bytes(4, "little") + own + asked.encode()
