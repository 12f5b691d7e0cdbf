"""A table of bad requests and the answer to each; after every one a normal request is answered right."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from .fakes import ANSWER, SPECIALS

CHAT, COMPLETION, INTERACTIVE = "/v1/chat/completions", "/v1/completions", "/v1/chat/interactive"
HI = {"role": "user", "content": "hi"}
BASE = {
    CHAT: {"model": "m", "messages": [HI], "max_tokens": 4},
    COMPLETION: {"model": "m", "prompt": "hi"},
    INTERACTIVE: {"model": "m", "prompt": "hi", "request_output_len": 4},
}


class Gone:
    """Stands for a field that is not sent."""

    def __repr__(self) -> str:
        return "left out"


GONE = Gone()
ANY = "any code"


@dataclass
class Case:
    name: str
    status: int
    change: dict[str, Any] | None = None  # of the base body; GONE removes
    code: str | None = None
    param: str | None = None
    path: str = CHAT
    method: str = "POST"
    raw: bytes | None = None
    headers: dict[str, str] = field(default_factory=dict)
    says: str = ""

    def body(self) -> bytes:
        if self.raw is not None:
            return self.raw
        merged = {**BASE.get(self.path, BASE[CHAT]), **(self.change or {})}
        return json.dumps({k: v for k, v in merged.items() if v is not GONE}).encode()


def bad(name, change, code, param, status=400, **more):
    return Case(name, status, change, code, param, **more)


def good(name, change, **more):
    return Case(name, 200, change, **more)


JSON = {"content-type": "application/json"}
GOOD_RAW = json.dumps(BASE[CHAT]).encode()

ROUTING = [
    Case("get chat", 405, method="GET", code="method_not_supported"),
    Case("put", 405, method="PUT", code="method_not_supported"),
    Case("delete", 405, method="DELETE", code="method_not_supported"),
    Case("patch", 405, method="PATCH", code="method_not_supported"),
    Case("trace", 405, method="TRACE", code="method_not_supported"),
    Case("propfind", 405, method="PROPFIND", code="method_not_supported"),
    Case("long method", 405, method="A" * 5000, code="method_not_supported"),
    Case("post models", 405, method="POST", path="/v1/models", code="method_not_supported"),
    Case("no such url", 404, path="/v1/nope", code="unknown_url", says="Invalid URL (POST /v1/nope)"),
    Case("double slash", 404, path="//v1/chat/completions", code="unknown_url"),
    Case("case", 404, path="/V1/chat/completions", code="unknown_url"),
    Case("trailing slash", 404, path="/v1/chat/completions/", code="unknown_url"),
    Case("unknown model card", 404, method="GET", path="/v1/models/nope", code="model_not_found", param="model"),
    Case("text/plain", 415, raw=GOOD_RAW, headers={"content-type": "text/plain"}),
    Case("form", 415, raw=b"a=b", headers={"content-type": "application/x-www-form-urlencoded"}),
    Case("multipart", 415, raw=b"--x--", headers={"content-type": "multipart/form-data; boundary=x"}),
    Case("no content type is JSON", 200, raw=GOOD_RAW, headers={"content-type": ""}),
    Case("utf-7", 415, raw=GOOD_RAW, headers={"content-type": "application/json; charset=utf-7"}),
    Case("utf-16", 415, raw=GOOD_RAW, headers={"content-type": 'application/json; charset="UTF-16"'}),
    Case("utf-8", 200, raw=GOOD_RAW, headers={"content-type": 'Application/JSON; charset="UTF-8"'}),
    Case("gzip", 415, raw=GOOD_RAW, headers={"content-encoding": "gzip"}),
    Case("accept html", 200, raw=GOOD_RAW, headers={"accept": "text/html", "accept-encoding": "*;q=0"}),
    Case("override", 200, raw=GOOD_RAW, headers={"x-http-method-override": "GET"}),
    Case("preflight", 403, method="OPTIONS", headers={"origin": "http://evil", "access-control-request-method": "POST"},
         code="other_site"),
    Case("upgrade", 200, raw=GOOD_RAW, headers={"upgrade": "h2c"}),
]  # fmt: skip

BODIES = [
    Case("half an object", 400, raw=b"{", says="We could not parse the JSON body of your request"),
    Case("empty", 400, raw=b"", says="We could not parse"),
    Case("a list", 400, raw=b"[]", says="We could not parse"),
    Case("deep", 400, raw=b'{"model":' + b"[" * 100_000, says="We could not parse"),
    Case("NaN", 400, raw=b'{"model":"m","messages":[],"temperature":NaN}', says="We could not parse"),
    Case("1e999", 400, raw=b'{"model":"m","messages":[],"temperature":1e999}', says="We could not parse"),
    Case("surrogate", 400, raw=b'{"model":"\\ud800"}', says="We could not parse"),
    Case("duplicate", 400, raw=b'{"model":"m","model":"x"}', says="We could not parse"),
    Case("10 MB of spaces", 413, raw=b" " * (10 << 20), code="request_too_large"),
    Case("10 MB message", 413, {"messages": [{"role": "user", "content": "a" * (10 << 20)}]}, "request_too_large"),
    Case("400,000 keys", 400, raw=b"{" + b",".join(b'"%d":1' % i for i in range(400_000)) + b"}",
         code="unknown_parameter", param="0"),
    Case("__proto__", 400, {"__proto__": {}}, "unknown_parameter", "__proto__"),
    Case("__class__", 400, {"__class__": 1}, "unknown_parameter", "__class__"),
    Case("64 KB key", 400, {"k" * 65536: 1}, "unknown_parameter", "k" * 61 + "..."),
    good("NUL in content", {"messages": [{"role": "user", "content": "a\x00b"}]}),
]  # fmt: skip

PRESENCE = [
    bad("no model", {"model": GONE}, "missing_required_parameter", "model"),
    bad("no messages", {"messages": GONE}, "missing_required_parameter", "messages"),
    *(bad(f"model {v!r}", {"model": v}, "invalid_type", "model") for v in (1, None, [], True)),
    *(
        bad(f"model {v[:20]!r}", {"model": v}, "model_not_found", "model", status=404)
        for v in ("", "x" * 1_000_000, "m\x00", "../../etc/passwd")
    ),
    bad("no chat model", {"model": "org/base"}, None, "model", status=404, says="This is not a chat model"),
    bad("unknown field", {"foo": 1}, "unknown_parameter", "foo"),
    *(
        bad(name, {name: value}, "unknown_parameter", name)
        for name, value in {
            "prompt_embeds": "AA", "lora_path": "/etc", "suffix": "x", "use_tqdm": False,
        }.items()
    ),
    *(bad(f"temperature {v!r}", {"temperature": v}, "invalid_type", "temperature") for v in ("0.5", [], {}, True)),
    *(bad(f"stream {v!r}", {"stream": v}, "invalid_type", "stream") for v in ("true", 1)),
    *(bad(f"max_tokens {v!r}", {"max_tokens": v}, "invalid_type", "max_tokens") for v in ("4", 4.0, 4.5, True, [])),
    good("stream null", {"stream": None}),
    *(bad(f"messages {v!r}", {"messages": v}, "invalid_type", "messages") for v in ({}, "hi", None)),
    *(bad(f"messages {v!r}", {"messages": v}, "invalid_type", "messages[0]") for v in ([1], [None], ["hi"], [[]])),
    good("all null", dict.fromkeys((
        "max_tokens", "max_completion_tokens", "temperature", "top_p", "n", "stop", "stream", "stream_options", "seed",
        "presence_penalty", "frequency_penalty", "logit_bias", "logprobs", "top_logprobs", "user", "metadata", "store",
        "service_tier", "safety_identifier", "prompt_cache_key", "top_k", "min_p", "repetition_penalty", "min_tokens",
        "stop_token_ids", "ignore_eos", "skip_special_tokens", "allowed_token_ids", "truncate_prompt_tokens",
        "request_id", "cache_salt", "add_generation_prompt", "continue_final_message", "tools", "tool_choice",
        "parallel_tool_calls", "response_format", "modalities", "audio", "prediction", "reasoning_effort", "verbosity",
        "web_search_options", "functions", "function_call", "bad_words", "prompt_logprobs",
        "chat_template_kwargs", "prompt_cache_retention",
    ))),
    good("values that ask for nothing", {
        "tools": [], "response_format": {"type": "text"}, "tool_choice": "none", "store": False, "modalities": ["text"],
        "parallel_tool_calls": True, "service_tier": "auto", "metadata": {"a": "b"}, "user": "u-1", "stop": [],
    }),
    *(
        bad(f"not done: {name}", {name: value}, "unsupported_parameter", name)
        for name, value in {
            "audio": {"voice": "x"}, "modalities": ["text", "audio"], "store": True,
            "functions": [{"name": "f"}], "prediction": {"type": "content", "content": "x"},
            "reasoning_effort": "high", "documents": [{"text": "x"}],
            "mm_processor_kwargs": {"a": 1}, "media_io_kwargs": {"image": {}}, "logits_processors": ["os.system"],
            "kv_transfer_params": {"do_remote_decode": True}, "ec_transfer_params": {"a": 1}, "vllm_xargs": {"a": 1},
            "repetition_detection": {"max_pattern_size": 9}, "thinking_token_budget": 9,
            "stream_interval": 2,
            "watermarking": True, "routed_experts_prompt_start": 1, "return_token_offsets": True, "echo": True,
            "add_special_tokens": True, "return_prompt_text": True, "detokenize": False, "best_of": 2,
            "spaces_between_special_tokens": 1, "session_id": 1, "guided_decoding_backend": 1, "return_mm_kwargs": "x",
        }.items()
    ),
    bad("embeds", {"prompt_embeds": "AA"}, "unsupported_parameter", "prompt_embeds", path=COMPLETION,
        says="prompts are text or token ids"),
    good("vLLM's defaults", {
        "mm_processor_kwargs": {}, "media_io_kwargs": None, "logits_processors": [], "kv_transfer_params": {},
        "vllm_xargs": {}, "logprob_token_ids": None, "repetition_detection": None, "thinking_token_budget": -1,
        "stream_interval": 1, "watermarking": False, "routed_experts_prompt_start": 0, "return_token_offsets": False,
        "echo": False, "add_special_tokens": False, "return_prompt_text": None, "detokenize": True, "best_of": 1,
        "spaces_between_special_tokens": True, "session_id": "s", "guided_decoding_backend": "xgrammar",
        "return_mm_kwargs": True, "use_beam_search": False, "length_penalty": 1.0, "priority": 0,
        "include_stop_str_in_output": False, "truncation_side": "left",
        "include_reasoning": True, "reasoning_effort": "none", "return_token_ids": False, "documents": [],
        "return_tokens_as_token_ids": False, "skip_special_tokens": True,
    }),
    *(bad(f"priority {v!r}", {"priority": v}, code, "priority") for v, code in (
        (2**31, "integer_above_max_value"), (-(2**31) - 1, "integer_below_min_value"), ("1", "invalid_type"),
        (1.0, "invalid_type"), (True, "invalid_type"), ([], "invalid_type"),
    )),
    *(bad(f"chat_template {str(v)[:9]!r}", {"chat_template": v}, code, "chat_template") for v, code in (
        ("", "string_below_min_length"), (1, "invalid_type"), ("x" * 65_537, "string_above_max_length"),
    )),
    *(bad(f"documents {str(v)[:9]!r}", {"documents": v}, code, param) for v, code, param in (
        ("x", "invalid_type", "documents"), ([1], "invalid_type", "documents[0]"),
        ([{"a": 1}], "invalid_type", "documents[0].a"), ([{}] * 257, "array_above_max_length", "documents"),
    )),
    *(bad(f"logprob_token_ids {str(v)[:9]}", {"logprobs": True, "logprob_token_ids": v}, code, param)
      for v, code, param in (
        ([], "empty_array", "logprob_token_ids"), ("1", "invalid_type", "logprob_token_ids"),
        ({}, "invalid_type", "logprob_token_ids"), (7, "invalid_type", "logprob_token_ids"),
        ([1, "2"], "invalid_type", "logprob_token_ids[1]"), ([True], "invalid_type", "logprob_token_ids[0]"),
        ([1.0], "invalid_type", "logprob_token_ids[0]"), ([None], "invalid_type", "logprob_token_ids[0]"),
        ([-1], "integer_below_min_value", "logprob_token_ids[0]"), ([2**63], "invalid_value", "logprob_token_ids"),
        ([302], "invalid_value", "logprob_token_ids"), ([0] * 129, "array_above_max_length", "logprob_token_ids"),
    )),
    good("named tokens", {"logprobs": True, "logprob_token_ids": [*range(126), 0, 301]}),
    bad("named tokens of no log-probabilities", {"logprob_token_ids": [1]}, "invalid_value", "logprob_token_ids"),
    bad("named tokens of a beam search", {"use_beam_search": True, "logprobs": True, "logprob_token_ids": [1]},
        "invalid_value", "logprob_token_ids"),
    bad("too many named tokens in all", {
        "logprobs": True, "logprob_token_ids": [*range(128)], "n": 64, "max_tokens": 200,
    }, "invalid_value", "logprob_token_ids"),
    bad("named tokens, logprobs false", {"logprobs": False, "logprob_token_ids": [1]}, "invalid_value",
        "logprob_token_ids"),
    bad("named tokens of no log-probabilities", {"logprob_token_ids": [1]}, "invalid_value", "logprob_token_ids",
        path=COMPLETION),
    *(bad(f"return_token_ids {v!r}", {"return_token_ids": v}, "invalid_type", "return_token_ids")
      for v in (1, "true", [], {})),
    bad("effort", {"reasoning_effort": "much"}, "invalid_value", "reasoning_effort"),
    bad("side", {"truncation_side": "middle"}, "invalid_value", "truncation_side"),
    bad("two guides", {"guided_regex": "a", "guided_choice": ["b"]}, "invalid_value", "guided_regex"),
    bad("guided and structured", {"guided_regex": "a", "structured_outputs": {"regex": "a"}}, "invalid_value",
        "structured_outputs"),
    bad("guided and a format", {"guided_regex": "a", "response_format": {"type": "json_object"}}, "invalid_value",
        "structured_outputs"),
    bad("guided nonsense", {"guided_regex": "("}, "invalid_value", "guided_regex"),
    bad("guided schema", {"guided_json": {"properties": {"a": {"not": {}}}}}, "invalid_value",
        "guided_json.properties.a"),
    good("a beam search", {
        "use_beam_search": True, "n": 4, "temperature": 0, "length_penalty": -0.5, "top_p": 0.5, "seed": 1, "stop": [],
        "presence_penalty": 0, "repetition_penalty": 1.0, "logit_bias": {}, "min_tokens": 2, "ignore_eos": True,
    }),
    good("the best of a beam search", {"use_beam_search": True, "n": 2, "best_of": 6, "echo": True}, path=COMPLETION),
    *(bad(f"a beam search with {name}", {"use_beam_search": True, name: value}, "invalid_value", name)
      for name, value in {
        "temperature": 0.7, "presence_penalty": 0.1, "frequency_penalty": -1, "repetition_penalty": 1.1,
        "logit_bias": {"1": 1}, "allowed_token_ids": [1, 2], "bad_words": ["x"], "stop": "x",
    }.items()),
    bad("a beam search with a grammar", {"use_beam_search": True, "guided_regex": "a"}, "invalid_value",
        "use_beam_search"),
    bad("33 beams", {"use_beam_search": True, "n": 33}, "integer_above_max_value", "n"),
    bad("a penalty without a search", {"length_penalty": 0.5}, "invalid_value", "length_penalty"),
    *(bad(f"length_penalty {v!r}", {"use_beam_search": True, "length_penalty": v}, code, "length_penalty")
      for v, code in ((11, "decimal_above_max_value"), (-10.5, "decimal_below_min_value"), ("1", "invalid_type"),
                      (True, "invalid_type"))),
    *(bad(f"use_beam_search {v!r}", {"use_beam_search": v}, "invalid_type", "use_beam_search")
      for v in (1, "true", [])),
    bad("a suffix for a model that fills nothing in", {"suffix": "x"}, "invalid_value", "suffix", path=COMPLETION),
    good("completion values that ask for nothing", {"best_of": 1, "suffix": None, "use_beam_search": False},
         path=COMPLETION),
    bad("suffix and echo", {"suffix": "x", "echo": True}, "invalid_value", "suffix", path=COMPLETION),
    bad("suffix 2 MB", {"suffix": "x" * (2 << 20)}, "string_above_max_length", "suffix", path=COMPLETION),
    *(bad(f"bad_words {str(v)[:20]}", {"bad_words": v}, code, param) for v, code, param in (
        ("x", "invalid_type", "bad_words"), ({}, "invalid_type", "bad_words"),
        ([1], "invalid_type", "bad_words[0]"), (["a", None], "invalid_type", "bad_words[1]"),
        ([""], "invalid_value", "bad_words[0]"), (["x" * 65], "string_above_max_length", "bad_words[0]"),
        (["x"] * 129, "array_above_max_length", "bad_words"), ([["x"]], "invalid_type", "bad_words[0]"),
    )),
    good("bad words of every kind", {
        "bad_words": ["hello", " hello", "\n", "<|im_end|>", "\x00", "🏴", "{{7}}", "e\u0301"],
    }),
    *(bad(f"chat_template_kwargs {str(v)[:20]}", {"chat_template_kwargs": v}, code, "chat_template_kwargs")
      for v, code in (
        ([], "invalid_type"), ("x", "invalid_type"), ({"messages": []}, "invalid_value"), ({"": 1}, "invalid_value"),
        ({"tools": []}, "invalid_value"), ({"a b": 1}, "invalid_value"), ({"x" * 65: 1}, "invalid_value"),
        ({f"a{i}": 1 for i in range(65)}, "invalid_value"), ({"chat_template": "{{1}}"}, "invalid_value"),
    )),
    good("chat_template_kwargs that nobody reads", {
        "chat_template_kwargs": {"enable_thinking": False, "bos_token": "x"},
    }),
    bad("metadata list", {"metadata": []}, "invalid_type", "metadata"),
    bad("17 metadata", {"metadata": {str(i): "" for i in range(17)}}, "invalid_value", "metadata"),
    bad("metadata many", {"metadata": {str(i): i for i in range(100_000)}}, "invalid_value", "metadata"),
    bad("513 characters", {"metadata": {"a": "x" * 513}}, "string_above_max_length", "metadata"),
    bad("metadata number", {"metadata": {"a": 1}}, "invalid_type", "metadata.a"),
]  # fmt: skip

RANGES = [
    bad("hot", {"temperature": 2.0001}, "decimal_above_max_value", "temperature",
        says="Expected a value <= 2, but got 2.0001 instead."),
    bad("cold", {"temperature": -0.1}, "decimal_below_min_value", "temperature"),
    bad("1e308", {"temperature": 1e308}, "decimal_above_max_value", "temperature"),
    bad("200", {"temperature": 200}, "decimal_above_max_value", "temperature",
        says="Expected a value <= 2, but got 200 instead."),
    good("-0.0", {"temperature": -0.0}),
    good("5e-324", {"temperature": 5e-324}),
    bad("top_p 1.0001", {"top_p": 1.0001}, "decimal_above_max_value", "top_p"),
    bad("top_p 5", {"top_p": 5}, "decimal_above_max_value", "top_p", says="Expected a value <= 1, but got 5"),
    *(bad(f"top_p {v}", {"top_p": v}, ANY, "top_p", says="Expected a value > 0") for v in (0, -1)),
    *(bad(f"n {v}", {"n": v}, "integer_below_min_value", "n") for v in (0, -1)),
    *(bad(f"n {v}", {"n": v}, "integer_above_max_value", "n") for v in (129, 10**9, 2**63, 2**64)),
    *(bad(f"max_tokens {v}", {"max_tokens": v}, "integer_below_min_value", "max_tokens") for v in (0, -1)),
    *(bad(f"max_tokens {v}", {"max_tokens": v}, "integer_above_max_value", "max_tokens") for v in (2**31, 2**63)),
    bad("both maxima", {"max_completion_tokens": 4}, "invalid_parameter_combination", "max_tokens"),
    bad("min over max", {"min_tokens": 5}, "invalid_value", "min_tokens"),
    bad("5 stops", {"stop": list("abcde")}, "array_above_max_length", "stop"),
    bad("empty stop", {"stop": ""}, "invalid_value", "stop"),
    bad("empty stop in list", {"stop": ["a", ""]}, "invalid_value", "stop[1]"),
    bad("stop null", {"stop": [None]}, "invalid_type", "stop"),
    bad("stop number", {"stop": 1}, "invalid_type", "stop"),
    bad("10 KB stop", {"stop": "x" * 10240}, "string_above_max_length", "stop"),
    good("4 equal stops", {"stop": ["zz"] * 4}),
    *(
        bad(f"{name} {v}", {name: v}, ANY, name)
        for name in ("presence_penalty", "frequency_penalty")
        for v in (2.1, -2.1, "1")
    ),
    *(bad(f"repetition {v}", {"repetition_penalty": v}, ANY, "repetition_penalty") for v in (0, -1, 1e-40, 1e10)),
    *(
        bad(f"bias {k}", {"logit_bias": {k: 1}}, "invalid_value", "logit_bias")
        for k in ("abc", "-1", "1.5", "", "01", "1e1", "５", str(2**40), "100000", "361")
    ),
    *(bad(f"bias value {v!r}", {"logit_bias": {"1": v}}, ANY, "logit_bias") for v in (101, -101, 1e300, "1", True)),
    bad("biases", {"logit_bias": {str(i): 1 for i in range(100_000)}}, "invalid_value", "logit_bias"),
    bad("bias list", {"logit_bias": [1]}, "invalid_type", "logit_bias"),
    *(bad(f"seed {v}", {"seed": v}, "integer_above_max_value", "seed") for v in (2**63, 2**64)),
    bad("seed 1.5", {"seed": 1.5}, "invalid_type", "seed"),
    good("seed -1", {"seed": -1}),
    bad("top_logprobs 21", {"logprobs": True, "top_logprobs": 21}, "integer_above_max_value", "top_logprobs"),
    bad("top_logprobs -1", {"logprobs": True, "top_logprobs": -1}, "integer_below_min_value", "top_logprobs"),
    bad("top_logprobs alone", {"top_logprobs": 2}, "invalid_value", "top_logprobs"),
    bad("logprobs number", {"logprobs": 1}, "invalid_type", "logprobs"),
    *(
        bad(f"logprobs {v}", {"logprobs": v}, "integer_above_max_value", "logprobs", path=COMPLETION)
        for v in (6, 10**6)
    ),
    good("echo and logprobs", {"echo": True, "logprobs": 1}, path=COMPLETION),
    bad("echo and logprobs of two in a stream", {"echo": True, "logprobs": 1, "stream": True, "n": 2},
        "unsupported_parameter", "echo", path=COMPLETION),
    good("prompt_logprobs", {"prompt_logprobs": 20}, path=COMPLETION),
    bad("prompt_logprobs of two in a stream", {"prompt_logprobs": 0, "stream": True, "n": 2}, "unsupported_parameter",
        "prompt_logprobs", path=COMPLETION),
    bad("prompt_logprobs 21", {"prompt_logprobs": 21}, "integer_above_max_value", "prompt_logprobs", path=COMPLETION),
    good("prompt_logprobs of a chat", {"prompt_logprobs": 1}),
    bad("best_of 10^6", {"best_of": 10**6}, "integer_above_max_value", "best_of", path=COMPLETION),
    bad("best_of true", {"best_of": True}, "invalid_type", "best_of", path=COMPLETION),
    bad("best_of 0", {"best_of": 0}, "integer_below_min_value", "best_of", path=COMPLETION),
    bad("best_of below n", {"best_of": 2, "n": 3}, "invalid_value", "best_of", path=COMPLETION),
    bad("best_of in a stream", {"best_of": 2, "stream": True}, "invalid_value", "best_of", path=COMPLETION),
    bad("best_of x prompts", {"best_of": 20, "prompt": ["x"] * 7}, "array_above_max_length", "prompt", path=COMPLETION),
    bad("continuous usage", {"stream": True, "stream_options": {"continuous_usage_stats": 1}}, "invalid_type",
        "stream_options.continuous_usage_stats"),
    bad("stream_options alone", {"stream_options": {}}, None, "stream_options",
        says="only allowed when 'stream' is enabled"),
    bad("include_usage", {"stream": True, "stream_options": {"include_usage": "yes"}}, "invalid_type",
        "stream_options.include_usage"),
    bad("stream_options x", {"stream": True, "stream_options": {"x": 1}}, "unknown_parameter", "stream_options.x"),
    bad("user 100 KB", {"user": "x" * 100_000}, "string_above_max_length", "user"),
    bad("user control", {"user": "a\nb"}, "invalid_value", "user"),
    bad("tier", {"service_tier": "priority"}, "invalid_value", "service_tier", says="Invalid service_tier argument"),
    bad("top_k -2", {"top_k": -2}, "integer_below_min_value", "top_k"),
    bad("min_p 2", {"min_p": 2}, ANY, "min_p"),
    bad("stop ids", {"stop_token_ids": [400]}, "invalid_value", "stop_token_ids"),
    bad("stop ids negative", {"stop_token_ids": [-1]}, "integer_below_min_value", "stop_token_ids[0]"),
    bad("stop ids many", {"stop_token_ids": [1] * 65}, "array_above_max_length", "stop_token_ids"),
    bad("allowed none", {"allowed_token_ids": []}, "empty_array", "allowed_token_ids"),
    bad("allowed beyond", {"allowed_token_ids": [1, 2**40]}, "invalid_value", "allowed_token_ids"),
    bad("salt", {"cache_salt": ""}, "string_below_min_length", "cache_salt"),
    bad("request id", {"request_id": "a b"}, "invalid_value", "request_id"),
    bad("truncate", {"truncate_prompt_tokens": 0}, "integer_below_min_value", "truncate_prompt_tokens"),
]  # fmt: skip


def message(**fields):
    return {"messages": [{**HI, **fields}]}


PROMPTS = [
    bad("no messages", {"messages": []}, "empty_array", "messages", says="Expected an array with minimum length 1"),
    bad("wizard", message(role="wizard"), "invalid_value", "messages[0].role", says="'wizard'. Supported values are"),
    bad("role null", message(role=None), "invalid_value", "messages[0].role"),
    bad("no role", {"messages": [{"content": "x"}]}, "missing_required_parameter", "messages[0].role"),
    bad("function", {"messages": [HI, {"role": "function", "content": "x", "name": "f"}]}, "invalid_value",
        "messages[1].role"),
    bad("no content", {"messages": [{"role": "user"}]}, "missing_required_parameter", "messages[0].content"),
    *(bad(f"content {v!r}", message(content=v), "invalid_type", "messages[0].content") for v in (None, 1, {})),
    bad("content []", message(content=[]), "empty_array", "messages[0].content"),
    bad("content [{}]", message(content=[{}]), "missing_required_parameter", "messages[0].content[0].type"),
    bad("content [1]", message(content=[1]), "invalid_type", "messages[0].content[0]"),
    bad("part binary", message(content=[{"type": "binary", "data": ""}]), "invalid_value",
        "messages[0].content[0].type", says="Invalid value: 'binary'. Supported values are: 'text'"),
    bad("image", message(content=[{"type": "image_url", "image_url": {"url": "http://x"}}]), "invalid_value",
        "messages[0].content[0].type"),
    bad("part type list", message(content=[{"type": [1], "text": "x"}]), "invalid_value",
        "messages[0].content[0].type"),
    bad("part text", message(content=[{"type": "text", "text": 1}]), "invalid_type", "messages[0].content[0].text"),
    bad("part extra", message(content=[{"type": "text", "text": "x", "y": 1}]), "unknown_parameter",
        "messages[0].content[0].y"),
    good("parts", message(content=[{"type": "text", "text": "a"}, {"type": "text", "text": "b"}])),
    bad("tool_calls", {"messages": [HI, {"role": "assistant", "content": "x", "tool_calls": [{}] * 129}]},
        "array_above_max_length", "messages[1].tool_calls"),
    good("an answer sent back", {"messages": [HI, {"role": "assistant", "content": "x", "refusal": None,
         "annotations": [], "audio": None, "tool_calls": None, "function_call": None}, HI]}),
    *(bad(f"name {v!r}", message(name=v), "invalid_value", "messages[0].name") for v in ("a b", "a\n", "<|im_start|>")),
    bad("message extra", message(foo=1), "unknown_parameter", "messages[0].foo"),
    good("name", message(name="anna")),
    *(good(f"special {s}", message(content=f"{s}x{s}")) for s in SPECIALS),
    *(good(f"jinja {t}", message(content=t))
      for t in ("{{7*7}}", "{% raw %}", "{{cycler.__init__.__globals__}}", "{% for %}")),
    bad("100,000 messages", {"messages": [{"role": "user", "content": "x"}] * 100_000}, "array_above_max_length",
        "messages"),
    bad("4 MB of a", message(content="a" * (4 << 20)), "context_length_exceeded", "messages"),
    bad("1 MB of combining marks", message(content="\u0301" * (1 << 19)), "context_length_exceeded", "messages"),
    bad("1 MB of U+FDFA", message(content="\ufdfa" * (1 << 18)), "context_length_exceeded", "messages"),
    bad("too long", message(content="hello " * 300), "context_length_exceeded", "messages",
        says="This model's maximum context length is 256 tokens. However, your messages resulted in"),
    bad("sum too long", {"max_tokens": 256}, "context_length_exceeded", "messages", says="However, you requested"),
    good("only system", {"messages": [{"role": "system", "content": "x"}]}),
    good("developer", {"messages": [{"role": "developer", "content": "x"}, HI]}),
    good("ends with assistant", {"messages": [HI, {"role": "assistant", "content": "x"}]}),
    good("same role twice", {"messages": [HI, HI]}),
    good("whitespace", message(content=" \n\t ")),
    good("continue", {"messages": [HI, {"role": "assistant", "content": "It is"}], "continue_final_message": True}),
    bad("continue user", {"continue_final_message": True}, "invalid_value", "continue_final_message"),
    bad("continue and prompt", {"messages": [HI, {"role": "assistant", "content": "x"}],
        "continue_final_message": True, "add_generation_prompt": True}, "invalid_value", "continue_final_message"),
    bad("suffix on chat", {"suffix": "x"}, "unknown_parameter", "suffix"),
    *(
        Case(f"prompt {v!r}"[:40], 400, {"prompt": v}, code, param, COMPLETION)
        for v, code, param in (
            (GONE, "missing_required_parameter", "prompt"),
            (None, "invalid_type", "prompt"),
            (1, "invalid_type", "prompt"),
            ({}, "invalid_type", "prompt"),
            ("", "invalid_value", "prompt"),
            ([], "empty_array", "prompt"),
            ([[]], "empty_array", "prompt[0]"),
            ([""], "invalid_value", "prompt"),
            ([-1], "integer_below_min_value", "prompt[0]"),
            ([361], "invalid_value", "prompt"),
            ([2**40], "invalid_value", "prompt"),
            ([1, "a"], "invalid_type", "prompt[1]"),
            ([1.5], "invalid_type", "prompt[0]"),
            ([True], "invalid_type", "prompt[0]"),
            ([None], "invalid_type", "prompt[0]"),
            (["a", 1], "invalid_type", "prompt[1]"),
            ([[1], "a"], "invalid_type", "prompt[1]"),
            ([[1, True]], "invalid_type", "prompt[0][1]"),
            ([{}], "invalid_type", "prompt[0]"),
            (["x"] * 100_000, "array_above_max_length", "prompt"),
            ([1] * 257, "context_length_exceeded", "prompt"),
        )
    ),
    bad("64 prompts x 128", {"prompt": ["x"] * 64, "n": 128}, "array_above_max_length", "prompt", path=COMPLETION),
    bad("prompts x tokens", {"n": 128, "max_tokens": 100_000}, "integer_above_max_value", "max_tokens",
        path=COMPLETION),
    good("one id", {"prompt": [40]}, path=COMPLETION),
    good("stop token text", {"prompt": "<|im_end|>"}, path=COMPLETION),
]  # fmt: skip

INTERACTIVES = [
    bad("no prompt", {"prompt": GONE}, "missing_required_parameter", "prompt"),
    *(bad(f"prompt {v!r}", {"prompt": v}, "invalid_type", "prompt") for v in (None, 1, True, {}, 0.5)),
    bad("empty prompt", {"prompt": []}, "empty_array", "prompt"),
    bad("a string in the prompt", {"prompt": ["hi"]}, "invalid_type", "prompt[0]"),
    bad("prompt of ids", {"prompt": [40, 41]}, "invalid_type", "prompt[0]"),
    bad("role", {"prompt": [{"role": "wizard", "content": "x"}]}, "invalid_value", "prompt[0].role"),
    bad("no content", {"prompt": [HI, {"role": "user"}]}, "missing_required_parameter", "prompt[1].content"),
    bad("prompt beyond the context", {"prompt": "hello " * 400}, "context_length_exceeded", "prompt"),
    bad("output beyond the context", {"request_output_len": 256}, "context_length_exceeded", "prompt"),
    *(bad(f"len {v!r}", {"request_output_len": v}, "invalid_type", "request_output_len") for v in ("4", 4.5, True, [])),
    *(bad(f"len {v}", {"request_output_len": v}, "integer_below_min_value", "request_output_len") for v in (0, -1)),
    bad("len 2**31", {"request_output_len": 2**31}, "integer_above_max_value", "request_output_len"),
    bad("temperature", {"temperature": 2.1}, "decimal_above_max_value", "temperature"),
    bad("temperature true", {"temperature": True}, "invalid_type", "temperature"),
    bad("top_p 0", {"top_p": 0}, "decimal_below_min_value", "top_p"),
    bad("top_k -2", {"top_k": -2}, "integer_below_min_value", "top_k"),
    bad("top_k 0.5", {"top_k": 0.5}, "invalid_type", "top_k"),
    bad("repetition_penalty", {"repetition_penalty": 0}, "decimal_below_min_value", "repetition_penalty"),
    bad("stop true", {"stop": True}, "invalid_type", "stop"),
    bad("five stops", {"stop": ["a", "b", "c", "d", "e"]}, "array_above_max_length", "stop"),
    *(bad(f"{name} 1", {name: 1}, "invalid_type", name) for name in ("stream", "ignore_eos", "skip_special_tokens")),
    bad("model 1", {"model": 1}, "invalid_type", "model"),
    bad("which model", {"model": GONE}, "missing_required_parameter", "model"),
    bad("no such model", {"model": "nope"}, "model_not_found", "model", status=404),
    bad("no chat", {"model": "org/base"}, None, "model", status=404, says="the v1/chat/interactive endpoint"),
    *(
        bad(f"{name} {v!r}", {name: v}, "unsupported_parameter", name)
        for name, v in (
            ("image_url", "http://x/y.png"), ("image_url", ["x"]), ("adapter_name", "lora"),
            ("kwargs", {"a": 1}),
        )
    ),
    *(
        bad(f"{name} {v!r}", {name: v}, "invalid_type", name)
        for name, v in (("interactive_mode", 1), ("cancel", 1), ("session_id", "1"), ("session_id", True))
    ),
    bad("session_id -2", {"session_id": -2}, "integer_below_min_value", "session_id"),
    bad("cancel nothing", {"cancel": True}, "invalid_value", "session_id"),
    bad("cancel none", {"cancel": True, "session_id": -1}, "invalid_value", "session_id"),
    *(
        bad(f"unknown {name}", {name: v}, "unknown_parameter", name)
        for name, v in {"messages": [HI], "max_tokens": 4, "n": 1, "user": "u", "user_id": "u", "foo": 1}.items()
    ),
]  # fmt: skip
INTERACTIVES = [replace(case, path=INTERACTIVE, name=f"interactive {case.name}") for case in INTERACTIVES]

CASES = [*ROUTING, *BODIES, *PRESENCE, *RANGES, *PROMPTS, *INTERACTIVES]


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name.replace("\x00", "0"))
async def test_case(client, generator, case):
    headers = {k: v for k, v in (JSON | case.headers).items() if v}
    r = await client.request(case.method, case.path, content=case.body(), headers=headers)
    assert r.status_code == case.status, r.text
    assert r.headers["x-request-id"]
    assert r.headers["content-type"].startswith("application/json")
    if case.status == 200:
        assert r.json()["choices"][0]["finish_reason"]
        assert len(generator.requests) == 1
    else:
        assert set(r.json()) == {"error"}
        error = r.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["type"] == "invalid_request_error"
        assert error["param"] == case.param
        if case.code is not ANY:
            assert error["code"] == case.code
        assert case.says in error["message"]
        assert len(error["message"]) < 400
        assert not generator.requests
    if case.status == 405:
        assert r.headers["allow"]
    assert not [h for h in r.headers if h.startswith("access-control")]
    after = await client.post(CHAT, json={"model": "m", "messages": [HI]})
    assert after.json()["choices"][0]["message"]["content"] == ANSWER
    assert generator.running == 0


@pytest.mark.parametrize(("path", "name"), [(CHAT, "messages"), (COMPLETION, "prompt")])
async def test_exactly_at_the_context(client, generator, path, name):
    """The last length that fits is answered, one more is refused."""
    await client.post(path, json=BASE[path])
    left = 256 - len(generator.requests[0].prompt_ids)
    assert (await client.post(path, json=BASE[path] | {"max_tokens": left})).status_code == 200
    r = await client.post(path, json=BASE[path] | {"max_tokens": left + 1})
    assert (r.status_code, r.json()["error"]["code"], r.json()["error"]["param"]) == (
        400,
        "context_length_exceeded",
        name,
    )


async def test_truncation_keeps_the_end(client, generator, tokenizer):
    text = "hello " * 300
    r = await client.post(COMPLETION, json={"model": "m", "prompt": text, "truncate_prompt_tokens": 10})
    assert r.status_code == 200
    assert list(generator.requests[0].prompt_ids) == tokenizer.encode(text)[-10:]
