"""Bodies of /v1/chat/completions and /v1/completions.

Strict: no type is guessed, no unknown field passes. A field set to null counts as not given. What OpenAI documents and
this server does not do yet is refused by name, unless its value asks for nothing (`tools: []`, `best_of: 1`, ...).
Accepted without effect on the answer: `user` (it divides its owner's turn in the queue), `metadata`,
`safety_identifier`, `prompt_cache_key`, `prompt_cache_retention`, `store: false`, `service_tier: auto|default`. Beyond
OpenAI there are the fields that vLLM's users know; those of them that are not done are in `router.protocol.extras`.
"""

from __future__ import annotations

from functools import cached_property
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, StringConstraints, model_validator

from router.protocol.beams import asked_beams, check_beams
from router.protocol.extras import CHAT_EXTRAS, COMPLETION_EXTRAS, WHY
from router.protocol.fields import (
    AllowedIds,
    BadWords,
    Content,
    Documents,
    LogitBias,
    LogprobIds,
    Penalty,
    Prompt,
    Stop,
    Template,
    TemplateVariables,
    TokenIds,
)
from router.protocol.strict import Harmless, Strict, is_false, is_nothing
from router.protocol.structured import (
    AskedGrammar,
    GuidedFields,
    Path,
    ResponseFormat,
    StructuredOutputs,
    asked_grammar,
)
from router.protocol.tools import MAX_TOOLS, Tool, ToolCall, ToolChoice, Tools, check_choice, required_grammar
from router.protocol.validation import Refused
from workers.api.request import MAX_LENGTH_PENALTY, BeamParams

MAX_MESSAGES = 2048
MAX_N = 128
MAX_TOKENS = 2**31 - 1
MAX_BEST_OF = 20
MAX_SALT = 1024
MAX_SUFFIX_CHARACTERS = 1 << 20


def _no_control(value: str) -> str:
    if not value.isprintable():
        raise Refused("Invalid '{param}': control characters are not allowed.")
    return value


def _service_tier(value: str) -> str:
    if value not in ("auto", "default"):
        raise Refused("Invalid service_tier argument. Supported values are: 'auto', 'default'.")
    return value


def _few(value: Any) -> Any:
    if isinstance(value, dict) and len(value) > 16:
        raise Refused("Invalid '{param}': too many properties. Expected an object with at most 16 properties.")
    return value


def _metadata(value: dict[str, str]) -> dict[str, str]:
    for key, text in value.items():
        if len(key) > 64 or len(text) > 512:
            raise Refused(
                "Invalid '{param}': keys have at most 64 characters, values 512.", code="string_above_max_length"
            )
    return value


Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
Label = Annotated[str, Field(max_length=512), AfterValidator(_no_control)]
Metadata = Annotated[dict[str, str], BeforeValidator(_few), AfterValidator(_metadata)]
ServiceTier = Annotated[str, AfterValidator(_service_tier)]


class StreamOptions(Strict):
    """What a stream carries besides text."""

    not_done: ClassVar[dict[str, Harmless]] = {"include_obfuscation": is_false}

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None  # in every event: what was made so far


class ChatMessage(Strict):
    """One message. Fields that clients send back from an answer (`refusal: null`, ...) are taken when empty."""

    not_done: ClassVar[dict[str, Harmless]] = dict.fromkeys(
        ("function_call", "refusal", "audio", "annotations"), is_nothing
    )

    @model_validator(mode="before")
    @classmethod
    def _role_first(cls, data: Any) -> Any:
        # A message of a role that is not served has fields of its own: the role is what is wrong, not they.
        if not isinstance(data, dict):
            return data
        if data.get("role") == "function":
            raise Refused(
                "Invalid value: 'function'. Supported values are: 'system', 'developer', 'user', 'assistant', 'tool'.",
                at=("role",),
            )
        if data.get("role") == "assistant" and data.get("tool_calls") and data.get("content") is None:
            return {**data, "content": ""}
        return data

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content
    name: Annotated[str, StringConstraints(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")] | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=MAX_TOOLS)] | None = None
    tool_call_id: Annotated[str, Field(max_length=256)] | None = None
    reasoning_content: str | None = None  # of an answer that is sent back: templates may show it
    reasoning: str | None = None  # the same, as newer clients call it

    @model_validator(mode="after")
    def _of_its_role(self) -> Self:
        if self.tool_calls and self.role != "assistant":
            raise Refused("'{param}' is only allowed in messages of role 'assistant'.", at=("tool_calls",))
        if (self.tool_call_id is not None) != (self.role == "tool"):
            if self.role == "tool":
                raise Refused(
                    "Missing required parameter: '{param}'.", code="missing_required_parameter", at=("tool_call_id",)
                )
            raise Refused("'{param}' is only allowed in messages of role 'tool'.", at=("tool_call_id",))
        return self

    def as_template(self) -> dict[str, Any]:
        """As chat templates take it; None where a field is not given. Raises Refused."""
        shown: dict[str, Any] = {"role": self.role, "content": self.content, "name": self.name}
        if self.tool_calls:
            shown["tool_calls"] = [call.as_template(("tool_calls", i)) for i, call in enumerate(self.tool_calls)]
        if self.tool_call_id is not None:
            shown["tool_call_id"] = self.tool_call_id
        if self.reasoning_content or self.reasoning:
            shown["reasoning_content"] = self.reasoning_content or self.reasoning
        return shown


class Common(GuidedFields):
    """What both endpoints take."""

    why: ClassVar[dict[str, str]] = WHY

    model: str
    max_tokens: Annotated[int, Field(ge=1, le=MAX_TOKENS)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_N)] | None = None
    stop: Stop = ()
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: LogitBias = ()
    user: Label | None = None
    metadata: Metadata | None = None
    service_tier: ServiceTier | None = None
    safety_identifier: Label | None = None
    prompt_cache_key: Label | None = None
    prompt_cache_retention: Label | None = None

    top_k: Annotated[int, Field(ge=-1, le=MAX_TOKENS)] | None = None  # -1 and 0: off
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=10)] | None = None
    min_tokens: Annotated[int, Field(ge=0, le=MAX_TOKENS)] | None = None
    stop_token_ids: TokenIds = ()
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    return_token_ids: bool | None = None  # of prompts and answers
    return_tokens_as_token_ids: bool | None = None  # where log-probabilities name tokens
    allowed_token_ids: AllowedIds = ()  # () = all
    logprob_token_ids: LogprobIds = ()  # whose log-probabilities are shown; () = the likeliest
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    bad_words: BadWords = ()
    prompt_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    truncate_prompt_tokens: Annotated[int, Field(ge=1, le=MAX_TOKENS)] | None = None  # so many are kept
    truncation_side: Literal["left", "right"] | None = None  # where they are cut; None: left
    request_id: Annotated[str, StringConstraints(pattern=r"^[a-zA-Z0-9._-]{1,128}$")] | None = None
    cache_salt: Annotated[str, Field(min_length=1, max_length=MAX_SALT)] | None = None
    priority: Annotated[int, Field(ge=-(2**31), le=2**31 - 1)] | None = None  # the least goes first
    use_beam_search: bool | None = None  # with as many beams as choices
    length_penalty: Annotated[float, Field(ge=-MAX_LENGTH_PENALTY, le=MAX_LENGTH_PENALTY)] | None = None

    def place(self, at: Path) -> Path:
        """Where what stands at `at` here stands in the body that this was made from."""
        return at

    @property
    def asked_tokens(self) -> int | None:
        """Tokens asked for each choice; None = as many as fit."""
        return self.max_tokens

    @property
    def asked_logprobs(self) -> int | None:
        """Alternatives wanted beside each drawn token; None = no log-probabilities at all."""
        raise NotImplementedError

    @property
    def asked_prompt_logprobs(self) -> int | None:
        """The same of the prompt's tokens."""
        return self.prompt_logprobs

    @property
    def asked_choices(self) -> int:
        """Answers made for each prompt; no fewer than are shown."""
        return self.n or 1

    @property
    def beams(self) -> BeamParams | None:
        """The search that stands in the place of draws, if one does."""
        return asked_beams(self)

    @property
    def usage_in_chunks(self) -> bool:
        """Whether a stream tells of its usage."""
        options = self.stream_options
        return options is not None and bool(options.include_usage or options.continuous_usage_stats)

    @cached_property
    def asked_grammar(self) -> AskedGrammar | None:
        """What the answer must look like, if that is said."""
        return asked_grammar(self.response_format, self.structured_outputs, self)

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if self.asked_grammar is not None and self.allowed_token_ids:
            raise Refused("'{param}' and structured output exclude each other.", at=("allowed_token_ids",))
        if self.logprob_token_ids and self.asked_logprobs is None:
            raise Refused("'{param}' is only allowed when 'logprobs' is enabled.", at=("logprob_token_ids",))
        if self.stream_options is not None and not self.stream:
            raise Refused(
                "The 'stream_options' parameter is only allowed when 'stream' is enabled.",
                code=None,
                at=("stream_options",),
            )
        if self.stream and self.asked_prompt_logprobs is not None and self.asked_choices > 1:
            raise Refused(
                "Unsupported parameter: in a stream log-probabilities of the prompt come with n = 1 only.",
                code="unsupported_parameter",
                at=("prompt_logprobs" if self.prompt_logprobs is not None else "echo",),
            )
        if self.min_tokens and self.asked_tokens is not None and self.min_tokens > self.asked_tokens:
            raise Refused(
                f"Invalid '{{param}}': expected a value <= max_tokens ({self.asked_tokens}), "
                f"but got {self.min_tokens} instead.",
                at=("min_tokens",),
            )
        check_beams(self)
        return self


class ChatBody(Common):
    """POST /v1/chat/completions."""

    not_done: ClassVar[dict[str, Harmless]] = {
        **CHAT_EXTRAS,
        **dict.fromkeys(("functions", "audio", "prediction", "web_search_options", "moderation"), is_nothing),
        "store": is_false,
        "modalities": lambda v: v is None or v == ["text"],
        "function_call": lambda v: v in (None, "none", "auto"),
        "verbosity": lambda v: v in (None, "medium"),
    }

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: Annotated[int, Field(ge=1, le=MAX_TOKENS)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template: Template = None  # of the request's own, for admins
    chat_template_kwargs: TemplateVariables = Field(default_factory=dict)
    documents: Documents | None = None  # that the template may show
    include_reasoning: bool | None = None  # False: thoughts are left out
    tools: Tools | None = None
    tool_choice: ToolChoice = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: Effort | None = None

    @property
    def thinks(self) -> bool | None:
        """Whether there are to be thoughts; None: as the chat template has it."""
        return False if self.reasoning_effort == "none" else None

    def check_grammar(self) -> None:
        """Raises Refused where `asked_grammar` does, at the place in the body that this was made from."""
        try:
            _ = self.asked_grammar
        except Refused as e:
            raise Refused(str(e), code=e.code, at=self.place(e.at)) from None

    @property
    def offered_tools(self) -> list[Tool]:
        """Those that the answer may call."""
        return [] if self.tool_choice == "none" else self.tools or []

    @cached_property
    def asked_grammar(self) -> AskedGrammar | None:
        """What the answer must look like, if that is said; a call that is required goes before other formats."""
        check_choice(self.tools or [], self.tool_choice)
        parallel = self.parallel_tool_calls is not False
        required = required_grammar(self.offered_tools, self.tool_choice, parallel=parallel)
        own = super().asked_grammar
        if required is not None and own is not None:
            raise Refused(
                "'{param}' that requires a call and structured output exclude each other.", at=("tool_choice",)
            )
        return required or own

    @property
    def asked_tokens(self) -> int | None:
        """`max_completion_tokens`, or its older name."""
        return self.max_completion_tokens if self.max_tokens is None else self.max_tokens

    @property
    def asked_logprobs(self) -> int | None:
        """Of each token drawn."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @model_validator(mode="after")
    def _agree_chat(self) -> Self:
        for i, message in enumerate(self.messages):
            for j, call in enumerate(message.tool_calls or ()):
                call.as_template(("messages", i, "tool_calls", j))
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise Refused(
                "Setting 'max_tokens' and 'max_completion_tokens' at the same time is not supported.",
                code="invalid_parameter_combination",
                at=("max_tokens",),
            )
        if self.top_logprobs is not None and not self.logprobs:
            raise Refused(
                "The 'top_logprobs' parameter is only allowed when 'logprobs' is enabled.", at=("top_logprobs",)
            )
        if self.continue_final_message:
            if self.add_generation_prompt:
                raise Refused(
                    "'continue_final_message' and 'add_generation_prompt' exclude each other.",
                    at=("continue_final_message",),
                )
            if self.messages[-1].role != "assistant":
                raise Refused(
                    "'continue_final_message' needs a final message of role 'assistant'.",
                    at=("continue_final_message",),
                )
        return self


class CompletionBody(Common):
    """POST /v1/completions. Without `max_tokens` an answer has at most 16 tokens, as OpenAI documents."""

    not_done: ClassVar[dict[str, Harmless]] = {**COMPLETION_EXTRAS, "store": is_false}

    prompt: Prompt
    echo: bool | None = None
    add_special_tokens: bool | None = None  # to prompts that are text; None: yes
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    best_of: Annotated[int, Field(ge=1, le=MAX_BEST_OF)] | None = None
    suffix: Annotated[str, Field(max_length=MAX_SUFFIX_CHARACTERS)] | None = None

    @property
    def asked_choices(self) -> int:
        """`best_of` are made, of which n are shown."""
        return self.best_of or self.n or 1

    @property
    def asked_tokens(self) -> int | None:
        """Tokens for each choice."""
        return 16 if self.max_tokens is None else self.max_tokens

    @property
    def asked_logprobs(self) -> int | None:
        """Of each token drawn."""
        return self.logprobs

    @property
    def asked_prompt_logprobs(self) -> int | None:
        """As asked for, or as many as of the answer where the prompt is echoed."""
        asked = [self.prompt_logprobs, self.logprobs if self.echo else None]
        return max((n for n in asked if n is not None), default=None)

    @model_validator(mode="after")
    def _agree_completion(self) -> Self:
        if self.best_of is not None and self.best_of < (self.n or 1):
            raise Refused(
                f"Invalid '{{param}}': expected a value >= n ({self.n}), but got {self.best_of} instead.",
                at=("best_of",),
            )
        if self.stream and self.best_of is not None and self.best_of > (self.n or 1):
            raise Refused(
                "Invalid '{param}': which answers are best is known at their end, so that they cannot be streamed.",
                at=("best_of",),
            )
        if self.suffix and self.echo:
            raise Refused("'suffix' and 'echo' exclude each other.", at=("suffix",))
        return self
