"""Seeded JSON schemas of the kinds that clients send: objects, enums, arrays, strings, numbers, unions, references."""

from __future__ import annotations

from random import Random
from typing import Any

Schema = dict[str, Any]
NAMES = [
    "name",
    "title",
    "city",
    "country",
    "street",
    "id",
    "kind",
    "status",
    "note",
    "summary",
    "author",
    "email",
    "date",
    "price",
    "count",
    "total",
    "age",
    "weight",
    "score",
    "tags",
    "items",
    "children",
    "parent",
    "owner",
    "address",
    "phone",
    "url",
    "colour",
    "size",
    "language",
    "currency",
    "reason",
    "result",
]
PATTERNS = (r"^[A-Z]{2}[0-9]{4}$", r"^[a-z]+(-[a-z]+)?$", r"^#[0-9a-f]{6}$", r"^v[0-9]+\.[0-9]+$")
FORMATS = ("date", "date-time", "time", "email", "uuid", "ipv4")


class Writer:
    """Writes one schema; `has_free` tells whether it holds a string or an array without a bound."""

    def __init__(self, random: Random) -> None:
        self._random = random
        self._definitions: Schema = {}
        self.has_free = False

    def schema(self) -> Schema:
        made = self._object(0)
        if self._definitions:
            made["$defs"] = self._definitions
        return made

    def _object(self, depth: int) -> Schema:
        random = self._random
        names = random.sample(NAMES, random.randint(1, 5 if depth < 2 else 3))
        made: Schema = {"type": "object", "properties": {name: self._any(depth + 1) for name in names}}
        required = [name for name in names if random.random() < 0.7]
        if required:
            made["required"] = required
        if random.random() < 0.9:
            made["additionalProperties"] = False
        return made

    def _any(self, depth: int) -> Schema:
        random = self._random
        leaves = (self._string, self._string, self._number, self._enum, self._formatted, self._boolean)
        branches = (self._object, self._array, self._array, self._union, self._reference)
        if depth > 3 or random.random() < 0.55:
            return random.choice(leaves)()
        return random.choice(branches)(depth)

    def _string(self) -> Schema:
        made: Schema = {"type": "string"}
        if self._random.random() < 0.3:
            made["maxLength"] = self._random.choice((5, 20, 80))
            if self._random.random() < 0.5:
                made["minLength"] = 2
        else:
            self.has_free = True
        return made

    def _formatted(self) -> Schema:
        if self._random.random() < 0.5:
            return {"type": "string", "pattern": self._random.choice(PATTERNS)}
        return {"type": "string", "format": self._random.choice(FORMATS)}

    def _number(self) -> Schema:
        made: Schema = {"type": self._random.choice(("integer", "integer", "number"))}
        if self._random.random() < 0.7:
            made["minimum"] = self._random.randint(-50, 50)
            made["maximum"] = made["minimum"] + self._random.choice((3, 40, 5000))
        return made

    def _enum(self) -> Schema:
        values: list[Any] = self._random.sample(NAMES, self._random.randint(1, 6))
        return {"const": values[0]} if len(values) == 1 else {"enum": [*values, None, 7][: len(values) + 1]}

    def _boolean(self) -> Schema:
        return {"type": self._random.choice(("boolean", "null", "boolean"))}

    def _array(self, depth: int) -> Schema:
        made: Schema = {"type": "array", "items": self._any(depth + 1)}
        if self._random.random() < 0.4:
            made["maxItems"] = self._random.randint(1, 6)
            made["minItems"] = self._random.randint(0, made["maxItems"])
        else:
            self.has_free = True
        return made

    def _union(self, depth: int) -> Schema:
        return {"anyOf": [self._any(depth + 1) for _ in range(self._random.randint(2, 3))]}

    def _reference(self, depth: int) -> Schema:
        name = f"part{len(self._definitions)}"
        self._definitions[name] = {}
        made = self._object(max(depth + 1, 2))
        if self._random.random() < 0.4:  # it may hold itself
            made["properties"]["next"] = {"anyOf": [{"$ref": f"#/$defs/{name}"}, {"type": "null"}]}
            made.setdefault("required", []).append("next")
        self._definitions[name] = made
        return {"$ref": f"#/$defs/{name}"}


def schemas(count: int, seed: int = 0) -> list[tuple[Schema, bool]]:
    """`count` schemas, each with whether it has a free string or array."""
    made = []
    for i in range(count):
        writer = Writer(Random(f"{seed}/{i}"))
        made.append((writer.schema(), writer.has_free))
    return made
