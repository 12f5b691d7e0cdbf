"""`echelon.pipeline` in this process, and the configs that come with it."""

from __future__ import annotations

import asyncio
import math
import threading
import warnings
from collections.abc import Iterator
from typing import Any

import pytest

import echelon
from cluster.pipeline import notices
from cluster.pipeline.pipeline import model_config
from echelon import (
    MODELS,
    BaseChatTemplate,
    ChatTemplateConfig,
    GenerationConfig,
    Pipeline,
    PytorchEngineConfig,
    TurbomindEngineConfig,
)
from workers.api.errors import ConfigError, InvalidRequest

SUM, FRANCE = "What is 3 + 4?", "What is the capital of France?"
SUM_SAID, FRANCE_SAID = "3 + 4 = 7.", "The capital of France is Paris."


@pytest.fixture(scope="module")
def loaded() -> Iterator[Pipeline]:
    with echelon.pipeline("demo", backend_config=PytorchEngineConfig(session_len=256, max_batch_size=8)) as pipe:
        yield pipe


@pytest.fixture
def pipe(loaded: Pipeline) -> Iterator[Pipeline]:
    yield loaded
    loaded._engine.check_ledgers()  # type: ignore[attr-defined]


def test_a_prompt_a_list_and_messages(pipe: Pipeline) -> None:
    one = pipe(SUM)
    assert (one.text, one.finish_reason, one.index) == (SUM_SAID, "stop", 0)
    assert one.generate_token_len == len(one.token_ids) > 1
    assert pipe.tokenizer.decode(one.token_ids) == one.text
    asked = [{"role": "user", "content": FRANCE}]
    said = pipe([SUM, asked])
    assert [r.text for r in said] == [SUM_SAID, FRANCE_SAID]
    assert pipe(asked).text == FRANCE_SAID
    assert len({r.session_id for r in [one, *said]}) == 3
    assert one.input_token_len == said[0].input_token_len > 3


def test_streams_come_interleaved_and_add_up(pipe: Pipeline) -> None:
    pieces = list(pipe.stream_infer([SUM, FRANCE]))
    assert [p.index for p in pieces[:4]] == [0, 1, 0, 1]
    for index, want in enumerate((SUM_SAID, FRANCE_SAID)):
        own = [p for p in pieces if p.index == index]
        assert "".join(p.text for p in own) == want
        assert [p.finish_reason for p in own] == [None] * (len(own) - 1) + ["stop"]
        assert [p.generate_token_len for p in own] == sorted(p.generate_token_len for p in own)


def executed(pipe: Pipeline) -> int:
    """Tokens that the engine has run."""
    return pipe._engine._engine.load().executed_tokens  # type: ignore[attr-defined]


def test_what_nobody_reads_does_not_run(pipe: Pipeline) -> None:
    for_ever = GenerationConfig(ignore_eos=True, max_new_tokens=200)
    before = executed(pipe)
    stream = pipe.stream_infer(FRANCE, for_ever)
    assert next(stream).text == "The"
    stream.close()
    assert executed(pipe) - before < 50  # the prompt and a few more
    before = executed(pipe)
    for_ever.stop_words = [" is"]  # which the engine does not know
    assert pipe(FRANCE, for_ever).text == "The capital of France"
    assert executed(pipe) - before < 50


def test_a_conversation(pipe: Pipeline) -> None:
    first = pipe.chat("Hi!")
    second = pipe.chat(SUM, session=first)
    assert second.response is not None
    assert second.response.text == SUM_SAID
    assert [question for question, _ in second.history] == ["Hi!", SUM]
    assert len(first.history) == 1
    plain = pipe(SUM)
    assert second.response.input_token_len > plain.input_token_len


def test_sampling_parameters(pipe: Pipeline) -> None:
    config = GenerationConfig(n=2, top_k=0, temperature=2.0, random_seed=7, max_new_tokens=4, logprobs=2)
    twice = [pipe(["zebra", "x"], config, do_preprocess=False) for _ in range(2)]
    assert [r.token_ids for r in twice[0]] == [r.token_ids for r in twice[1]]
    answers = twice[0]
    assert [r.index for r in answers] == [0, 1, 2, 3]
    assert answers[0].token_ids != answers[1].token_ids
    for r in answers:
        assert r.generate_token_len <= 4
        assert r.logprobs is not None
        assert [t in shown for t, shown in zip(r.token_ids, r.logprobs, strict=True)] == [True] * len(r.token_ids)
        assert all(2 <= len(shown) <= 3 and max(shown.values()) <= 0 for shown in r.logprobs)
    assert pipe(SUM, GenerationConfig(stop_words=["="])).text == "3 + 4 "
    six = [f"never {i}" for i in range(6)]  # more than HTTP takes
    assert pipe(SUM, GenerationConfig(stop_words=[*six, " 7"])).text == "3 + 4 ="
    assert "7" not in pipe(SUM, GenerationConfig(bad_words=["7", " 7"])).text
    assert pipe(SUM, GenerationConfig(max_new_tokens=2)).finish_reason == "length"
    goes_on = pipe(SUM, GenerationConfig(ignore_eos=True, max_new_tokens=20))
    assert (goes_on.generate_token_len, goes_on.finish_reason) == (20, "length")
    assert pipe(SUM, GenerationConfig(min_new_tokens=15, max_new_tokens=20)).generate_token_len >= 15


def test_answers_end_with_the_context(pipe: Pipeline) -> None:
    answer = pipe("What is 1 + 1? " * 25, GenerationConfig(ignore_eos=True))
    assert answer.finish_reason == "length"
    assert answer.input_token_len + answer.generate_token_len == pipe.session_len == 256
    with pytest.warns(UserWarning, match="prompt 1: .*maximum context length is 256"):
        said = pipe([SUM, "word " * 400])
    assert said[0].text == SUM_SAID
    assert (said[1].text, said[1].finish_reason) == ("", "length")


def test_text_without_the_template(pipe: Pipeline) -> None:
    asked = f"<|begin|><|user|>{SUM}<|end|><|assistant|>"
    assert pipe(asked, do_preprocess=False).text == SUM_SAID


def test_perplexity(pipe: Pipeline) -> None:
    ids = pipe.tokenizer.encode(f"<|begin|><|user|>{SUM}<|end|><|assistant|>{SUM_SAID}<|end|>")
    good, bad = pipe.get_ppl([ids, ids[::-1]])
    assert 0 < good < bad
    assert pipe.get_ppl(ids) == pytest.approx([good])
    assert math.exp(pipe.get_ppl("What is 3 + 4?")[0]) > 1
    with pytest.raises(InvalidRequest, match="1 tokens"):
        pipe.get_ppl([3])


def test_threads_and_event_loops_may_ask(pipe: Pipeline) -> None:
    said: list[str] = []
    threads = [threading.Thread(target=lambda: said.append(pipe(SUM).text)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    async def inside() -> str:
        return str(pipe(FRANCE).text)

    assert [*said, asyncio.run(inside())] == [SUM_SAID] * 3 + [FRANCE_SAID]


@pytest.mark.parametrize(
    ("ask", "reason"),
    [
        (lambda p: p(("describe this image", object())), "images are not served"),
        (lambda p: p([("describe", None)]), "images are not served"),
        (lambda p: p([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]), "image_url"),
        (lambda p: p.chat(("describe", None)), "images are not served"),
        (lambda p: p([]), "a prompt is a text"),
        (lambda p: p(3), "a prompt is a text"),
        (lambda p: p(SUM, adapter_name="x"), "adapters are not done yet"),
        (lambda p: p(SUM, GenerationConfig(max_new_tokens=0)), "max_new_tokens"),
        (lambda p: p(SUM, GenerationConfig(top_p=1.5)), "top_p"),
        (lambda p: p(SUM, GenerationConfig(logprobs=21)), "logprobs"),
    ],
    ids=["tuple", "tuples", "image_url", "chat", "nothing", "number", "adapter", "tokens", "top_p", "logprobs"],
)
def test_what_cannot_be_asked_is_named(pipe: Pipeline, ask: Any, reason: str) -> None:
    with pytest.raises(InvalidRequest, match=reason):
        ask(pipe)


def test_a_closed_pipeline_says_so() -> None:
    @MODELS.register_module(name="as in the documents")
    class Customized(BaseChatTemplate):
        def __init__(self) -> None:
            super().__init__(user="<|begin|><|user|>", eoh="<|end|>", assistant="<|assistant|>")

    template = ChatTemplateConfig("as in the documents")
    with echelon.pipeline("demo", chat_template_config=template, load_format="dummy") as pipe:
        assert pipe("hi", GenerationConfig(max_new_tokens=1)).input_token_len == len(
            pipe.tokenizer.encode("<|begin|><|user|>hi<|end|><|assistant|>")
        )
    pipe.close()
    with pytest.raises(InvalidRequest, match="closed"):
        pipe("hi")
    assert template.portable()["user"] == "<|begin|><|user|>"


def test_engine_configs_become_sections(recwarn: pytest.WarningsRecorder) -> None:
    config = model_config(
        "demo", "mine", PytorchEngineConfig(tp=2, session_len=64, cache_max_entry_count=0.5), None, {"device": "cpu"}
    )
    assert (config.model_name, config.model.tensor_parallel, config.model.max_model_len) == ("mine", 2, 64)
    engine = config.engine
    assert (engine.block_size, engine.max_num_batched_tokens, engine.cache_fraction) == (64, 4096, 0.5)
    assert not engine.prefix_caching
    turbo = TurbomindEngineConfig(
        rope_scaling_factor=2.0, num_tokens_per_iter=512, cache_max_entry_count=48, cache_block_seq_len=128,
        enable_prefix_caching=True,
    )  # fmt: skip
    config = model_config("demo", None, turbo, None, {})
    assert config.model.rope_scaling_factor == 2.0
    engine = config.engine
    assert (engine.num_blocks, engine.block_size, engine.max_num_batched_tokens) == (48, 128, 512)
    assert engine.prefix_caching
    assert not recwarn


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (TurbomindEngineConfig(quant_policy=8), "quantized KV cache is not done yet"),
        (TurbomindEngineConfig(quant_policy=3), "0, 4 or 8"),
        (TurbomindEngineConfig(model_format="awq"), "quantized weights are not done yet"),
        (TurbomindEngineConfig(model_format="llama"), "Hugging Face"),
        (TurbomindEngineConfig(use_logn_attn=True), "LogN"),
        (PytorchEngineConfig(adapters={"a": "b"}), "LoRA"),
        (PytorchEngineConfig(eviction_type="swap"), "recompute"),
        (PytorchEngineConfig(session_len=0), "max_model_len"),
    ],
    ids=["quant_policy", "odd quant_policy", "awq", "llama", "logn", "adapters", "eviction", "session_len"],
)
def test_what_is_not_done_is_refused_by_name(config: Any, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        model_config("demo", None, config, None, {})


def test_what_has_no_meaning_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notices, "_said", set())
    config = PytorchEngineConfig(thread_safe=True, prefill_interval=8)
    with pytest.warns(UserWarning, match="has no effect") as said:
        model_config("demo", None, config, None, {})
    assert sorted(str(w.message).split()[0] for w in said) == ["prefill_interval", "thread_safe"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model_config("demo", None, config, None, {})


def test_the_public_face_is_whole() -> None:
    for name in echelon.__all__:
        assert getattr(echelon, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nope'"):
        echelon.nope  # noqa: B018
