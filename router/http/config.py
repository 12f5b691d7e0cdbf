"""What the front is told at its start."""

from __future__ import annotations

from dataclasses import dataclass, field

from router.parsers.calls import TOOL_PARSERS
from router.parsers.reasoning import REASONING_PARSERS
from router.protocol.json_entry import MAX_BODY_BYTES
from router.protocol.sampling import ModelFacts, RequestLimits
from router.text.tokenizer import Tokenizer
from workers.api.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Cors:
    """Which web pages may ask, as browsers see to it: `*` is all. The names are those of starlette's middleware."""

    allow_origins: tuple[str, ...]
    allow_credentials: bool = False
    allow_methods: tuple[str, ...] = ("*",)
    allow_headers: tuple[str, ...] = ("*",)


@dataclass(frozen=True, slots=True)
class FrontConfig:
    """Limits of the front. Bytes, counts and seconds."""

    max_body_bytes: int = MAX_BODY_BYTES
    body_seconds: float = 120.0  # for a whole body, however large
    body_grace_seconds: float = 10.0  # for its first bytes; from then on it must keep to `body_min_rate`
    body_min_rate: int = 4096  # bytes a second, over the whole time after the grace
    edge_secret: str = field(default="", repr=False)  # what the proxy in front shows; "" = there is none to be believed
    limits: RequestLimits = field(default_factory=RequestLimits)
    text_threads: int = 2
    cors: Cors | None = None  # None: no page but the server's own
    version: str = "0"  # shown by /version
    stalled_seconds: float = 60.0  # a client that reads nothing for so long is cut off
    pages: bool = False  # whether it shows the web pages, too
    session_ttl: float = 3600.0  # seconds that the history of an interactive session is kept after its last round
    max_sessions: int = 1000  # of an owner; the longest idle one makes room for a new one
    trust_request_chat_template: bool = False  # whether all may bring a chat template, not admins alone

    def __post_init__(self) -> None:
        if self.max_body_bytes < 1024:
            raise ConfigError(f"max_body_bytes must be at least 1024, got {self.max_body_bytes}")
        if self.text_threads < 1:
            raise ConfigError(f"text_threads must be at least 1, got {self.text_threads}")
        if self.max_sessions < 1:
            raise ConfigError(f"max_sessions must be at least 1, got {self.max_sessions}")
        for name in ("stalled_seconds", "body_seconds", "body_grace_seconds", "body_min_rate", "session_ttl"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name} must be positive, got {getattr(self, name)}")

    def body_deadline(self, received: int) -> float:
        """Seconds from a body's start until more than `received` bytes must be there."""
        return min(self.body_seconds, self.body_grace_seconds + received / self.body_min_rate)


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A name under which requests are taken, and how its text becomes tokens.

    `max_model_len` is in tokens, prompt and answer together; `target` is the engine's name of the model where it
    differs from the public `name`; `created` is in seconds since 1970. `tool_parser` and `reasoning_parser` are how its
    answers are read, see `router.parsers`; None: they are text.
    """

    name: str
    tokenizer: Tokenizer
    max_model_len: int
    created: int = 0
    target: str | None = None
    adapter: str | None = None
    tool_parser: str | None = None
    reasoning_parser: str | None = None

    def __post_init__(self) -> None:
        for kind, name, known in (
            ("tool_call_parser", self.tool_parser, TOOL_PARSERS),
            ("reasoning_parser", self.reasoning_parser, tuple(REASONING_PARSERS)),
        ):
            if name is not None and name not in known:
                raise ConfigError(f"{kind} {name!r} of {self.name} is not one of {', '.join(known)}")
        if not self.name:
            raise ConfigError("a served model needs a name")
        if self.max_model_len < 2:
            raise ConfigError(f"max_model_len of {self.name} must be at least 2, got {self.max_model_len}")

    @property
    def facts(self) -> ModelFacts:
        """What requests are checked against."""
        return ModelFacts(self.max_model_len, self.tokenizer.vocab_size, self.tokenizer.eos_ids)
