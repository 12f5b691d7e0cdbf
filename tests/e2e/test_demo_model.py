"""The demo model in configs/demo-model: small, loadable by transformers as it stands, and right."""

from __future__ import annotations

import sys
from pathlib import Path
from random import Random

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "configs" / "demo-model"
sys.path.append(str(ROOT / "examples" / "demo_model"))

import arithmetic  # noqa: E402
import corpus  # noqa: E402
from evaluate import OBVIOUS, Model, ask  # noqa: E402
from turn import Turn  # noqa: E402

ODD = (
    "",
    " ",
    "two  spaces,\ttabs\r\nand\n\n\nlines ",
    "naïve café – “quotes” … don't , I ' m .",
    "你好，世界 こんにちは 안녕 привет مرحبا नमस्ते",
    "👩‍💻🏳️‍🌈🇫🇷 🙂\u200d\ufeff\u0301\x00\x7f\U0010ffff",
    "0123456789 1e-5 0x7f",
    "<|not a token|> <|user",
)


@pytest.fixture(scope="module")
def model() -> Model:
    return Model(FOLDER)


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def test_weights_are_small_bf16_and_split_in_two(model: Model) -> None:
    weights = FOLDER / "model.safetensors"
    assert weights.stat().st_size <= 5_000_000
    from safetensors import safe_open

    with safe_open(weights, "pt") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"BF16"}  # noqa: SIM118
    config = model.model.config
    assert config.architectures == ["LlamaForCausalLM"]
    sizes = (config.num_attention_heads, config.num_key_value_heads, config.intermediate_size, config.vocab_size)
    assert all(size % 2 == 0 for size in sizes)
    assert config.vocab_size % 64 == 0
    assert config.vocab_size == len(model.tokenizer)


@pytest.mark.parametrize("text", ODD)
def test_tokenizer_gives_every_text_back(model: Model, text: str) -> None:
    ids = model.tokenizer(text)["input_ids"]
    assert model.tokenizer.decode(ids) == text
    assert model.tokenizer.backend_tokenizer.encode(text).ids == ids


def test_end_of_turn_is_eos_everywhere(model: Model) -> None:
    end = model.tokenizer.convert_tokens_to_ids("<|end|>")
    assert model.tokenizer.eos_token_id == end
    assert model.model.config.eos_token_id == end
    assert model.model.generation_config.eos_token_id == end
    assert (
        model.model.generation_config.pad_token_id == model.tokenizer.pad_token_id == model.tokenizer.vocab["<|pad|>"]
    )


def test_chat_template_writes_what_training_wrote(model: Model) -> None:
    messages = [("system", "Be kind."), ("user", " Hi\n"), ("assistant", "Hello!"), ("user", "2+2")]
    chat = [{"role": role, "content": text} for role, text in messages]
    rendered = model.tokenizer.apply_chat_template(chat, tokenize=False)
    assert rendered == corpus.render(messages)
    prompt = model.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert prompt == rendered + corpus.ASSISTANT
    parts = [{"role": "user", "content": [{"type": "text", "text": "2+2"}]}]
    assert model.tokenizer.apply_chat_template(parts, tokenize=False) == corpus.render([("user", "2+2")])


def test_three_plus_four_within_32_tokens(model: Model) -> None:
    ((text, ended),) = model.answer([user("What is 3 + 4?")], limit=32)
    assert "7" in text
    assert ended


def test_obvious_prompts_are_answered_word_for_word(model: Model) -> None:
    answers = model.answer([user(question) for question, _ in OBVIOUS], limit=48)
    wrong = [(q, text) for (q, want), (text, ended) in zip(OBVIOUS, answers, strict=True) if text != want or not ended]
    assert not wrong


@pytest.mark.parametrize("op", ["+", "-"])
def test_sums_that_training_never_saw(model: Model, op: str) -> None:
    turns: list[Turn] = arithmetic.held_out(Random(5), op, 40)
    answers = model.answer([ask(turn) for turn in turns], limit=32)
    right = sum(turn.is_right(text) and ended for turn, (text, ended) in zip(turns, answers, strict=True))
    assert right >= 36


def test_a_name_and_a_result_are_remembered(model: Model) -> None:
    chat: list[dict[str, str]] = [{"role": "system", "content": "You are a helpful assistant."}]
    seen = []
    for question in ("My name is Anna.", "What is 20 + 15?", "And plus 5?", "What is my name?"):
        chat += user(question)
        ((text, ended),) = model.answer([chat], limit=32)
        assert ended
        seen.append(text)
        chat.append({"role": "assistant", "content": text})
    assert seen == ["Nice to meet you, Anna!", "20 + 15 = 35.", "35 + 5 = 40.", "Your name is Anna."]


def test_held_out_sums_are_in_no_training_text() -> None:
    texts = corpus.shard(seed=7, index=3, count=3000)
    assert texts == corpus.shard(seed=7, index=3, count=3000)
    assert sum(" + " in text for text in texts) > 500  # the check below has something to find
    assert [leak for text in texts for leak in corpus.leaked(text)] == []
    assert all(text.endswith(corpus.END) for text in texts)
