"""langchain-openai: chat and completion models, streams, batches, callbacks that count tokens."""

from langchain_core.prompts import ChatPromptTemplate
from langchain_openai import ChatOpenAI, OpenAI
from said import MODEL, QUESTION, URL, tried

chat = ChatOpenAI(model=MODEL, base_url=URL + "/v1", api_key="none", temperature=0, max_retries=0, stream_usage=True)
whole = chat.invoke(QUESTION)
assert "7" in whole.content
assert whole.usage_metadata["output_tokens"] > 1
parts = list(chat.stream(QUESTION))
assert "".join(p.content for p in parts) == whole.content
assert (
    sum(p.usage_metadata["output_tokens"] for p in parts if p.usage_metadata) == whole.usage_metadata["output_tokens"]
)
chain = ChatPromptTemplate.from_messages([("system", "Be short."), ("user", "What is {a} + {b}?")]) | chat
assert [bool(a.content) for a in chain.batch([{"a": 1, "b": 2}, {"a": 3, "b": 4}])] == [True, True]
text = OpenAI(model=MODEL, base_url=URL + "/v1", api_key="none", temperature=0, max_tokens=8, max_retries=0)
assert text.invoke("3 + 4 =") == "".join(text.stream("3 + 4 ="))
tried("langchain-openai", "langchain-openai", "chat and completions, streamed and not", "a chain in a batch", "usage")
