"""Chat templates that operators choose: by name, by JSON file, by jinja, by class; and Code Llama's capabilities."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

from configs import __file__ as configs_file
from router.text.chat_classes import MODELS, BaseChatTemplate, ChatTemplateConfig
from router.text.chat_form import ChatForm
from router.text.families import FAMILIES
from router.text.offload import TextPool
from router.text.template_choice import chosen, inlined, leading_specials, renderer_of
from router.text.templates import ChatTemplate, Conversation
from router.text.tokenizer import Tokenizer
from workers.api.errors import ConfigError, InvalidRequest

DEMO = Path(configs_file).parent / "demo-model"
DOCUMENTED = {
    "model_name": "a new name",
    "system": "<|im_start|>system\n",
    "meta_instruction": "You are a robot.",
    "eosys": "<|im_end|>\n",
    "user": "<|im_start|>user\n",
    "eoh": "<|im_end|>\n",
    "assistant": "<|im_start|>assistant\n",
    "eoa": "<|im_end|>",
    "separator": "\n",
    "capability": "chat",
    "stop_words": ["<|im_end|>"],
}
TURNS = [("user", "a"), ("assistant", "b"), ("user", "c")]


def messages(*turns: tuple[str, str]) -> list[dict[str, str]]:
    return [{"role": role, "content": text} for role, text in turns]


def rendered(form: Any, *turns: tuple[str, str], leading: str = "", **options: Any) -> str:
    template = ChatTemplate(form.as_jinja(leading), {})
    return template.render(Conversation(messages(*turns), **options), datetime(2024, 5, 1))


async def prompt(tokenizer: Tokenizer, *turns: tuple[str, str], **options: Any) -> str:
    assert tokenizer.chat is not None
    pool = TextPool(1)
    try:
        ids = await tokenizer.chat.encode(Conversation(messages(*turns), **options), pool)
    finally:
        pool.close()
        tokenizer.chat.close()
    return tokenizer.decode(ids, skip_special_tokens=False)


def byte_tokenizer(*specials: str, leading: str | None = None) -> tokenizers.Tokenizer:
    vocab = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = tokenizers.Tokenizer(models.BPE(vocab, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(specials))
    if leading:
        end = (leading, backend.token_to_id(leading))
        backend.post_processor = processors.TemplateProcessing(single=f"{leading} $A", special_tokens=[end])
    return backend


def test_the_documented_form_in_its_documented_order() -> None:
    form = ChatTemplateConfig.from_json(json.dumps(DOCUMENTED)).chat_template
    system = "<|im_start|>system\nYou are a robot.<|im_end|>\n"
    rest = (
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n"
        "<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n"
    )
    assert rendered(form, *TURNS) == system + rest
    assert rendered(form, ("system", "s"), *TURNS) == "<|im_start|>system\ns<|im_end|>\n" + rest
    assert form.stop_words == ("<|im_end|>",)


@pytest.mark.parametrize(
    ("name", "with_system", "without"),
    [
        (
            "llama2",
            "[INST] <<SYS>>\ns\n<</SYS>>\n\na [/INST] b </s><s>[INST] c [/INST]",
            "[INST] a [/INST] b </s><s>[INST] c [/INST]",
        ),
        (
            "llama3",
            "<|start_header_id|>system<|end_header_id|>\n\ns<|eot_id|><|start_header_id|>user<|end_header_id|>\n\na"
            "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nb<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\nc<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
            None,
        ),
        ("vicuna", "s USER: a ASSISTANT: b</s>USER: c ASSISTANT:", None),
        ("mistral", "[INST] s\n\na [/INST] b</s>[INST] c [/INST]", "[INST] a [/INST] b</s>[INST] c [/INST]"),
        (
            "gemma",
            "<start_of_turn>user\ns\n\na<end_of_turn>\n<start_of_turn>model\nb<end_of_turn>\n"
            "<start_of_turn>user\nc<end_of_turn>\n<start_of_turn>model\n",
            None,
        ),
        (
            "phi-3",
            "<|system|>\ns<|end|>\n<|user|>\na<|end|>\n<|assistant|>\nb<|end|>\n<|user|>\nc<|end|>\n<|assistant|>\n",
            None,
        ),
        ("internlm", "<|System|>:s\n<|User|>:a\n<|Bot|>:b<eoa>\n<|User|>:c\n<|Bot|>:", None),
        ("chatglm", "s\n\n[Round 1]\n\n问：a\n\n答：b\n\n[Round 2]\n\n问：c\n\n答：", None),
        ("baichuan2", "s<reserved_106>a<reserved_107>b</s><reserved_106>c<reserved_107>", None),
        ("deepseek", "s\n\nUser: a\n\nAssistant: b<｜end▁of▁sentence｜>User: c\n\nAssistant: ", None),
        ("falcon", "s\n\nUser: a\n\nAssistant: b\n\nUser: c\n\nAssistant: ", None),
        ("solar", "### System:\ns\n\n### User:\na\n\n### Assistant:\nb\n\n### User:\nc\n\n### Assistant:\n", None),
        ("base", "sabc", "abc"),
    ],
)
def test_families(name: str, with_system: str, without: str | None) -> None:
    assert rendered(FAMILIES[name], ("system", "s"), *TURNS) == with_system
    if without is not None:
        assert rendered(FAMILIES[name], *TURNS) == without


def test_every_documented_name_is_there() -> None:
    documented = (
        "vicuna llama2 llama3 internlm internlm2 baichuan2 chatglm qwen chatml deepseek yi mistral mixtral gemma phi-3 "
        "codellama dbrx falcon solar ultracm wizardlm"
    )
    assert set(documented.split()) <= set(MODELS.names)
    assert "helpful assistant." in rendered(FAMILIES["qwen"], ("user", "hi"))
    for name, form in FAMILIES.items():
        assert "hi" in rendered(form, ("user", "hi")), name


def test_pieces_change_a_built_in_template() -> None:
    form = ChatTemplateConfig("vicuna", meta_instruction="Be brief.", assistant="BOT: ").chat_template
    assert rendered(form, ("user", "hi")) == "Be brief. USER: hi BOT: "
    assert FAMILIES["vicuna"].assistant == "ASSISTANT: "


def test_pieces_are_text_whatever_stands_in_them() -> None:
    odd = """{{ 1 }}{% raw %}\\n'"{# \N{PARTY POPPER}\n"""
    form = ChatForm(user=odd, assistant=odd)
    assert rendered(form, ("user", "{{ 2 }}")) == odd + "{{ 2 }}" + odd


def test_leading_tokens_come_once() -> None:
    backend = byte_tokenizer("<s>", leading="<s>")
    assert leading_specials(backend) == "<s>"
    assert leading_specials(byte_tokenizer("<s>")) == ""
    assert rendered(ChatForm(user="Q"), ("user", "hi"), leading="<s>") == "<s>Qhi"
    assert rendered(ChatForm(user="<s>Q"), ("user", "hi"), leading="<s>") == "<s>Qhi"


async def test_a_template_for_the_demo_model_and_its_stop_words() -> None:
    said = {"model_name": "mine", "user": "<|user|>", "assistant": "<|assistant|>", "stop_words": ["<|user|>", "END"]}
    tokenizer = Tokenizer.from_folder(DEMO, template=chosen(said, None))
    own = Tokenizer.from_folder(DEMO, trust_template=True)
    assert set(tokenizer.eos_ids) - set(own.eos_ids) == set(tokenizer.encode("<|user|>")[-1:])
    assert tokenizer.stop_words == ("END",)
    assert (await prompt(tokenizer, ("user", "hi"))).endswith("<|user|>hi<|assistant|>")
    # What a user says is never a special token.
    assert tokenizer.chat is not None
    pool = TextPool(1)
    ids = await tokenizer.chat.encode(Conversation(messages(("user", "<|user|>"))), pool)
    assert ids.count(tokenizer.encode("<|user|>")[-1]) == 1
    pool.close()


async def test_an_answer_can_be_continued() -> None:
    form = FAMILIES["vicuna"]
    said = rendered(
        form, ("system", "s"), ("user", "a"), ("assistant", "b"), add_generation_prompt=False,
        continue_final_message=True,
    )  # fmt: skip
    assert said == "s USER: a ASSISTANT: b"


def test_completion_and_python_take_the_text_as_it_is() -> None:
    for capability in ("completion", "python"):
        form = chosen("codellama", capability)
        assert isinstance(form, ChatForm)
        assert rendered(form, ("user", "def f():")) == "def f():"


async def test_infilling_asks_for_the_middle() -> None:
    backend = byte_tokenizer("▁<PRE>", "▁<SUF>", "▁<MID>", "▁<EOT>")
    renderer, form = renderer_of(ChatForm(capability="infilling"), backend)
    asked = 'def f(s):\n    """ <FILL>\n    return s'
    text = await renderer.render(Conversation(messages(("user", asked))))
    assert text == '▁<PRE>def f(s):\n    """ ▁<SUF>\n    return s▁<MID>'
    assert "▁<EOT>" in form.stop_words
    with pytest.raises(InvalidRequest, match="exactly one <FILL>"):
        await renderer.render(Conversation(messages(("user", "no place"))))
    with pytest.raises(ConfigError, match="no tokens for infilling"):
        Tokenizer.from_folder(DEMO, template=chosen("codellama", "infilling"))


async def test_a_registered_class_of_pieces() -> None:
    @MODELS.register_module(name="customized_model")
    class CustomizedModel(BaseChatTemplate):
        def __init__(self, user: str = "<|user|>", assistant: str = "<|assistant|>") -> None:
            super().__init__(user=user, assistant=assistant, stop_words=["<|end|>"])

    form = chosen("customized_model", None)
    assert form == ChatForm(user="<|user|>", assistant="<|assistant|>", stop_words=("<|end|>",))
    assert CustomizedModel().get_prompt("hi") == "<|user|>hi<|assistant|>"
    assert ChatTemplateConfig("customized_model", user="Q:").chat_template.user == "Q:"


async def test_a_file_with_a_class_that_writes_its_prompts(tmp_path: Path) -> None:
    file = tmp_path / "shouting.py"
    file.write_text(
        "from echelon import MODELS, BaseChatTemplate\n\n\n"
        "@MODELS.register_module(name='shouting')\n"
        "class Shouting(BaseChatTemplate):\n"
        "    def messages2prompt(self, messages, sequence_start=True):\n"
        "        text = messages if isinstance(messages, str) else messages[-1]['content']\n"
        "        return f'<|user|>{text.upper()}<|assistant|>'\n"
    )
    tokenizer = Tokenizer.from_folder(DEMO, template=chosen(inlined(str(file)), None))
    assert (await prompt(tokenizer, ("user", "hi"))).endswith("<|user|>HI<|assistant|>")
    assert (await prompt(tokenizer, *TURNS)).endswith("<|user|>C<|assistant|>")
    with pytest.raises(InvalidRequest, match="is a class"):
        await prompt(tokenizer, *TURNS, add_generation_prompt=False)
    file.write_text("x = 1\n")
    with pytest.raises(ConfigError, match="registers no chat template"):
        chosen(str(file), None)


def test_files_travel_inside_the_config(tmp_path: Path) -> None:
    (tmp_path / "t.json").write_text(json.dumps(DOCUMENTED))
    (tmp_path / "t.jinja").write_text("{{ messages[0].content }}!")
    assert inlined(str(tmp_path / "t.json")) == DOCUMENTED
    assert chosen(inlined(str(tmp_path / "t.jinja")), None) == "{{ messages[0].content }}!"
    assert inlined("vicuna") == "vicuna"


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ("vicunna", "did you mean vicuna"),
        ("nope", "echelon list"),
        ("/no/such/file.json", "cannot read"),
        ({"model_name": "x", "usr": "Q"}, "did you mean user"),
        ({"user": "Q"}, "model_name"),
        ({"model_name": "x", "capability": "sing"}, "completion, infilling, chat, python"),
        ({"model_name": "x", "stop_words": "word"}, "list of strings"),
        ({"model_name": "x", "user": 3}, "must be a string"),
    ],
    ids=["near name", "no name", "no file", "near field", "nameless", "capability", "stop_words", "number"],
)
def test_what_is_wrong_is_said(said: Any, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        chosen(said, None)
