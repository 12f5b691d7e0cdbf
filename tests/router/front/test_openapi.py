"""openapi.json: what it says of answers is what the routes answer, and operations have names of their own."""

from __future__ import annotations

import json

from pydantic import BaseModel

from router.protocol.answer_schemas import (
    ChatAnswer,
    CompletionAnswer,
    CountAnswer,
    DetokenizeAnswer,
    ErrorBody,
    MessageAnswer,
    MessageErrorBody,
    ModelCard,
    ModelList,
    ResponseAnswer,
    TokenizeAnswer,
)

from .test_calls_elsewhere import ASKED, THOUGHT
from .test_other_apis import COUNT, HI, MESSAGES, RESPONSES
from .test_tools import TIME, WEATHER


async def test_answers_are_as_the_document_says(client):
    posts: list[tuple[str, dict, type[BaseModel]]] = [
        ("/v1/chat/completions", {"messages": HI, "logprobs": True, "n": 2}, ChatAnswer),
        ("/v1/completions", {"prompt": "x", "logprobs": 1}, CompletionAnswer),
        ("/tokenize", {"prompt": "x", "return_token_strs": True}, TokenizeAnswer),
        ("/detokenize", {"tokens": [40]}, DetokenizeAnswer),
        (RESPONSES, {"input": "hi", "metadata": {"a": "b"}, "max_output_tokens": 2}, ResponseAnswer),
        (MESSAGES, {"messages": HI, "max_tokens": 2}, MessageAnswer),
        (COUNT, {"messages": HI}, CountAnswer),
    ]
    document = (await client.get("/openapi.json")).json()
    for path, body, model in posts:
        model.model_validate_json((await client.post(path, json={"model": "m", **body})).content, strict=True)
        error = MessageErrorBody if path.startswith(MESSAGES) else ErrorBody
        error.model_validate_json((await client.post(path, json={"model": "nope", **body})).content, strict=True)
        answers = document["paths"][path]["post"]["responses"]
        assert answers["200"]["content"]["application/json"]["schema"]["$ref"].endswith("/" + model.__name__)
        assert answers["default"]["content"]["application/json"]["schema"]["$ref"].endswith(f"/{error.__name__}")
    ModelList.model_validate_json((await client.get("/v1/models")).content, strict=True)
    ModelCard.model_validate_json((await client.get("/v1/models/m")).content, strict=True)


async def test_calls_and_thoughts_are_as_the_document_says(tools_client, generator):
    generator.answer = THOUGHT
    asked = {**ASKED, "/v1/chat/completions": {"model": "m", "messages": HI, "tools": [WEATHER, TIME]}}
    async with tools_client(reasoning_parser="qwen3") as client:
        for path, model in (
            (RESPONSES, ResponseAnswer),
            (MESSAGES, MessageAnswer),
            ("/v1/chat/completions", ChatAnswer),
        ):
            answer = (await client.post(path, json=asked[path])).content
            said = model.model_validate_json(answer, strict=True).model_dump_json()
            assert all(words in said for words in ("Hm, well.", "Let me see.", "weather", "Oslo"))


async def test_operations_have_names_and_references_lead_somewhere(client):
    document = (await client.get("/openapi.json")).json()
    assert document["openapi"].startswith("3.1")
    operations = [one for path in document["paths"].values() for one in path.values()]
    names = [one["operationId"] for one in operations]
    assert len(set(names)) == len(names)
    assert {"chat_completions", "tokenize", "messages", "responses", "list_models"} <= set(names)
    schemas = document["components"]["schemas"]
    said = json.dumps(document)
    for part in said.split('"$ref": "')[1:]:
        reference = part.split('"')[0]
        assert reference.removeprefix("#/components/schemas/") in schemas, reference
