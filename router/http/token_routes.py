"""Routes that turn text into tokens and back, without a replica: /tokenize, /detokenize, /v1/encode; and /version."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from starlette.responses import Response

from router.http.config import ServedModel
from router.http.identity import Identity
from router.http.job import CUT_CONTEXTS
from router.http.schema import answer_of, anthropic_answer_of, body_of
from router.protocol.answer_schemas import CountAnswer, DetokenizeAnswer, TokenizeAnswer
from router.protocol.messages import CountBody
from router.protocol.openai import ChatBody, ChatMessage
from router.protocol.sampling import check_ids
from router.protocol.tokens import DetokenizeBody, EncodeBody, TokenizeBody
from router.service import Service
from workers.api.errors import RequestError

ReadBody = Callable[[Request], Awaitable[bytes]]


def token_routes(service: Service, read_body: ReadBody, version: str) -> APIRouter:
    """The routes. Refusals are counted and logged as those of generations are."""
    router = APIRouter(tags=["tokens"])
    texts = _Texts(service)

    async def answer(request: Request, route: str, work: Callable[[bytes, Identity], Awaitable[Any]]) -> Response:
        identity: Identity = request.state.identity
        body = await read_body(request)
        try:
            return JSONResponse(await work(body, identity))
        except RequestError as e:
            service.count_refusal(route, identity, e)
            raise

    @router.post("/tokenize", openapi_extra=body_of(TokenizeBody), responses=answer_of(TokenizeAnswer))
    async def tokenize(request: Request) -> Response:
        """Token ids of a prompt or of a chat, and how many there are."""
        return await answer(request, "/tokenize", texts.tokenize)

    @router.post("/detokenize", openapi_extra=body_of(DetokenizeBody), responses=answer_of(DetokenizeAnswer))
    async def detokenize(request: Request) -> Response:
        """The text of token ids, special ones included."""
        return await answer(request, "/detokenize", texts.detokenize)

    @router.post("/v1/encode", openapi_extra=body_of(EncodeBody))
    async def encode(request: Request) -> Response:
        """Token ids of one text or of several, as LMDeploy documents it."""
        return await answer(request, "/v1/encode", texts.encode)

    @router.get("/tokenizer_info")
    async def tokenizer_info(request: Request, model: str | None = None) -> Response:
        """The names of the tokens that begin and end a text, as vLLM's route tells them."""
        tokenizer = service.only(model, request.state.identity).tokenizer
        return JSONResponse({"eos_token": tokenizer.eos_token, "bos_token": tokenizer.bos_token, "pad_token": None})

    @router.post(
        "/v1/messages/count_tokens",
        openapi_extra=body_of(CountBody),
        responses=anthropic_answer_of(CountAnswer),
        tags=["anthropic"],
    )
    async def count_tokens(request: Request) -> Response:
        """How many tokens the input of /v1/messages has."""
        return await answer(request, "/v1/messages/count_tokens", texts.count)

    @router.get("/version")
    async def show_version() -> Response:
        """The version of this server."""
        return JSONResponse({"version": version})

    return router


class _Texts:
    """The work behind the routes. All raise RequestError."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def tokenize(self, raw: bytes, identity: Identity) -> dict[str, Any]:
        body = await self._service.valid(TokenizeBody, raw)
        model = self._service.only(body.model, identity)
        if body.messages is not None:
            ids = await self._chat(model, identity, **body.as_chat())
        else:
            ids = await self._plain(model, body.prompt or "", body.add_special_tokens is not False)
        token_bytes = model.tokenizer.token_bytes
        names = [token_bytes(i).decode("utf-8", "replace") for i in ids] if body.return_token_strs else None
        return {"count": len(ids), "max_model_len": model.max_model_len, "tokens": ids, "token_strs": names}

    async def count(self, raw: bytes, identity: Identity) -> dict[str, Any]:
        body = await self._service.valid(CountBody, raw)
        model = self._service.model(body.model, identity)
        limit = CUT_CONTEXTS * model.max_model_len
        ids = await self._service.maker.rendered(body.chat, model, "/v1/messages", limit)
        return {"input_tokens": len(ids)}

    async def detokenize(self, raw: bytes, identity: Identity) -> dict[str, Any]:
        body = await self._service.valid(DetokenizeBody, raw)
        model = self._service.only(body.model, identity)
        check_ids(body.tokens, model.tokenizer.vocab_size, "tokens")
        text = await self._service.pool.run(
            len(body.tokens), lambda: model.tokenizer.decode(body.tokens, skip_special_tokens=False)
        )
        return {"prompt": text}

    async def encode(self, raw: bytes, identity: Identity) -> dict[str, Any]:
        body = await self._service.valid(EncodeBody, raw)
        model = self._service.only(body.model, identity)
        found = []
        for text in (body.input,) if isinstance(body.input, str) else body.input:
            if body.do_preprocess:
                found.append(await self._chat(model, identity, messages=[ChatMessage(role="user", content=text)]))
            else:
                found.append(await self._plain(model, text, body.add_bos is not False))
        if isinstance(body.input, str):
            return {"input_ids": found[0], "length": len(found[0])}
        return {"input_ids": found, "length": [len(ids) for ids in found]}

    async def _plain(self, model: ServedModel, text: str, add_special_tokens: bool) -> list[int]:
        tokenizer, limit = model.tokenizer, CUT_CONTEXTS * model.max_model_len
        return await self._service.pool.run(
            len(text), lambda: tokenizer.encode(text, limit=limit, add_special_tokens=add_special_tokens)
        )

    async def _chat(self, model: ServedModel, identity: Identity, **fields: Any) -> list[int]:
        body = ChatBody.model_construct(model=model.name, **fields)
        limit = CUT_CONTEXTS * model.max_model_len
        return list(await self._service.maker.rendered(body, model, "/v1/chat/completions", limit, identity))
