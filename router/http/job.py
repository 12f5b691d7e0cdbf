"""One HTTP request as work: generation requests, the choices that read them, and the format that writes them."""

from __future__ import annotations

import functools
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from router.generation import GenerationRequest, Generator
from router.http.choice import Choice, IdsChoice
from router.http.config import FrontConfig, ServedModel
from router.http.conversation import conversation_of
from router.http.identity import Identity
from router.http.parsing import AnswerParsing, answer_parsing
from router.http.rounds import Round, RoundChoice, Stoppable
from router.protocol.answers import ChatFormat, CompletionFormat, Format, PromptShown, Usage
from router.protocol.counted import CountedFormat
from router.protocol.errors import HttpRefusal
from router.protocol.generate import GenerateBody, GenerateFormat
from router.protocol.interactive import InteractiveBody, InteractiveFormat
from router.protocol.message_events import MessagesFormat
from router.protocol.messages import MessagesBody
from router.protocol.openai import ChatBody, Common, CompletionBody
from router.protocol.response_events import ResponsesFormat
from router.protocol.responses import ResponsesBody
from router.protocol.sampling import check_ids, check_products, room, samplings
from router.protocol.token_ids import IdsFormat
from router.protocol.validation import path
from router.request_context import unique_id
from router.text.grammars import GrammarChecks
from router.text.offload import TextPool
from router.text.request_templates import RequestTemplates
from router.text.tokenizer import Tokenizer
from workers.api.errors import InvalidRequest
from workers.api.request import TokenLogprobs

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
    logprobs: bool  # whether they are shown
    shown: int | None = None  # of a prompt's choices, the best that are shown; None: all
    prompt_event: Callable[[int, Sequence[TokenLogprobs]], str] | None = None  # of a stream that shows its prompt's
    round: Round | None = None  # of an interactive session

    @property
    def prompt_tokens(self) -> int:
        """Over all prompts."""
        return sum(len(r.prompt_ids) for r in self.requests)

    def by(self, generator: Generator) -> Generator:
        """`generator`, made to stop when the round is cancelled."""
        return generator if self.round is None else Stoppable(generator, self.round, self.choices[0])

    def usage(self) -> Usage:
        """The bill so far."""
        at = cached = 0
        for request in self.requests:
            # The prompt is billed once: what its least lucky choice found in the cache was there before all of them.
            # Of a beam search, which looks once, the first choice tells.
            n = len(request.samplings)
            cached += min(c.cached_tokens for c in self.choices[at : at + (n if request.beams is None else 1)])
            at += n
        made, thought = (sum(c.token_count for c in self.choices), sum(c.reasoning_tokens for c in self.choices))
        return Usage(self.prompt_tokens, made, cached, thought)


class JobMaker:
    """Turns checked bodies into jobs. `draw_seed` gives 64 random bits, `now` seconds since 1970."""

    def __init__(
        self, config: FrontConfig, pool: TextPool, draw_seed: Callable[[], int], now: Callable[[], float]
    ) -> None:
        self._config, self._pool, self._draw_seed, self._now = config, pool, draw_seed, now
        self._grammars = GrammarChecks()
        self._templates = RequestTemplates()

    def close(self) -> None:
        """Processes of templates have ended."""
        self._templates.close()

    async def chat(self, body: ChatBody, model: ServedModel, identity: Identity) -> Job:
        """The job of a chat. Raises InvalidRequest, HttpRefusal."""
        check_products(body, 1, self._config.limits)
        request_id = f"chatcmpl-{body.request_id or uuid.uuid4().hex}"
        form = ChatFormat(
            request_id,
            int(self._now()),
            model.name,
            model.tokenizer.token_bytes,
            names=_id_name if body.return_tokens_as_token_ids else None,
            usage_in_chunks=body.usage_in_chunks,
        )
        form.prompt_top = body.prompt_logprobs
        job = await self._chat(body, model, identity, form, "/v1/chat/completions", "messages")
        if body.return_token_ids:
            form.prompt_ids = job.requests[0].prompt_ids
        return _finished(job, body, form)

    async def interactive(
        self, asked: InteractiveBody, model: ServedModel, identity: Identity, round_: Round | None = None
    ) -> Job:
        """The job of a chat as LMDeploy asks for it, the next of its session's rounds or one by itself.

        Raises InvalidRequest, HttpRefusal.
        """
        route, form = "/v1/chat/interactive", InteractiveFormat()
        body = asked.as_chat(model.name, asked.prompt if round_ is None else round_.history.before(asked.prompt))
        try:
            ids = await self.rendered(body, model, route, prompt_limit(body, model))
        except InvalidRequest as e:
            e.param = "prompt" if e.param == "messages" else e.param  # as it is called here
            raise
        kind = Choice if round_ is None else functools.partial(RoundChoice, round_)
        job = await self._job(body, model, identity, [ids], form, route, "prompt", kind=kind)
        before = 0
        if round_ is not None:
            job.round, before = round_, round_.history.shared(model.name, ids)
            round_.asks(model.name, body.messages, ids)
        form.follow(job.choices[0], len(ids) - before, before)
        return job

    async def completion(self, body: CompletionBody, model: ServedModel, identity: Identity) -> Job:
        """The job of a completion, with one generation request a prompt. Raises InvalidRequest."""
        tokenizer, n = model.tokenizer, body.n or 1
        filling = tokenizer.infilling if body.suffix else None
        if filling is not None and filling.stop is not None:
            body = body.model_copy(update={"stop_token_ids": (*body.stop_token_ids, filling.stop)})
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
            echoes.append(text if body.echo else "")
        request_id = f"cmpl-{body.request_id or uuid.uuid4().hex}"
        form = CompletionFormat(
            request_id,
            int(self._now()),
            model.name,
            tokenizer.token_bytes,
            echoes=[text for text in echoes for _ in range(n)],
            names=_id_name if body.return_tokens_as_token_ids else None,
            usage_in_chunks=body.usage_in_chunks,
        )
        job = await self._job(body, model, identity, prompts, form, "/v1/completions", "prompt", echoes)
        if body.asked_prompt_logprobs is not None:
            ids_of = [request.prompt_ids for request in job.requests for _ in range(n)]
            form.prompt_shown = PromptShown(ids_of, body.prompt_logprobs, body.logprobs if body.echo else None)
        if body.return_token_ids:
            form.prompt_ids = [request.prompt_ids for request in job.requests for _ in range(n)]
        if body.asked_choices > n:
            job.shown = n
        return _finished(job, body, form)

    async def generate(self, asked: GenerateBody, model: ServedModel, identity: Identity) -> Job:
        """The job of /generate. Raises InvalidRequest."""
        body, form = asked.as_completion(model.name), GenerateFormat(logprobs=bool(asked.return_logprob))
        (prompt,) = body.prompt
        if isinstance(prompt, str):
            ids = await self._encoded(prompt, body, model)
        else:
            check_ids(prompt, model.tokenizer.vocab_size, "input_ids")
            ids = prompt
        job = await self._job(body, model, identity, [ids], form, "/generate", "prompt")
        form.follow(job.usage)
        return job

    async def _check_grammar(self, body: Common, model: ServedModel) -> None:
        """Raises InvalidRequest for structured output that cannot be."""
        asked = body.asked_grammar
        if asked is None:
            return
        name = path(body.place(asked.at))
        if not (model.facts.eos_ids or body.stop_token_ids):
            raise InvalidRequest(f"Unsupported parameter: '{name}': this model has no token that ends an answer, and "
                                 "'stop_token_ids' names none.", param=name, code="unsupported_parameter")  # fmt: skip
        fault = await self._pool.run(len(asked.spec.source), lambda: self._grammars.fault(asked.spec), inline=0)
        if fault is not None:
            name = path(body.place(asked.place(fault.inside)))
            raise InvalidRequest(f"Invalid '{name}': {fault.words}.", param=name, code="invalid_value")

    async def message(self, asked: MessagesBody, model: ServedModel, identity: Identity) -> Job:
        """The job of /v1/messages. Raises InvalidRequest, HttpRefusal."""
        form = MessagesFormat(f"msg_{uuid.uuid4().hex}", asked)
        job = await self._chat(asked.chat, model, identity, form, "/v1/messages", "messages")
        form.follow(job.choices[0], job.usage)
        return job

    async def response(self, asked: ResponsesBody, model: ServedModel, identity: Identity) -> Job:
        """The job of /v1/responses. Raises InvalidRequest, HttpRefusal."""
        form = ResponsesFormat(uuid.uuid4().hex, int(self._now()), asked)
        job = await self._chat(asked.chat, model, identity, form, "/v1/responses", "input")
        form.follow(job.usage)
        return job

    async def _chat(
        self, body: ChatBody, model: ServedModel, identity: Identity, form: Format, route: str, param: str
    ) -> Job:
        """A chat whose answers are parsed; `param` is what its messages are called in the body that asks."""
        await self._check_grammar(body, model)
        try:
            ids = await self.rendered(body, model, route, prompt_limit(body, model), identity)
        except InvalidRequest as e:
            e.param = param if e.param == "messages" else e.param
            raise
        return await self._job(
            body, model, identity, [ids], form, route, param, parsing=answer_parsing(body, model, ids)
        )

    async def rendered(
        self, body: ChatBody, model: ServedModel, route: str, limit: int, identity: Identity | None = None
    ) -> tuple[int, ...]:
        """Ids of a chat's prompt, at most `limit`; `identity` asks, where the body may bring a template.

        Raises InvalidRequest, HttpRefusal, Overloaded.
        """
        chat, source = model.tokenizer.chat, body.chat_template
        if source is not None:
            self._check_trust(identity)
        elif chat is None:
            refusal = HttpRefusal(
                404,
                f"This is not a chat model and thus not supported in the {route[1:]} endpoint. "
                "Did you mean to use v1/completions?",
            )
            refusal.param = "model"
            raise refusal
        conversation = conversation_of(body, model)
        if source is not None:
            tokenizer = model.tokenizer
            ids = await self._templates.encode(model.name, tokenizer, source, conversation, self._pool, limit=limit)
            return tuple(ids)
        assert chat is not None, "a model without a template was refused above"
        return tuple(await chat.encode(conversation, self._pool, limit=limit))

    def _check_trust(self, identity: Identity | None) -> None:
        """Raises HttpRefusal (403) where `identity` may not bring a chat template."""
        if self._config.trust_request_chat_template or (identity is not None and identity.admin):
            return
        refusal = HttpRefusal(
            403,
            "A chat template of a request's own is for admins: their keys say 'admin: true'. The server's "
            "configuration may allow it to all (http.trust_request_chat_template).",
            code="admin_only",
        )
        refusal.param = "chat_template"
        raise refusal

    async def _encoded(self, text: str, body: CompletionBody, model: ServedModel) -> tuple[int, ...]:
        limit, suffix, tokenizer = prompt_limit(body, model), body.suffix, model.tokenizer
        if suffix:
            size = len(text) + len(suffix)
            return await self._pool.run(size, lambda: tokenizer.encode_infilling(text, suffix, limit=limit))
        special = body.add_special_tokens is not False
        ids = await self._pool.run(len(text), lambda: tokenizer.encode(text, limit=limit, add_special_tokens=special))
        return tuple(ids)

    async def _decoded(self, ids: tuple[int, ...], model: ServedModel) -> str:
        return await self._pool.run(len(ids), lambda: model.tokenizer.decode(ids))

    async def _bad_words(self, body: Common, model: ServedModel) -> tuple[tuple[int, ...], ...]:
        """The ids of each word, in all its spellings."""

        def spelled() -> tuple[tuple[int, ...], ...]:
            spellings = (ids for word in body.bad_words for ids in model.tokenizer.spellings(word))
            return tuple(dict.fromkeys(spellings))

        return await self._pool.run(64 * len(body.bad_words), spelled)

    async def _job(
        self,
        body: Common,
        model: ServedModel,
        identity: Identity,
        prompts: list[tuple[int, ...]],
        form: Format,
        route: str,
        param: str,
        echoes: Sequence[str] = ("",),
        kind: Callable[..., Choice] = Choice,
        parsing: AnswerParsing | None = None,
    ) -> Job:
        """`echoes`: what stands before the answers to each prompt."""
        limits, facts, n = self._config.limits, model.facts, body.asked_choices
        bad_words = await self._bad_words(body, model)
        asked = body.asked_grammar
        if body.stream and body.return_token_ids:
            kind = IdsChoice
        requests: list[GenerationRequest] = []
        choices: list[Choice] = []
        kept = body.truncate_prompt_tokens
        if kept is not None:
            prompts = [ids[:kept] if body.truncation_side == "right" else ids[-kept:] for ids in prompts]
        tokens = sum(map(len, prompts))
        for ids, echoed in zip(prompts, echoes, strict=True):
            if not ids:
                raise InvalidRequest(f"Invalid '{param}': it has no tokens.", param=param, code="invalid_value")
            max_tokens = room(body, len(ids), n * len(prompts), facts, limits, param)
            seed = self._draw_seed()
            params = samplings(body, tokens, max_tokens, seed, facts, limits, bad_words, len(prompts))
            requests.append(
                GenerationRequest(
                    id=unique_id(),
                    model=model.target or model.name,
                    prompt_ids=ids,
                    samplings=params,
                    owner=identity.owner,
                    tier=identity.tier,
                    sub=identity.sub,
                    priority=body.priority or 0,
                    route=route,
                    salt=_salt(identity.salt, body.cache_salt),
                    adapter=model.adapter,
                    grammar=None
                    if asked is None
                    else asked.within(max_tokens, parsing.begins_after if parsing else ""),
                    beams=body.beams,
                )
            )
            for sampling in params:
                wants = sampling.logprobs is not None
                choices.append(self._choice(body, model.tokenizer, len(choices), wants, len(echoed), kind, parsing))
        return Job(
            model.name,
            tuple(requests),
            choices,
            form,
            bool(body.stream),
            body.usage_in_chunks,
            body.asked_logprobs is not None,
        )

    @staticmethod
    def _choice(
        body: Common,
        tokenizer: Tokenizer,
        index: int,
        wants_logprobs: bool,
        offset: int,
        kind: Callable[..., Choice],
        parsing: AnswerParsing | None,
    ) -> Choice:
        parsed = {} if parsing is None else {"parser": parsing.parser()}
        return kind(
            index,
            tokenizer.detokenizer(
                skip_special_tokens=body.skip_special_tokens is not False, shown=parsing.shown if parsing else ()
            ),
            stops=body.stop if body.ignore_eos else (*body.stop, *tokenizer.stop_words),
            stop_shown=bool(body.include_stop_str_in_output),
            min_tokens=body.min_tokens or 0,
            wants_logprobs=wants_logprobs,
            wants_prompt=body.asked_prompt_logprobs is not None,
            offset=offset,
            **parsed,
        )


def _finished(job: Job, body: Common, plain: ChatFormat | CompletionFormat) -> Job:
    """`job` with what its stream shows besides text."""
    form: ChatFormat | CompletionFormat | IdsFormat = plain
    take = [choice.take_ids for choice in job.choices if isinstance(choice, IdsChoice)]
    if take:
        form = job.format = IdsFormat(plain, take)
    if body.asked_prompt_logprobs is not None:
        job.prompt_event = form.prompt
    if body.stream_options is not None and body.stream_options.continuous_usage_stats:
        counted = CountedFormat(form)
        counted.follow(job.usage)
        job.format = counted
        if job.prompt_event is not None:
            job.prompt_event = lambda index, scores: counted.counted(form.prompt(index, scores))
    return job


def _id_name(token_id: int) -> bytes:
    return b"token_id:%d" % token_id


def prompt_limit(body: Common, model: ServedModel) -> int:
    """Tokens that a text may have: those of the context, and where it is cut anyway (its end stays) some more."""
    return model.max_model_len * (1 if body.truncate_prompt_tokens is None else CUT_CONTEXTS)


def _salt(own: bytes, asked: str | None) -> bytes:
    # The owner's part has a length before it: no choice of cache_salt reaches another owner's prefixes.
    return own if asked is None else len(own).to_bytes(4, "little") + own + asked.encode()
