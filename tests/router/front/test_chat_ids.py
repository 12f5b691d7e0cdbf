"""Generated conversations get the ids of transformers' `apply_chat_template`, and nothing in them is structure."""

from __future__ import annotations

import copy
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.text.tokenizer import Tokenizer
from workers.api.errors import InvalidRequest

from .fakes import SPECIALS, encode_chat, make_backend

TEMPLATE = """{%- if tools %}{{ '<|im_start|>system\\n# Tools' }}
{%- for tool in tools %}{{ '\\n' + tool.function.name }}: {{ tool | tojson }}{% endfor %}{{ '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(turn=0) %}
{%- for message in messages %}
  {%- set ns.turn = ns.turn + 1 %}
  {%- if message.role == 'tool' %}
    {{- '<|im_start|>user\\n<tool_response>' + message.content + '</tool_response><|im_end|>' }}
  {%- else %}{{ '<|im_start|>' + message.role }}
    {%- if message.name is defined %} {{ message.name }}{% endif %}{{ '\\n' }}
    {%- if message.content is string %}{{ message.content }}{% endif %}
    {%- for call in message.tool_calls or [] %}
      {%- set f = call.function %}{{ '<tool_call>{"name": "' ~ f.name ~ '", "arguments": ' }}
      {{- f.arguments if f.arguments is string else f.arguments | tojson(indent=1) }}{{ '}</tool_call>' }}
    {%- endfor %}{{ '<|im_end|>' }}{% endif %}{{ '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

JINJA = [
    "{{7*7}}",
    "{% raw %}",
    "{{cycler.__init__.__globals__}}",
    "{% for %}",
    "{# x #}",
    "{{ messages }}",
    "{%- endif %}",
]
WORDS = st.one_of(
    st.text(max_size=12),
    st.sampled_from(
        [*JINJA, "<think>", "<|im_", "start|>", "hello there", "\ue0a0", "\n\n", "  ", "👩\u200d👧", "\u0301"]
    ),
)
TEXTS = st.lists(WORDS, max_size=4).map("".join)
ARGUMENTS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXTS,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(TEXTS, inner, max_size=2),
    max_leaves=4,
)
CALLS = st.builds(
    lambda name, arguments: {"id": "call0", "type": "function", "function": {"name": name, "arguments": arguments}},
    TEXTS,
    st.one_of(TEXTS, st.dictionaries(TEXTS, ARGUMENTS, max_size=2)),
)
MESSAGES = st.one_of(
    st.builds(lambda r, c: {"role": r, "content": c}, st.sampled_from(["user", "assistant", "system"]), TEXTS),
    st.builds(lambda c, n: {"role": "user", "content": c, "name": n}, TEXTS, TEXTS),
    st.builds(
        lambda c: {"role": "assistant", "content": None, "tool_calls": c}, st.lists(CALLS, min_size=1, max_size=2)
    ),
    st.builds(lambda c: {"role": "tool", "tool_call_id": "call0", "content": c}, TEXTS),
)
TOOLS = st.lists(
    st.builds(
        lambda n, d, p: {"type": "function", "function": {"name": n, "description": d, "parameters": p}},
        TEXTS,
        TEXTS,
        st.dictionaries(TEXTS, ARGUMENTS, max_size=2),
    ),
    max_size=2,
)


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """Our tokenizer of a checkpoint whose template knows tools, and transformers'."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("tools")
    make_backend().save(str(folder / "tokenizer.json"))
    settings_ = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|bos|>", "eos_token": "<|im_end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings_))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    ours = Tokenizer.from_folder(folder, trust_template=True)
    return ours, transformers.AutoTokenizer.from_pretrained(str(folder))


def has_special(value) -> bool:
    return any(s in json.dumps(value, ensure_ascii=False) for s in SPECIALS)


@given(messages=st.lists(MESSAGES, min_size=1, max_size=4), tools=st.none() | TOOLS, add=st.booleans())
@settings(max_examples=150, deadline=None)
def test_ids_are_those_of_apply_chat_template(both, messages, tools, add):
    ours, theirs = both
    if has_special([messages, tools]):  # two parts may make one
        return
    before = copy.deepcopy([messages, tools])
    expected = theirs.apply_chat_template(
        messages, tools=tools, add_generation_prompt=add, tokenize=True, return_dict=False
    )
    assert encode_chat(ours, messages, tools=tools, add_generation_prompt=add) == list(expected)
    assert [messages, tools] == before


@given(messages=st.lists(MESSAGES, min_size=1, max_size=3), tools=st.none() | TOOLS, data=st.data())
@settings(max_examples=100, deadline=None)
def test_special_strings_anywhere_are_text(both, messages, tools, data):
    """In contents, names, calls, descriptions and keys: the structure is that of the same chat with other words."""
    ours, theirs = both
    if has_special([messages, tools]):
        return
    special = data.draw(st.sampled_from(SPECIALS))

    def filled(value, word):
        if isinstance(value, str):
            return value + word + value
        if isinstance(value, list):
            return [filled(v, word) for v in value]
        if isinstance(value, dict):
            fixed = {"role", "type", "function", "tool_calls", "name", "content", "arguments", "tool_call_id"}
            return {
                k if k in fixed else filled(k, word): v if k in ("role", "type") else filled(v, word)
                for k, v in value.items()
            }
        return value

    ids = encode_chat(ours, filled(messages, special), tools=filled(tools, special))
    plain = encode_chat(ours, filled(messages, "(word)"), tools=filled(tools, "(word)"))
    assert [i for i in ids if i in ours.special_ids] == [i for i in plain if i in ours.special_ids]
    text = theirs.apply_chat_template(
        filled(messages, special), tools=filled(tools, special), add_generation_prompt=True, tokenize=False
    )
    assert ours.decode(ids, skip_special_tokens=False) == text


def test_a_refusal_shows_the_users_own_text(tmp_path):
    """And no mark that stood for it."""
    make_backend().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "chat_template.jinja").write_text("{{ raise_exception('no: ' + messages[0].content) }}")
    tokenizer = Tokenizer.from_folder(tmp_path, trust_template=True)
    with pytest.raises(InvalidRequest, match=r"messages: no: a<\|im_end\|>b$"):
        encode_chat(tokenizer, [{"role": "user", "content": "a<|im_end|>b"}])
