"""Any OpenAI-compatible server as a target: `/v1/completions` with token ids (or text), streamed."""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import aiohttp

from load.records import Record, Run
from load.work import Pacing, Work

NO_LIMIT = aiohttp.ClientTimeout(total=None, sock_connect=30, sock_read=600)


class HttpTarget:
    """`url` ends before `/v1` or with it. `model` None: the first one that the server lists.

    `text`: send prompts through `decode` as text, for servers that do not take ids. `ignore_eos` False: for servers
    that refuse the parameter; answers may then end early.
    """

    def __init__(
        self, url: str, model: str | None, *, decode: Callable[[Sequence[int]], str] | None, ignore_eos: bool = True
    ) -> None:
        self._base = url.rstrip("/").removesuffix("/v1") + "/v1"
        self._model, self._decode, self._ignore_eos = model, decode, ignore_eos
        key = os.environ.get("OPENAI_API_KEY")
        self._headers = {"authorization": f"Bearer {key}"} if key else {}

    def run(self, work: Sequence[Work], pacing: Pacing, done: Callable[[], None]) -> Run:
        """One repeat; `done` is called as each request ends. A failed request's reason is in its record."""
        return asyncio.run(self._run(work, pacing, done))

    def machine(self) -> dict[str, Any]:
        """What is known of the other side."""
        return {"url": self._base, "model": self._model}

    async def _run(self, work: Sequence[Work], pacing: Pacing, done: Callable[[], None]) -> Run:
        slots = asyncio.Semaphore(pacing.concurrency or len(work))
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(connector=connector, headers=self._headers, timeout=NO_LIMIT) as session:
            self._model = self._model or await self._first_model(session)
            begin = time.perf_counter()

            async def send(request: Work, at: float) -> Record:
                await asyncio.sleep(max(0.0, begin + at - time.perf_counter()))
                async with slots:
                    record = await self._ask(session, request)
                done()
                return record

            pairs = zip(work, pacing.arrivals(len(work)), strict=True)
            records = await asyncio.gather(*(send(request, at) for request, at in pairs))
            return Run(list(records), time.perf_counter() - begin)

    async def _first_model(self, session: aiohttp.ClientSession) -> str:
        try:
            async with session.get(f"{self._base}/models") as answer:
                listed = await answer.json(content_type=None)
                return str(listed["data"][0]["id"])
        except (aiohttp.ClientError, ValueError, LookupError, TypeError) as exc:
            raise SystemExit(f"{self._base}/models does not list a model ({exc!r}): name it with --model") from exc

    async def _ask(self, session: aiohttp.ClientSession, request: Work) -> Record:
        body: dict[str, Any] = {
            "model": self._model,
            "prompt": self._decode(request.prompt) if self._decode else list(request.prompt),
            "max_tokens": request.out,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self._ignore_eos:
            body["ignore_eos"] = True
        record = Record(len(request.prompt), time.perf_counter())
        try:
            async with session.post(f"{self._base}/completions", json=body) as answer:
                if answer.status != 200:
                    record.error = f"{answer.status}: {(await answer.text())[:300]}"
                    return record
                async for line in answer.content:
                    self._event(record, line)
        except (aiohttp.ClientError, TimeoutError) as exc:
            record.error = repr(exc)
        if not record.error and not record.tokens:
            record.error = "the stream ended without usage: does the server know stream_options.include_usage?"
        return record

    @staticmethod
    def _event(record: Record, line: bytes) -> None:
        if not line.startswith(b"data:") or line.startswith(b"data: [DONE]"):
            return
        # Parsing every chunk would measure this program: only the last ones have what is needed.
        if b'"error"' in line[:64]:
            record.error = line.decode("utf-8", "replace")[:300]
        elif b'"usage"' in line and b'"completion_tokens"' in line:
            usage = json.loads(line[5:])["usage"]
            record.tokens, record.prompt_tokens = usage["completion_tokens"], usage["prompt_tokens"]
            record.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
        elif b'"text"' in line:
            record.times.append(time.perf_counter())
