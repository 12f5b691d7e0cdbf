"""The native models against transformers, in fp32: logits of every step, greedy tokens of the engine."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny import FAMILY, added, checkpoint, generate, plan_logits, prompt, rank_of, reference, replica, request, run

from workers.api.errors import ConfigError
from workers.engine.core import Engine
from workers.engine.plan import StepPlan
from workers.layers.activation import GateAndMul
from workers.layers.rotary import RopeSettings, RotaryEmbedding, with_dynamic_scaling
from workers.models.base import read_config
from workers.models.llama import LlamaForCausalLM
from workers.models.registry import architectures, find, register
from workers.rank import Rank, run_to_completion

LONG, SHORT = prompt(75), prompt(21)


def expected_logits(name: str, ids: tuple[int, ...]) -> torch.Tensor:
    with torch.inference_mode():
        return reference(name)(torch.tensor([ids])).logits[0]


@pytest.mark.parametrize("name", FAMILY)
def test_prefill_chunks_decodes_and_mixed_steps_give_the_logits_of_transformers(name: str) -> None:
    rank = rank_of(name, num_blocks=64)
    for cache in rank.runner.caches:  # what is not written must not matter
        cache.key.fill_(torch.nan)
        cache.value.fill_(torch.nan)
    want_long, want_short = expected_logits(name, LONG), expected_logits(name, SHORT)
    # Blocks in no order; the long one in chunks of 40, 34 and 1, the short one whole beside the second chunk.
    one = plan_logits(rank, StepPlan(1, (), (added(3, LONG),), (run(3, 0, 40, emit=0, blocks=(9, 4, 60)),)))
    torch.testing.assert_close(one, want_long[:40], atol=1e-4, rtol=1e-4)
    two = plan_logits(
        rank,
        StepPlan(
            2,
            (),
            (added(0, SHORT, blocks=(7,)),),
            (run(3, 40, 34, emit=0, blocks=(11, 2)), run(0, 0, 20, emit=0, blocks=(33,))),
        ),
    )
    torch.testing.assert_close(two, torch.cat([want_long[40:74], want_short[:20]]), atol=1e-4, rtol=1e-4)
    three = plan_logits(rank, StepPlan(3, (), (), (run(0, 20, 1), run(3, 74, 1))))
    torch.testing.assert_close(three, torch.stack([want_short[20], want_long[74]]), atol=1e-4, rtol=1e-4)
    # A decode beside a prefill, in slots that change hands.
    four = plan_logits(
        rank,
        StepPlan(4, (0,), (added(0, LONG[:33]),), (run(3, 74, 1), run(0, 0, 33, emit=0, blocks=(50, 7, 33)))),
    )
    torch.testing.assert_close(four, torch.cat([want_long[74:75], want_long[:33]]), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", FAMILY)
def test_greedy_tokens_equal_transformers_generate(name: str) -> None:
    rank = rank_of(name, max_num_batched_tokens=64)
    prompts = [prompt(n) for n in (1, 16, 75, 33)]
    got = run_to_completion(rank.make_engine(), [request(str(i), p, max_tokens=40) for i, p in enumerate(prompts)])
    for i, ids in enumerate(prompts):
        assert got[str(i)] == generate(reference(name), ids, 40), f"prompt {i}"


def test_a_tiny_pool_and_no_step_ahead_change_no_token() -> None:
    prompts = [prompt(n, seed=5) for n in (30, 9, 44, 17, 2)]
    requests = [request(str(i), p, max_tokens=24) for i, p in enumerate(prompts)]
    want = {str(i): generate(reference("llama"), p, 24) for i, p in enumerate(prompts)}
    for limits in ({"num_blocks": 9, "block_size": 8}, {"step_ahead": False}, {"prefix_caching": False}):
        engine = rank_of("llama", **limits).make_engine()
        assert run_to_completion(engine, requests) == want, limits
        engine.check_ledgers()


def test_constant_preemption_changes_no_token() -> None:
    rank = rank_of("llama", num_blocks=9, block_size=8)
    prompts = [prompt(20, seed=i) for i in range(5)]
    engine = Engine(rank.config.engine, rank.runner, num_blocks=9, max_model_len=72, watermark=0)
    got = run_to_completion(engine, [request(str(i), p, max_tokens=24) for i, p in enumerate(prompts)])
    assert engine.load().preemptions > 0
    assert got == {str(i): generate(reference("llama"), p, 24) for i, p in enumerate(prompts)}


@pytest.mark.parametrize("kind", ["default", "linear", "llama3"])
def test_rope_frequencies_are_those_of_transformers(kind: str) -> None:
    name = {"default": "llama", "linear": "llama-rope-linear", "llama3": "llama-rope-llama3"}[kind]
    settings = RopeSettings.from_config(read_config(checkpoint(name)))
    assert settings.kind == kind
    torch.testing.assert_close(settings.frequencies(16, 256), reference(name).model.rotary_emb.inv_freq)


def test_the_rope_keys_of_older_checkpoints_mean_the_same() -> None:
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 32}  # fmt: skip
    old = {"rope_theta": 500.0, "rope_scaling": scaling, "max_position_embeddings": 256}
    new = {"rope_parameters": {**scaling, "rope_theta": 500.0}, "max_position_embeddings": 256}
    assert RopeSettings.from_config(old) == RopeSettings.from_config(new)
    oldest = {"rope_scaling": {"type": "linear", "factor": 2.0}, "max_position_embeddings": 256}
    assert RopeSettings.from_config(oldest).kind == "linear"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rope_scaling": {"rope_type": "mrope", "factor": 2.0}}, "mrope"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "factor"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "short_factor"),
        ({"rope_scaling": {"type": "llama3", "factor": 2.0}}, "low_freq_factor"),
        ({"hidden_act": "relu6"}, "relu6"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantized"),
        ({"num_hidden_layers": None}, "num_hidden_layers"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "differ between the layers"),
    ],
)
def test_configs_that_cannot_be_run_are_refused_by_name(change: dict[str, object], message: str) -> None:
    source = {k: v for k, v in read_config(checkpoint("llama")).items() if k != "rope_parameters"} | change

    def build() -> None:
        settings = LlamaForCausalLM.read_settings(source)
        settings.rope.frequencies(16, 256)
        GateAndMul(settings.activation)

    with pytest.raises(ConfigError, match=message):
        build()


def test_dynamic_rope_is_that_of_the_context_it_is_made_for() -> None:
    source = read_config(checkpoint("llama-rope-dynamic"))
    settings = RopeSettings.from_config(source)
    base = settings.frequencies(16, 256)
    torch.testing.assert_close(base, settings.frequencies(16, 9))
    # NTK: the fastest pair keeps its frequency, the slowest gets slower by the factor of the context's growth.
    longer = settings.frequencies(16, 512)
    torch.testing.assert_close(longer[0], base[0])
    torch.testing.assert_close(base[-1] / longer[-1], torch.tensor(4.0 * 2 - 3))
    assert (LlamaForCausalLM.context_length(source), LlamaForCausalLM.longest_context(source)) == (256, 1024)


def test_a_scaling_factor_of_the_operator_is_that_of_a_config() -> None:
    source = read_config(checkpoint("llama"))
    rope = {**source["rope_parameters"], "rope_type": "dynamic", "factor": 2.0}
    assert with_dynamic_scaling(source, 2.0) == {**source, "rope_parameters": rope}
    old = with_dynamic_scaling({"rope_theta": 500.0, "max_position_embeddings": 8}, 4.0)
    assert RopeSettings.from_config(old) == RopeSettings(500.0, 8, "dynamic", {"factor": 4.0})
    with pytest.raises(ConfigError, match="not scaled"):
        with_dynamic_scaling(read_config(checkpoint("llama-rope-llama3")), 2.0)

    def rank(factor: float | None, length: int) -> Rank:
        config = replica(checkpoint("llama"))
        model = replace(config.model, max_model_len=length, rope_scaling_factor=factor)
        return Rank(replace(config, model=model))

    long = rank(2.0, 512)
    assert long.max_model_len == 512
    want = RopeSettings.from_config(source | {"rope_parameters": rope}).frequencies(16, 512)
    assert isinstance(long.model, LlamaForCausalLM)
    table = next(m for m in long.model.modules() if isinstance(m, RotaryEmbedding)).cos_sin
    torch.testing.assert_close(table[1, : len(want)], want.cos())
    with pytest.raises(ConfigError, match="513 is over the checkpoint's 512"):
        rank(2.0, 513)
    with pytest.raises(ConfigError, match="over 1"):
        rank(1.0, 256)


def test_registry_finds_registered_models_and_names_the_rest() -> None:
    assert "Qwen3ForCausalLM" in architectures()
    with pytest.raises(ConfigError, match=r"NoSuchModel.*LlamaForCausalLM"):
        find({"architectures": ["NoSuchModel"]})
    register("TestOnlyModel", "workers.models.llama:LlamaForCausalLM")
    assert find({"architectures": ["NoSuchModel", "TestOnlyModel"]}) is LlamaForCausalLM
    register("TestOnlyModel", "workers.models.llama:Missing")
    with pytest.raises(ConfigError, match="Missing"):
        find({"architectures": ["TestOnlyModel"]})


def test_a_rank_accounts_for_its_start_and_refuses_too_long_a_context() -> None:
    rank = Rank(replica(checkpoint("llama")))
    assert list(rank.phases) == ["config", "weights", "cache", "warmup", "grammars"]
    assert all(seconds >= 0 for seconds in rank.phases.values())
    config = replica(checkpoint("llama"))
    with pytest.raises(ConfigError, match="256"):
        Rank(type(config)(type(config.model)(config.model.path, "x", max_model_len=257), config.engine))
    with pytest.raises(ConfigError, match=r"config\.json"):
        Rank(replica(checkpoint("llama") / "nowhere"))
