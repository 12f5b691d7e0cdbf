"""llama-index's OpenAILike."""

from llama_index.core.llms import ChatMessage
from llama_index.llms.openai_like import OpenAILike
from said import MODEL, QUESTION, URL, tried

llm = OpenAILike(
    model=MODEL,
    api_base=URL + "/v1",
    api_key="none",
    is_chat_model=True,
    temperature=0,
    context_window=2048,
    max_retries=0,
)
whole = llm.chat([ChatMessage(role="user", content=QUESTION)]).message.content
assert "7" in whole
parts = [p.delta or "" for p in llm.stream_chat([ChatMessage(role="user", content=QUESTION)])]
assert "".join(parts) == whole
assert llm.complete(QUESTION).text == whole
plain = OpenAILike(
    model=MODEL, api_base=URL + "/v1", api_key="none", is_chat_model=False, temperature=0, max_tokens=8, max_retries=0
)
assert plain.complete("3 + 4 =").text == "".join(p.delta for p in plain.stream_complete("3 + 4 ="))
tried("llama-index", "llama-index-llms-openai-like", "chat and completions, streamed and not")
