"""What openapi.json says of bodies that routes parse and of answers that they write, both by themselves."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from router.protocol.answer_schemas import ErrorBody, MessageErrorBody

Responses = dict[int | str, dict[str, Any]]
ERRORS: Responses = {"default": {"model": ErrorBody, "description": "What went wrong."}}  # of every route


def answer_of(model: type[BaseModel]) -> Responses:
    """What a route says of its answer in openapi.json."""
    return {200: {"model": model}}


def anthropic_answer_of(model: type[BaseModel]) -> Responses:
    """The same of a route whose errors are Anthropic's."""
    return {**answer_of(model), "default": {"model": MessageErrorBody, "description": "What went wrong."}}


def body_of(model: type[BaseModel]) -> dict[str, Any]:
    """What a route says of its body in openapi.json."""
    # The route parses its body itself, so that FastAPI does not know the schema; definitions go inline.
    schema = model.model_json_schema(mode="validation", ref_template="#/$defs/{model}")
    definitions = schema.pop("$defs", {})
    return {
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": _inlined(schema, definitions)}},
        }
    }


def _inlined(schema: Any, definitions: dict[str, Any]) -> Any:
    if isinstance(schema, dict):
        if "$ref" in schema:
            return _inlined(definitions[schema["$ref"].rsplit("/", 1)[1]], definitions)
        inlined = {k: _inlined(v, definitions) for k, v in schema.items()}
        if isinstance(properties := inlined.get("properties"), dict):
            for one in properties.values():
                # What is not given is not the same as what we take it for; and generators choke on empty arrays.
                if isinstance(one, dict):
                    one.pop("default", None)
        return inlined
    return [_inlined(v, definitions) for v in schema] if isinstance(schema, list) else schema
