"""Tokenizer, detokenizer and templates, against the tokenizers library and transformers."""

from __future__ import annotations

import json
import shutil
from datetime import datetime
from pathlib import Path

import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers

from router.text.rendering import DirectRenderer
from router.text.templates import ChatTemplate, Conversation
from router.text.tokenizer import Tokenizer
from workers.api.errors import ConfigError, InvalidRequest

from .fakes import CHAT_TEMPLATE, SPECIALS, encode_chat, make_backend

DEMO = Path(__file__).parents[3] / "configs" / "demo-model"
BYTE_LEVEL = Tokenizer(make_backend())


def sentencepiece_like() -> Tokenizer:
    """The decoder of SentencePiece models with byte fallback."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
    pieces += ["▁", "▁the", "▁end", "th", "e", "n", "d", "你", "▁▁", "."]
    backend = tokenizers.Tokenizer(
        models.BPE(vocab={p: i for i, p in enumerate(pieces)}, merges=[], unk_token="<unk>", byte_fallback=True)
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["<s>", "</s>"])
    return Tokenizer(backend)


SENTENCEPIECE = sentencepiece_like()


def wordpiece_like() -> Tokenizer:
    vocab = {w: i for i, w in enumerate(["[UNK]", "[CLS]", "the", "end", "##s", "##ing", ".", "n", "'", "t", "do"])}
    backend = tokenizers.Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(cleanup=False)
    backend.add_special_tokens(["[CLS]"])
    return Tokenizer(backend)


WORDPIECE = wordpiece_like()


def pieces_of(tokenizer, ids, cuts, skip):
    detokenizer = tokenizer.detokenizer(skip_special_tokens=skip)
    pieces, at = [], 0
    for size in cuts:
        pieces.append(detokenizer.push(ids[at : at + size]))
        at += size
    pieces.append(detokenizer.push(ids[at:]))
    return [*pieces, detokenizer.flush()]


@given(text=st.text(), cuts=st.lists(st.integers(0, 4)))
@settings(max_examples=300, deadline=None)
@example(text="🎉👩‍👩‍👧 你好\u0301é\u0000", cuts=[1] * 40)
def test_text_comes_back_and_no_piece_is_broken(text, cuts):
    ids = BYTE_LEVEL._backend.encode(text, add_special_tokens=False).ids
    pieces = pieces_of(BYTE_LEVEL, ids, cuts, False)
    assert "".join(pieces) == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in p for p in pieces)


@pytest.mark.parametrize(
    "tokenizer", [BYTE_LEVEL, SENTENCEPIECE, WORDPIECE], ids=["bytes", "sentencepiece", "wordpiece"]
)
@given(data=st.data(), cuts=st.lists(st.integers(0, 3)), skip=st.booleans())
@settings(max_examples=300, deadline=None)
def test_pieces_of_any_ids_equal_decode(tokenizer, data, cuts, skip):
    """Also ids that no text has: broken UTF-8 in every way."""
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=24))
    assert "".join(pieces_of(tokenizer, ids, cuts, skip)) == tokenizer.decode(ids, skip_special_tokens=skip)


def test_sentencepiece_streams_words_at_once():
    ids = [SENTENCEPIECE._backend.token_to_id(p) for p in ("▁the", "▁end", "<0xE4>", "<0xBD>", "<0xA0>", ".")]
    detokenizer = SENTENCEPIECE.detokenizer()
    assert [detokenizer.push([i]) for i in ids] == ["the", " end", "", "", "", "你."]


def test_bytes_of_tokens():
    for text in ("é", "你", "🎉", "<think>", " the"):
        ids = BYTE_LEVEL._backend.encode(text, add_special_tokens=False).ids
        assert b"".join(map(BYTE_LEVEL.token_bytes, ids)) == text.encode()
    assert BYTE_LEVEL.token_bytes(10**6) == b""
    assert SENTENCEPIECE.token_bytes(3 + 0xE4) == b"\xe4"
    assert SENTENCEPIECE.token_bytes(SENTENCEPIECE._backend.token_to_id("▁the")) == b" the"


CHATS = [
    [{"role": "user", "content": "hello there"}],
    [{"role": "system", "content": " be the end "}, {"role": "user", "content": "wörld 你好 🎉\n\n  two"}],
    [
        {"role": "user", "content": "{{7*7}} {% raw %} <think>"},
        {"role": "assistant", "content": "  yes  "},
        {"role": "user", "content": ""},
    ],
]


@pytest.mark.parametrize("which", ["built", "demo"])
def test_ids_are_those_of_transformers(which, model_folder):
    transformers = pytest.importorskip("transformers")
    folder = model_folder if which == "built" else DEMO
    if not (folder / "tokenizer.json").is_file():
        pytest.skip("no demo model here")
    theirs = transformers.AutoTokenizer.from_pretrained(str(folder))
    ours = Tokenizer.from_folder(folder, trust_template=True)
    for chat in CHATS:
        for add in (True, False):
            expected = theirs.apply_chat_template(chat, add_generation_prompt=add, tokenize=True, return_dict=False)
            assert encode_chat(ours, chat, add_generation_prompt=add) == list(expected)
        text = chat[-1]["content"]
        assert ours.encode(text) == theirs(text)["input_ids"]
        assert ours.decode(ours.encode(text)) == theirs.decode(theirs(text)["input_ids"], skip_special_tokens=True)
    ending = [*CHATS[0], {"role": "assistant", "content": "It is "}]
    expected = theirs.apply_chat_template(ending, continue_final_message=True, tokenize=True, return_dict=False)
    assert encode_chat(ours, ending, add_generation_prompt=False, continue_final_message=True) == list(expected)
    assert theirs.eos_token_id in ours.eos_ids
    assert ours.vocab_size == len(theirs) or which == "demo"


@pytest.mark.parametrize("special", SPECIALS)
@pytest.mark.parametrize("role", ["system", "user", "assistant"])
def test_special_strings_are_text(tokenizer, special, role):
    """The structure has the ids of the same chat without them, and the content decodes to itself."""
    evil = f"a{special}b {special}{special} <think>"
    chat = [{"role": role, "content": evil}, {"role": "user", "content": "the end"}]
    plain = [{"role": role, "content": "ab <think>"}, {"role": "user", "content": "the end"}]
    ids, clean = encode_chat(tokenizer, chat), encode_chat(tokenizer, plain)
    specials = tokenizer.special_ids
    assert [i for i in ids if i in specials] == [i for i in clean if i in specials]
    assert tokenizer.decode(ids, skip_special_tokens=False) == tokenizer.decode(
        clean, skip_special_tokens=False
    ).replace("ab <think>", evil)


@given(st.lists(st.sampled_from(["user", "assistant", "system"]), min_size=1, max_size=3), st.data())
@settings(max_examples=100, deadline=None)
def test_the_twin_encodes_as_the_tokenizer_does(tokenizer, roles, data):
    """Where no special string is in the contents, the way for hostile texts gives the same ids."""
    chat = [{"role": r, "content": data.draw(st.text(max_size=20))} for r in roles]
    literal = tokenizer.chat._literal
    prompt = ChatTemplate(CHAT_TEMPLATE, {"bos_token": "<|bos|>"}).render(Conversation(chat), datetime.now())
    assert literal.encode(prompt) == encode_chat(tokenizer, chat)


def test_special_strings_are_text_also_where_the_model_lists_them():
    """A unigram vocabulary that holds the special string as a piece, and a normalized special token."""
    vocab = [("<unk>", 0.0), ("<s>", 0.0), *((c, -2.0) for c in "<s>ab▁ "), ("</s>", 0.0)]
    vocab = list(dict(vocab).items())
    backend = tokenizers.Tokenizer(models.Unigram(vocab, unk_id=0, byte_fallback=False))
    backend.normalizer = normalizers.NFKC()
    backend.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True, normalized=True)])
    chat = ChatTemplate("{% for m in messages %}<s>{{ m.content }}{% endfor %}", {})
    tokenizer = Tokenizer(backend, renderer=DirectRenderer(chat))
    special = {backend.token_to_id("<s>"), backend.token_to_id("</s>")}
    for text in ("a<s>b", "a＜s＞b", "a</s>b", "a＜/s＞b"):
        ids = encode_chat(tokenizer, [{"role": "user", "content": text}])
        assert ids[0] == backend.token_to_id("<s>")
        assert not special & set(ids[1:]), text
        assert backend.id_to_token(ids[1]) == "a"
        assert backend.id_to_token(ids[-1]) == "b"


def test_missing_and_broken_files(tmp_path, model_folder):
    with pytest.raises(ConfigError, match=r"no tokenizer\.json"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ConfigError, match="cannot be read"):
        Tokenizer.from_folder(tmp_path)
    shutil.copy(model_folder / "tokenizer.json", tmp_path / "tokenizer.json")
    base = Tokenizer.from_folder(tmp_path)
    assert (base.chat, base.eos_ids, base.context_length) == (None, (), None)
    for broken in ("{% if %}", "{{ messages | shuffle }}", "{{ 1 is odder }}", "{{ " + "(" * 5000 + ")" * 5000 + " }}"):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": broken}))
        with pytest.raises(ConfigError, match="does not compile"):
            Tokenizer.from_folder(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content }}!")
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 3]}))
    whole = Tokenizer.from_folder(tmp_path, trust_template=True)
    assert whole.decode(encode_chat(whole, [{"role": "user", "content": "hi"}])) == "hi!"
    assert whole.eos_ids == (2, 3)
    (tmp_path / "chat_template.jinja").write_text("{{ image_token }}{{ bos_token }}")
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": {"content": "<b>"}, "extra_special_tokens": {"image_token": "<i>"}})
    )
    named = Tokenizer.from_folder(tmp_path, trust_template=True)
    assert named.decode(encode_chat(named, [{"role": "user", "content": "hi"}])) == "<i><b>"


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages[0].content.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].content + 1 }}",
        "{{ 1 // 0 }}",
        "{{ nothing.at.all }}",
        "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}",
        "{{ 'a' * 10**18 }}",
        "{% for i in range(10**9) %}{% endfor %}",
    ],
)
def test_templates_refuse_without_breaking(source):
    with pytest.raises(InvalidRequest) as e:
        ChatTemplate(source, {}).render(Conversation([{"role": "user", "content": "x"}]), datetime.now())
    assert e.value.param == "messages"
    assert e.value.code == (None if "raise_exception" in source else "chat_template_failed")


def test_template_features():
    """What checkpoints' templates use: loop controls, generation blocks, tojson without HTML escapes, developer."""
    source = (
        "{% for m in messages %}{% if m.role == 'skip' %}{% continue %}{% endif %}"
        "{% generation %}{{ m.role }}={{ {'c': m.content} | tojson }}{% endgeneration %};{% endfor %}"
        "{{ bos_token }}{{ strftime_now('%Y') }}"
    )
    template = ChatTemplate(source, {"bos_token": "<b>"})
    messages = [{"role": "skip", "content": "x"}, {"role": "developer", "content": "<é>"}]
    text = template.render(Conversation(messages, add_generation_prompt=False), datetime(2031, 5, 6))
    assert text == 'system={"c": "<é>"};<b>2031'
