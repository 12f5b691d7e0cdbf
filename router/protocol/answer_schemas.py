"""What openapi.json says of answers. The routes write them by themselves (`router.protocol.answers`, ...); a test holds
both together.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field


class Error(BaseModel):
    """What went wrong; `param` names the field that is at fault."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """Every refusal and failure."""

    error: Error


class PromptTokensDetails(BaseModel):
    """Of the prompt's tokens."""

    cached_tokens: int


class UsageBody(BaseModel):
    """Tokens, for the bill."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class CalledFunction(BaseModel):
    """A function and its arguments, which are JSON as text."""

    name: str
    arguments: str


class AnswerCall(BaseModel):
    """A tool call."""

    id: str
    type: Literal["function"]
    function: CalledFunction


class AnswerMessage(BaseModel):
    """An answer: its text, the calls, and the thoughts before them, where there are any."""

    role: Literal["assistant"]
    content: str | None
    reasoning_content: str | None = None
    tool_calls: list[AnswerCall] | None = None


class ChatChoice(BaseModel):
    """One of the answers; `token_ids` where `return_token_ids` asks for them."""

    index: int
    message: AnswerMessage
    finish_reason: str
    logprobs: dict[str, Any] | None = None
    token_ids: list[int] | None = None


class ChatAnswer(BaseModel):
    """A chat's answer. A stream brings `chat.completion.chunk` objects as server-sent events instead."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: UsageBody
    prompt_token_ids: list[int] | None = None


class TextChoice(BaseModel):
    """One of the continuations; ids where `return_token_ids` asks for them."""

    index: int
    text: str
    finish_reason: str
    logprobs: dict[str, Any] | None = None
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None


class CompletionAnswer(BaseModel):
    """Continuations. A stream brings objects of the same kind as server-sent events instead."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChoice]
    usage: UsageBody


class ModelCard(BaseModel):
    """A model that is served; `max_model_len` is in tokens, where it is known."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int | None = None


class ModelList(BaseModel):
    """The models that the caller may use."""

    object: Literal["list"]
    data: list[ModelCard]


class TokenizeAnswer(BaseModel):
    """Token ids; `token_strs` where they were asked for."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class DetokenizeAnswer(BaseModel):
    """The text of token ids."""

    prompt: str


class OutputText(BaseModel):
    """The text of a message."""

    type: Literal["output_text"]
    text: str
    annotations: list[Any]
    logprobs: list[Any]


class OutputMessage(BaseModel):
    """What the model says."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    status: str
    content: list[OutputText]


class ReasoningText(BaseModel):
    """The text of thoughts."""

    type: Literal["reasoning_text"]
    text: str


class OutputReasoning(BaseModel):
    """What the model thinks."""

    id: str
    type: Literal["reasoning"]
    status: str
    summary: list[Any]
    content: list[ReasoningText]
    encrypted_content: None


class OutputCall(BaseModel):
    """A function that the model calls; `arguments` are JSON as text, `call_id` is what the result goes to."""

    id: str
    type: Literal["function_call"]
    status: str
    call_id: str
    name: str
    arguments: str


class InputTokensDetails(BaseModel):
    """Of the prompt's tokens."""

    cached_tokens: int
    cache_write_tokens: int


class OutputTokensDetails(BaseModel):
    """Of the answer's tokens."""

    reasoning_tokens: int


class ResponseUsage(BaseModel):
    """Tokens, for the bill."""

    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class IncompleteDetails(BaseModel):
    """Why an answer was cut."""

    reason: Literal["max_output_tokens"]


class ResponseAnswer(BaseModel):
    """A response. A stream brings events instead, of which the last has it."""

    id: str
    object: Literal["response"]
    created_at: int
    model: str
    status: Literal["completed", "incomplete"]
    error: None
    incomplete_details: IncompleteDetails | None
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, str]
    output: list[Annotated[OutputMessage | OutputReasoning | OutputCall, Field(discriminator="type")]]
    parallel_tool_calls: bool
    temperature: float
    top_p: float
    text: dict[str, Any]
    reasoning: dict[str, Any]
    tool_choice: str | dict[str, Any]
    tools: list[dict[str, Any]]
    usage: ResponseUsage


class MessageText(BaseModel):
    """What the model says."""

    type: Literal["text"]
    text: str


class MessageThinking(BaseModel):
    """What the model thinks; the signature is empty."""

    type: Literal["thinking"]
    thinking: str
    signature: str


class MessageToolUse(BaseModel):
    """A function that the model calls."""

    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]


class MessageTokensDetails(BaseModel):
    """Of the answer's tokens."""

    thinking_tokens: int


class MessageUsage(BaseModel):
    """Tokens, for the bill; `input_tokens` are those that no cache had."""

    input_tokens: int
    cache_creation_input_tokens: int
    cache_read_input_tokens: int
    output_tokens: int
    output_tokens_details: MessageTokensDetails


class MessageAnswer(BaseModel):
    """A message. A stream brings Anthropic's events instead."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[Annotated[MessageText | MessageThinking | MessageToolUse, Field(discriminator="type")]]
    stop_reason: Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"]
    stop_sequence: str | None
    usage: MessageUsage


class CountAnswer(BaseModel):
    """How many tokens there are."""

    input_tokens: int


class MessageError(BaseModel):
    """What went wrong."""

    type: str
    message: str


class MessageErrorBody(BaseModel):
    """Every refusal and failure on Anthropic's routes."""

    type: Literal["error"]
    error: MessageError
