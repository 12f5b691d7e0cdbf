"""A JSON or YAML file with the line on which each of its values stands."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from workers.api.errors import ConfigError

Place = tuple[str | int, ...]  # keys and indices from the root of the file

_MOST_BYTES = 4 << 20
_DEEPEST = 32


@dataclass(frozen=True, slots=True)
class Source:
    """What a file says (`values`), and where: `lines` has the line of each value's key, or of its list entry."""

    name: str
    values: Any
    lines: dict[Place, int]

    def line(self, place: Place) -> int:
        """The line of `place`, or of the nearest thing around it that stands in the file."""
        while place and place not in self.lines:
            place = place[:-1]
        return self.lines.get(place, 1)

    def error(self, problems: list[tuple[Place, str]]) -> ConfigError:
        """All `problems`, one a line, as FILE:LINE: what is wrong and what to do, in the order of the file."""
        rows = sorted((self.line(place), number, text) for number, (place, text) in enumerate(problems))
        return ConfigError("\n".join(f"{self.name}:{line}: {text}" for line, _, text in rows))


def shown(text: object) -> str:
    """`text` as part of a message: one line of at most 64 printable characters."""
    return "".join(c if c.isprintable() else "?" for c in str(text)[:64])


def read_source(path: Path) -> Source:
    """The file at `path`. Raises ConfigError."""
    try:
        with path.open("rb") as file:
            data = file.read(_MOST_BYTES + 1)
    except OSError as e:
        raise ConfigError(f"cannot read {path}: {e.strerror}") from e
    if len(data) > _MOST_BYTES:
        raise ConfigError(f"{path} has more than {_MOST_BYTES >> 20} MiB: it is not a QoS configuration")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        line = data[: e.start].count(b"\n") + 1
        raise ConfigError(f"{path}:{line}: byte {e.start} is not UTF-8: save the file as UTF-8") from e
    return parse_source(text, str(path), as_json=path.suffix.lower() == ".json")


def parse_source(text: str, name: str, *, as_json: bool) -> Source:
    """`text` as the file `name`. Raises ConfigError with the line of what is not JSON or YAML, or is there twice."""
    try:
        if as_json:
            values = json.loads(text, parse_constant=_refuse_constant)
            # Valid JSON has raw tabs only between its tokens; without them it is YAML, whose parser knows the lines.
            text = text.replace("\t", " ")
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        lines = _lines(root, name)
        if not as_json:
            values = yaml.safe_load(text)
    except json.JSONDecodeError as e:
        raise ConfigError(f"{name}:{e.lineno}: not JSON at column {e.colno}: {e.msg}") from e
    except yaml.MarkedYAMLError as e:
        mark = e.problem_mark or e.context_mark
        raise ConfigError(f"{name}:{mark.line + 1 if mark else 1}: not YAML: {e.problem or e.context}") from e
    except (yaml.YAMLError, ValueError) as e:
        raise ConfigError(f"{name}:1: {e}") from e
    except RecursionError as e:
        raise ConfigError(f"{name}:1: nested too deep: a QoS configuration has no more than {_DEEPEST} levels") from e
    return Source(name, values, lines)


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a number in JSON: write a finite one")


def _lines(root: yaml.Node | None, name: str) -> dict[Place, int]:
    lines: dict[Place, int] = {}
    seen: set[int] = set()

    def visit(node: yaml.Node, place: Place) -> None:
        line = node.start_mark.line + 1
        lines.setdefault(place, line)
        if isinstance(node, yaml.ScalarNode):
            return
        if id(node) in seen:  # aliases of aliases grow without end
            raise ConfigError(f"{name}:{line}: a YAML alias repeats what stands here: write it out")
        if len(place) > _DEEPEST:
            raise ConfigError(f"{name}:{line}: nested too deep: no more than {_DEEPEST} levels are read")
        seen.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            for index, item in enumerate(node.value):
                visit(item, (*place, index))
        elif isinstance(node, yaml.MappingNode):
            _visit_mapping(node, place)

    def _visit_mapping(node: yaml.MappingNode, place: Place) -> None:
        for key, value in node.value:
            inner = (*place, str(key.value))
            line = key.start_mark.line + 1
            if inner in lines:
                raise ConfigError(
                    f"{name}:{line}: '{shown(key.value)}' stands on line {lines[inner]} already: keep one"
                )
            lines[inner] = line
            visit(value, inner)

    if root is not None:
        visit(root, ())
    return lines
