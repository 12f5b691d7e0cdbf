"""What openapi.json says of bodies that routes parse by themselves."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel


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
        return {k: _inlined(v, definitions) for k, v in schema.items()}
    return [_inlined(v, definitions) for v in schema] if isinstance(schema, list) else schema
