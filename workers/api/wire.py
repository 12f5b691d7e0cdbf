"""Frames between processes of a cluster: a 4-byte little-endian length, then msgpack of [code, *fields].

Never pickle. A message is a frozen dataclass; its fields travel in order, nested dataclasses as arrays. The first frame
of every connection is `Hello` with the cluster's secret. Transport lives in `workers.api.channel`.
"""

from __future__ import annotations

import dataclasses
import enum
import operator
import struct
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import msgpack

from workers.api.errors import WireError
from workers.api.ordering import ServiceReport, ServiceSync
from workers.api.replica import CacheNews, LoadReport, ReplicaInfo
from workers.api.request import Delta, EngineRequest

WIRE_VERSION = 4
MAX_FRAME_BYTES = 64 << 20
_LENGTH = struct.Struct("<I")
_AS_THEY_ARE = (None, ())  # whatever the type of their field

Convert = Callable[[Any], Any]


@dataclass(frozen=True, slots=True)
class Hello:
    """First frame of the side that dialled."""

    version: int
    secret: str
    name: str


@dataclass(frozen=True, slots=True)
class Ping:
    """Heartbeat; answered by nothing, any frame proves life."""


@dataclass(frozen=True, slots=True)
class Welcome:
    """First frame of an engine to whoever dialled it."""

    info: ReplicaInfo


@dataclass(frozen=True, slots=True)
class Submit:
    """Run these sequences."""

    requests: tuple[EngineRequest, ...]


@dataclass(frozen=True, slots=True)
class Abort:
    """Drop these sequences and free their blocks; each still gets its last delta."""

    request_ids: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class StepFrame:
    """One engine step: the deltas of the receiver's sequences, and the engine's load."""

    deltas: tuple[Delta, ...]
    load: LoadReport


def _is_dataclass_type(kind: Any) -> bool:
    return isinstance(kind, type) and dataclasses.is_dataclass(kind)


def _each(convert: Convert, into: Callable[[Any], Any]) -> Convert:
    return lambda v: into([convert(x) for x in v])


def _converters(kind: Any) -> tuple[Convert | None, Convert | None]:
    """(to wire, from wire) for one annotated type; None where the value travels as it is."""
    origin = typing.get_origin(kind)
    if origin in (typing.Union, types.UnionType):
        inner = [a for a in typing.get_args(kind) if a is not type(None)]
        if len(inner) != 1:
            raise TypeError(f"{kind} cannot travel: a union may only add None")
        return _converters(inner[0])  # None itself is never converted
    if origin is tuple:
        args = typing.get_args(kind)
        if len(args) == 2 and args[1] is Ellipsis:
            put, get = _converters(args[0])
            return (
                None if put is None else _each(put, list),
                None if get is None else _each(get, tuple),
            )
        return None, None
    if _is_dataclass_type(kind):
        return _record(kind)
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return (lambda v: v.value), kind
    return None, None


def _record(cls: type[Any]) -> tuple[Convert, Convert]:
    hints = typing.get_type_hints(cls)
    names = [f.name for f in dataclasses.fields(cls)]
    pairs = [_converters(hints[n]) for n in names]
    puts = [(i, p[0]) for i, p in enumerate(pairs) if p[0] is not None]
    gets = [(i, p[1]) for i, p in enumerate(pairs) if p[1] is not None]
    arity = len(names)

    fetch = operator.attrgetter(*names) if arity > 1 else lambda value: [getattr(value, n) for n in names]

    def put(value: Any) -> list[Any]:
        fields = list(fetch(value))
        for i, p in puts:
            if fields[i]:  # None, (), 0 and "" travel as they are
                fields[i] = p(fields[i])
        return fields

    def get(fields: Any) -> Any:
        if len(fields) != arity:
            raise WireError(f"{cls.__name__} has {arity} fields, the frame {len(fields)}: versions differ?")
        if not gets:
            return cls(*fields)
        values = list(fields)
        for i, g in gets:
            if values[i] not in _AS_THEY_ARE:
                values[i] = g(values[i])
        return cls(*values)

    return put, get


class FrameCodec:
    """Encodes and decodes the messages of one kind of connection. `messages` maps code -> dataclass."""

    def __init__(self, messages: Mapping[int, type[Any]]) -> None:
        records = {code: _record(cls) for code, cls in messages.items()}
        self._put = {cls: (code, records[code][0]) for code, cls in messages.items()}
        self._get = {code: get for code, (_, get) in records.items()}

    def encode(self, message: Any) -> bytes:
        """The whole frame of `message`, length included."""
        code, put = self._put[type(message)]
        body: bytes = msgpack.packb([code, *put(message)])
        if len(body) > MAX_FRAME_BYTES:
            raise WireError(f"a {type(message).__name__} of {len(body)} bytes is over {MAX_FRAME_BYTES}")
        return _LENGTH.pack(len(body)) + body

    def decode(self, body: bytes | memoryview) -> Any:
        """The message in the body of a frame. Raises WireError on anything else."""
        try:
            code, *fields = msgpack.unpackb(body, use_list=False)
            return self._get[code](fields)
        except WireError:
            raise
        except (ValueError, TypeError, KeyError, msgpack.UnpackException) as e:
            raise WireError(f"not a frame: {type(e).__name__}: {e}") from e


class FrameSplitter:
    """Cuts a byte stream into frame bodies of at most `limit` bytes, without I/O."""

    def __init__(self, limit: int = MAX_FRAME_BYTES) -> None:
        self.limit = limit  # may change from frame to frame
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Bodies that `data` completes. Raises WireError when a length is over the limit."""
        buffer = self._buffer
        buffer += data
        at, end = 0, len(buffer)
        try:
            while end - at >= 4:
                (length,) = _LENGTH.unpack_from(buffer, at)
                if length > self.limit:
                    raise WireError(f"a frame of {length} bytes is over {self.limit}")
                if end - at - 4 < length:
                    break
                body = bytes(buffer[at + 4 : at + 4 + length])
                at += 4 + length
                yield body
        finally:
            del buffer[:at]


BASE_MESSAGES: dict[int, type[Any]] = {0: Hello, 1: Ping}
ENGINE_CODEC = FrameCodec(
    {
        **BASE_MESSAGES,
        2: Welcome,
        3: Submit,
        4: Abort,
        5: StepFrame,
        6: CacheNews,
        7: ServiceReport,
        8: ServiceSync,
    }
)
