"""Models through transformers' own modules, patched and not: logits, tokens, two ranks, what is refused."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from foreign import FOREIGN, VOCAB, assert_logits, checkpoint, rank_over, reference, step_logits, steps_of
from safetensors.torch import load_file, save_file
from tiny import generate, prompt, request

from workers.api.errors import ConfigError, WeightError
from workers.models.base import read_config
from workers.models.registry import find
from workers.models.tensor_plan import FROM_CONFIG, FROM_SHAPES
from workers.models.transformers_model import TransformersForCausalLM
from workers.rank import run_to_completion

LONG, SHORT = prompt(24, vocab=VOCAB), prompt(6, vocab=VOCAB)


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("name", FOREIGN)
def test_chunks_ragged_steps_and_decodes_give_the_logits_of_transformers(name: str, size: int) -> None:
    got = step_logits(checkpoint(name), steps_of(LONG, SHORT), size=size)
    assert_logits(got, name, LONG, SHORT)


@pytest.mark.parametrize("name", ["llama", "gptj"])
def test_the_engine_gives_the_tokens_of_transformers(name: str) -> None:
    engine = rank_over(checkpoint(name)).make_engine()
    prompts = [prompt(n, vocab=VOCAB) for n in (1, 19, 40)]
    got = run_to_completion(engine, [request(str(i), ids, max_tokens=12) for i, ids in enumerate(prompts)])
    assert got == {str(i): generate(reference(name), ids, 12) for i, ids in enumerate(prompts)}
    engine.check_ledgers()


def test_who_is_native_and_who_is_not() -> None:
    llama, opt = read_config(checkpoint("llama")), read_config(checkpoint("opt"))
    assert find(llama) is not TransformersForCausalLM
    assert find(llama, "transformers") is TransformersForCausalLM
    assert find(opt) is TransformersForCausalLM
    with pytest.raises(ConfigError, match="OPTForCausalLM"):
        find(opt, "native")


def test_the_log_says_what_runs_what_was_patched_and_how_it_is_cut(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "echelon"):
        step_logits(checkpoint("gptj"), steps_of(LONG, SHORT)[:1], size=2)
        step_logits(checkpoint("opt"), steps_of(LONG, SHORT)[:1], implementation="auto")
    text = caplog.text
    line = (
        "patched transformers.models.gptj.modeling_gptj.GPTJAttention -> workers.models.rewrites.gptj.GPTJAttention (2)"
    )
    assert text.count(line) == 2  # once a rank
    assert "GPTJForCausalLM runs through transformers' modules, patched" in text
    assert f"tensor-parallel plan, from {FROM_SHAPES}: lm_head" in text
    assert "no native model for OPTForCausalLM" in text


def test_the_plan_is_the_models_own_or_follows_from_shapes() -> None:
    gemma = rank_over(checkpoint("gemma2")).model.plan
    assert gemma.source == FROM_CONFIG
    assert "model.layers.*.mlp.down_proj: rowwise (2)" in gemma.summary()
    opt = rank_over(checkpoint("opt")).model.plan
    assert opt.source == FROM_SHAPES
    assert "model.decoder.layers.*.self_attn.q_proj: colwise_gather_output (2)" in opt.summary()
    gpt2 = rank_over(checkpoint("gpt2")).model.plan
    assert {"transformer.h.*.mlp.c_fc: colwise (2)", "transformer.h.*.mlp.c_proj: rowwise (2)"} <= set(gpt2.summary())


def changed(name: str, tmp_path: Path, **config: object) -> Path:
    folder = tmp_path / name
    folder.mkdir()
    source = json.loads((checkpoint(name) / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**source, **config}))
    save_file(load_file(checkpoint(name) / "model.safetensors"), folder / "model.safetensors", {"format": "pt"})
    return folder


def test_what_cannot_be_right_is_refused_by_name(tmp_path: Path) -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    dynamic = changed("qwen3-tied", tmp_path, rope_parameters={**rope, "original_max_position_embeddings": 64})
    with pytest.raises(ConfigError, match=r"dynamic rope scaling .* up to 64 tokens"):
        rank_over(dynamic)
    rank_over(dynamic, max_model_len=64)
    gptj = changed("gptj", tmp_path, architectures=["GPTJForQuestionAnswering"])
    with pytest.raises(ConfigError, match="GPTJForQuestionAnswering"):
        rank_over(gptj)
    unknown = changed("opt", tmp_path, model_type="nobody")
    with pytest.raises(ConfigError, match="nobody"):
        rank_over(unknown)


def test_a_layer_that_does_not_attend_through_us_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from workers.models import patch_map

    for key in [key for key in patch_map.MODULE_MAP if "gptj" in key.lower()]:
        monkeypatch.delitem(patch_map.MODULE_MAP, key)
    with pytest.raises(ConfigError, match=r"GPTJForCausalLM"):
        rank_over(checkpoint("gptj"))


def test_missing_weights_are_named(tmp_path: Path) -> None:
    folder = changed("opt", tmp_path)
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.decoder.layers.1.fc1.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(WeightError, match=r"missing keys .*layers\.1\.fc1\.weight"):
        rank_over(folder)


def test_dummy_weights_are_the_same_on_any_number_of_ranks() -> None:
    one, two = (step_logits(checkpoint("mixtral"), steps_of(LONG, SHORT), size=n, load_format="dummy") for n in (1, 2))
    for a, b in zip(one, two, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
