"""litellm, as a library."""

import litellm
from said import MESSAGES, MODEL, URL, tried

litellm.telemetry = False
asked = {"api_base": URL + "/v1", "api_key": "none", "temperature": 0, "num_retries": 0}
whole = litellm.completion(model=f"openai/{MODEL}", messages=MESSAGES, **asked)
text = whole.choices[0].message.content
assert "7" in text
chunks = litellm.completion(
    model=f"openai/{MODEL}", messages=MESSAGES, stream=True, stream_options={"include_usage": True}, **asked
)
assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == text
vllm = litellm.completion(model=f"hosted_vllm/{MODEL}", messages=MESSAGES, top_k=5, **asked)
assert vllm.choices[0].message.content == text
plain = litellm.text_completion(model=f"text-completion-openai/{MODEL}", prompt="3 + 4 =", max_tokens=4, **asked)
assert plain.choices[0].text
try:
    litellm.completion(model="openai/nope", messages=MESSAGES, **asked)
    raise AssertionError("an unknown model was taken")
except litellm.NotFoundError:
    pass
tried("litellm", "litellm", "chat, streamed and not", "as hosted_vllm with top_k", "text completion", "errors")
