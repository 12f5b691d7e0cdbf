"""Fields of vLLM's two bodies that are not done here: taken where they ask for nothing, else refused by name.

`WHY` says what there is in their place. Those that mean something here are fields of `router.protocol.openai`.
"""

from __future__ import annotations

from typing import Any

from router.protocol.strict import Harmless, is_false, is_nothing


def _one_of(*values: Any) -> Harmless:
    return lambda v: v is None or (v in values and not isinstance(v, bool))


def _is_boolean(value: Any) -> bool:
    return value is None or isinstance(value, bool)


def _is_text(value: Any) -> bool:
    return value is None or isinstance(value, str)


_TEXT_ONLY = "prompts are text"
_ONE_PLACE = "a prompt is computed where its answer is"
_BOTH: dict[str, tuple[Harmless, str]] = {
    "spaces_between_special_tokens": (_is_boolean, "it is true or false"),  # tokenizers here put none, or their own
    "session_id": (_is_text, "it is a string"),  # prefixes are found by their tokens
    "guided_decoding_backend": (_is_text, "it is a string"),  # there is one
    "return_mm_kwargs": (_is_boolean, "it is true or false"),
    "detokenize": (lambda v: v is None or v is True, "'return_token_ids' shows ids beside the text"),
    "logits_processors": (
        is_nothing,
        "requests bring no code: there are 'logit_bias', 'bad_words', 'allowed_token_ids' and 'structured_outputs'",
    ),
    "repetition_detection": (is_nothing, "there are 'repetition_penalty' and 'frequency_penalty'"),
    "thinking_token_budget": (_one_of(-1), "'max_tokens' counts thoughts and answer together"),
    "stream_interval": (_one_of(1), "events come as steps end"),
    "watermarking": (is_false, "answers bear no marks"),
    "vllm_xargs": (is_nothing, "there are no extensions that would read it"),
    "kv_transfer_params": (is_nothing, _ONE_PLACE),
    "ec_transfer_params": (is_nothing, _ONE_PLACE),
    "routed_experts_prompt_start": (_one_of(0), "which experts were taken is not shown"),
    "return_token_offsets": (is_false, "offsets are in 'logprobs' of /v1/completions"),
    "media_io_kwargs": (is_nothing, _TEXT_ONLY),
    "mm_processor_kwargs": (is_nothing, _TEXT_ONLY),
}
_CHAT: dict[str, tuple[Harmless, str]] = {
    "echo": (is_false, "'continue_final_message' goes on with the last message"),
    "add_special_tokens": (is_false, "the chat template writes them"),
    "return_prompt_text": (is_false, "'return_token_ids' shows the prompt's ids"),
    "best_of": (_one_of(1), "it is for /v1/completions"),
}
_COMPLETION: dict[str, tuple[Harmless, str]] = {
    "prompt_embeds": (is_nothing, "prompts are text or token ids"),
}
CHAT_EXTRAS: dict[str, Harmless] = {name: harmless for name, (harmless, _) in {**_BOTH, **_CHAT}.items()}
COMPLETION_EXTRAS: dict[str, Harmless] = {name: harmless for name, (harmless, _) in {**_BOTH, **_COMPLETION}.items()}
WHY: dict[str, str] = {name: why for name, (_, why) in {**_BOTH, **_CHAT, **_COMPLETION}.items()}
