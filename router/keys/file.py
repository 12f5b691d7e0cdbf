"""The key file: YAML with one entry a key. Whatever is wrong with it is refused with its line.

    keys:
    - sha256: 9f86d081...   # of the key, 64 hex digits; the key itself is nowhere
      owner: anna           # whom its requests count for
      tier: gold            # optional
      models: [demo]        # optional; without it all models
      revoked: true         # optional
      admin: true           # optional: it opens /metrics, and what is said of others' requests

Reading it gives nobody a key, so others may read it. Who writes it makes keys, so no one but its owner may.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from router.keys.ring import KeyEntry, KeyRing
from workers.api.errors import ConfigError

DEFAULT_OWNER = "default"
MOST_BYTES = 16 << 20
DEEPEST = 16  # the C loader recurses, and a process whose stack is full is gone
NAME = r"^[A-Za-z0-9][A-Za-z0-9._@+-]{0,63}$"
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class KeyLine(BaseModel):
    """One entry as it is written."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    sha256: Annotated[str, Field(pattern="^[0-9a-fA-F]{64}$")]
    owner: Annotated[str, Field(pattern=NAME)]
    tier: Annotated[str, Field(pattern=NAME)] = ""
    models: list[Annotated[str, Field(min_length=1)]] | None = None
    revoked: bool = False
    admin: bool = False

    def entry(self) -> KeyEntry:
        """The same for the ring."""
        models = None if self.models is None else frozenset(self.models)
        return KeyEntry(bytes.fromhex(self.sha256), self.owner, self.tier, models, self.revoked, self.admin)


def read_key_file(path: Path) -> bytes:
    """What is in the file. Raises ConfigError: it cannot be read, or others than its owner may write it."""
    try:
        with path.open("rb") as f:
            mode = stat.S_IMODE(os.fstat(f.fileno()).st_mode)
            text = f.read(MOST_BYTES + 1)
    except OSError as e:
        raise ConfigError(f"cannot read the key file {path}: {e.strerror}") from e
    if mode & 0o022:
        raise ConfigError(f"{path} may be written by others, who could add keys to it: chmod go-w {path}")
    if len(text) > MOST_BYTES:
        raise ConfigError(f"{path} has more than {MOST_BYTES} bytes")
    return text


def parse_keys(text: bytes, source: str) -> KeyRing:
    """The keys of `text`. Raises ConfigError with `source`, line and reason for the first thing that is wrong."""
    return KeyRing(entry for entry, _ in located_keys(text, source))


def located_keys(text: bytes, source: str) -> list[tuple[KeyEntry, yaml.MappingNode]]:
    """The entries, each with its place in the text. Raises ConfigError as `parse_keys`."""
    try:
        _check_depth(text, source)
        root = yaml.compose(text, Loader=_LOADER)
    except yaml.MarkedYAMLError as e:
        line = e.problem_mark.line + 1 if e.problem_mark else 1
        raise ConfigError(f"{source}, line {line}: {e.problem or e.context}") from e
    except (yaml.YAMLError, UnicodeDecodeError) as e:
        raise ConfigError(f"{source}: not YAML in UTF-8: {e}") from e
    if root is None:
        raise ConfigError(f"{source}, line 1: the file is empty; a file without keys says 'keys: []'")
    fields = _fields(root, source)
    for name, node in fields.items():
        if name != "keys":
            raise _wrong(source, node, f"unknown: {name!r}; only 'keys' may stand here")
    keys = fields.get("keys")
    if not isinstance(keys, yaml.SequenceNode):
        raise _wrong(source, keys or root, "'keys' must be a list of entries")
    found: dict[bytes, tuple[KeyEntry, yaml.MappingNode]] = {}
    for node in keys.value:
        entry = _entry(node, source)
        if entry.digest in found:
            first = found[entry.digest][1].start_mark.line + 1
            raise _wrong(source, node, f"this key stands on line {first} already")
        found[entry.digest] = (entry, node)
    return list(found.values())


def _check_depth(text: bytes, source: str) -> None:
    depth = 0
    for event in yaml.parse(text, Loader=_LOADER):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > DEEPEST:
            line = event.start_mark.line + 1 if event.start_mark else 1
            raise ConfigError(f"{source}, line {line}: nested too deep")


def _entry(node: yaml.Node, source: str) -> KeyEntry:
    fields = _fields(node, source)
    values = {name: _value(value, source) for name, value in fields.items()}
    try:
        entry = KeyLine.model_validate(values).entry()
    except ValidationError as e:
        first = e.errors()[0]  # its input is not shown: it may be a whole key, put there by mistake
        place = fields.get(str(first["loc"][0]), node)
        raise _wrong(source, place, f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    if entry.owner == DEFAULT_OWNER:
        raise _wrong(source, fields["owner"], f"{DEFAULT_OWNER!r} is the owner of requests without keys: take another")
    return entry


def _fields(node: yaml.Node, source: str) -> dict[str, yaml.Node]:
    if not isinstance(node, yaml.MappingNode):
        raise _wrong(source, node, "must be a mapping of names to values")
    fields: dict[str, yaml.Node] = {}
    for key, value in node.value:
        name = key.value if isinstance(key, yaml.ScalarNode) else "a list or mapping as name"
        if name in fields:
            raise _wrong(source, key, f"{name!r} stands here twice")
        fields[name] = value
    return fields


def _value(node: yaml.Node, source: str) -> Any:
    try:
        return yaml.constructor.SafeConstructor().construct_document(node)
    except (yaml.YAMLError, ValueError) as e:  # such as a date with a month 13
        raise _wrong(source, node, "not a plain value") from e


def _wrong(source: str, node: yaml.Node, reason: str) -> ConfigError:
    return ConfigError(f"{source}, line {node.start_mark.line + 1}: {reason}")
