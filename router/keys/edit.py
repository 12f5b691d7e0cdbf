"""Changes of a key file: one entry is added or marked, all other text stays as it was written."""

from __future__ import annotations

import dataclasses
import os
import re
import stat
from collections.abc import Callable, Sequence
from pathlib import Path

import yaml
from pydantic import ValidationError

from router.keys.file import KeyLine, located_keys, read_key_file
from router.keys.ring import PREFIX, KeyEntry, digest_of
from workers.api.errors import ConfigError

HEADER = b"# API keys by their SHA-256. `echelon keys` changes this file; a running server reads it again.\nkeys:\n"
LEAST_ID = 6  # digits of a digest that may name a key
_NO_KEYS = re.compile(rb"^keys:[ \t]*\[[ \t]*\]", re.MULTILINE)


def add_key(
    path: Path, key: str, owner: str, *, tier: str = "", models: Sequence[str] | None = None, admin: bool = False
) -> KeyEntry:
    """Append the entry of `key`; a file that is not there is made for its owner alone. Raises ConfigError."""
    fields: dict[str, object] = {"sha256": digest_of(key.encode()).hex(), "owner": owner}
    fields |= {"tier": tier} if tier else {}
    fields |= {"models": list(models)} if models is not None else {}
    fields |= {"admin": True} if admin else {}
    try:
        entry = KeyLine.model_validate(fields).entry()
    except ValidationError as e:
        first = e.errors()[0]
        raise ConfigError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None

    def appended() -> tuple[bytes, tuple[KeyEntry, ...]]:
        if not path.exists():
            return HEADER + _lines(fields, 0), (entry,)
        text = read_key_file(path)
        known = located_keys(text, str(path))
        text = _NO_KEYS.sub(b"keys:", text, count=1)
        text += b"" if text.endswith(b"\n") else b"\n"
        # Entries of a list start in one column, each with its dash.
        first = text.splitlines()[known[0][1].start_mark.line] if known else b""
        depth = len(first) - len(first.lstrip(b" "))
        return text + _lines(fields, depth), (*(e for e, _ in known), entry)

    _replace(path, appended)
    return entry


def revoke_key(path: Path, key: str) -> KeyEntry:
    """Mark one key as revoked; `key` is its id, more or fewer digits of its digest, or itself. Raises ConfigError."""
    wanted = digest_of(key.encode()).hex() if key.startswith(PREFIX) else key.lower()
    marked: list[KeyEntry] = []

    def changed() -> tuple[bytes, tuple[KeyEntry, ...]]:
        text = read_key_file(path)
        known = located_keys(text, str(path))
        found = [(e, node) for e, node in known if e.digest.hex().startswith(wanted)]
        if len(found) != 1 or len(wanted) < LEAST_ID:
            raise ConfigError(f"{len(found)} keys of {path} are meant; `echelon keys list` shows the ids of all")
        ((entry, node),) = found
        marked.append(dataclasses.replace(entry, revoked=True))
        lines = text.splitlines(keepends=True)
        if not entry.revoked:
            lines.insert(node.start_mark.line + 1, b" " * node.start_mark.column + b"revoked: true\n")
        return b"".join(lines), tuple(marked[0] if e is entry else e for e, _ in known)

    _replace(path, changed)
    return marked[0]


def _lines(fields: dict[str, object], depth: int) -> bytes:
    def shown(value: object) -> str:
        return yaml.safe_dump([value], default_flow_style=True, width=1 << 20, allow_unicode=True).strip()[1:-1]

    text = "".join(f"  {name}: {shown(value)}\n" for name, value in fields.items())
    return "".join(" " * depth + line for line in ("- " + text[2:]).splitlines(keepends=True)).encode()


def _replace(path: Path, change: Callable[[], tuple[bytes, tuple[KeyEntry, ...]]]) -> None:
    """The text that `change` makes replaces the file in one step, if it says what is wanted. Raises ConfigError."""
    target = path.resolve()
    beside = target.with_name(target.name + ".new")
    try:
        # Made before the old text is read: while it is there, no other command changes the file.
        with open(beside, "xb", opener=lambda name, flags: os.open(name, flags, 0o600)) as f:
            try:
                text, wanted = change()
                _check(path, text, wanted)
                f.write(text)
                if target.exists():
                    os.fchmod(f.fileno(), stat.S_IMODE(target.stat().st_mode))
                f.flush()
                os.fsync(f.fileno())
                beside.replace(target)
            except BaseException:
                beside.unlink(missing_ok=True)
                raise
    except FileExistsError as e:
        raise ConfigError(f"{beside} is there: another command writes, or was cut off; then remove it") from e
    except OSError as e:
        raise ConfigError(f"cannot write {path}: {e.strerror}") from e


def _check(path: Path, text: bytes, wanted: tuple[KeyEntry, ...]) -> None:
    reason = ""
    try:
        if tuple(e for e, _ in located_keys(text, str(path))) == wanted:
            return
    except ConfigError as e:
        reason = f" ({e})"
    raise ConfigError(f"{path} is written in a way that this command does not change: edit it by hand{reason}")
