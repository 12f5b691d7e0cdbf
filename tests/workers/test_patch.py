"""The patch map: keys, hooks, variants, what the log says, what is refused."""

from __future__ import annotations

import logging
import sys
import types
from typing import Any, ClassVar

import pytest
import torch
from foreign import VOCAB, assert_logits, checkpoint, rank_over, step_logits, steps_of
from tiny import prompt
from torch import nn

from workers.api.errors import ConfigError
from workers.models.patch import Patched, patch
from workers.models.patch_map import MODULE_MAP, key_for
from workers.models.sharding import column_parallel, row_parallel
from workers.parallel.group import Group

LONG, SHORT = prompt(24, vocab=VOCAB), prompt(6, vocab=VOCAB)
MLP = "transformers.models.llama.modeling_llama.LlamaMLP"


class CountingMLP(nn.Module):
    """Leaves the work to the module as it was; one variant for each layer's width."""

    seen: ClassVar[list[tuple[str, int]]] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kind = "wide" if self.config.intermediate_size > 1000 else "narrow"
        self.seen.append((kind, self.context.context.max_seq_length))
        assert not isinstance(self.origin_mod, Patched)
        return self.origin_mod(x)

    def _update_model_fn(self) -> None:
        self.updated_with = self.down_proj.weight.abs().sum().item()

    @classmethod
    def _distribute_partition_fn(cls, mod_name: str, mod: nn.Module, device_mesh: Group) -> None:
        if mod_name in ("gate_proj", "up_proj"):
            column_parallel(mod, device_mesh)
        elif mod_name == "down_proj":
            row_parallel(mod, device_mesh)

    @classmethod
    def _distribute_output_fn(cls, outputs: torch.Tensor, device_mesh: Group) -> torch.Tensor:
        return device_mesh.all_reduce(outputs)


@pytest.mark.parametrize("size", [1, 2])
def test_a_rewrite_sees_the_step_the_original_and_the_weights(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setitem(MODULE_MAP, MLP, CountingMLP)
    CountingMLP.seen.clear()
    got = step_logits(checkpoint("llama"), steps_of(LONG, SHORT), size=size)
    assert_logits(got, "llama", LONG, SHORT)
    # Two layers; after those of the start, the longest piece of each step.
    last = [length for _, length in CountingMLP.seen[-6 * size :]]
    assert sorted(last) == sorted([14, 14, 9, 9, 1, 1] * size)
    assert {kind for kind, _ in CountingMLP.seen} == {"narrow"}


def test_weights_are_there_when_the_model_is_updated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MODULE_MAP, MLP, CountingMLP)
    mlp = rank_over(checkpoint("llama")).model.get_submodule("model.layers.1.mlp")
    assert mlp.updated_with == pytest.approx(float(mlp.down_proj.weight.abs().sum()))
    assert mlp.updated_with > 0


def test_what_was_patched_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "echelon.patch"):
        rank_over(checkpoint("llama"))
    lines = [record.getMessage() for record in caplog.records if record.name == "echelon.patch"]
    assert len(lines) == len(set(lines)) == 3
    assert any(MLP in line and line.endswith("(2)") for line in lines)


@pytest.mark.parametrize(
    "key",
    [
        "transformers.models.llama.modeling_llama.LlamaMPL",
        "modeling_llama.LlamaPerceptron",
        "LlamaPerceptron",
        "somewhere.else.LlamaMLP",
    ],
)
def test_an_entry_that_matches_nothing_is_an_error(monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    monkeypatch.setitem(MODULE_MAP, key, CountingMLP)
    with pytest.raises(ConfigError, match=f"match no module.*{key}"):
        rank_over(checkpoint("llama"))


def test_names_in_full_win_over_files_over_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    remote = types.ModuleType("transformers_modules.somebody.modeling_internlm")
    cls: Any = type("InternLMAttention", (nn.Module,), {"__module__": remote.__name__})
    assert key_for(cls) is None
    for key in ("InternLMAttention", "modeling_internlm.InternLMAttention", f"{remote.__name__}.InternLMAttention"):
        monkeypatch.setitem(MODULE_MAP, key, CountingMLP)
        assert key_for(cls) == key


@pytest.mark.parametrize(("value", "message"), [("nowhere.Rewrite", "cannot be imported"), (7, "not a class")])
def test_a_rewrite_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch, value: Any, message: str) -> None:
    monkeypatch.setitem(MODULE_MAP, MLP, value)
    with pytest.raises(ConfigError, match=message):
        rank_over(checkpoint("llama"))


def test_a_rewrite_by_its_name_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("rewrites_of_a_test")
    module.CountingMLP = CountingMLP  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(MODULE_MAP, MLP, "rewrites_of_a_test.CountingMLP")
    rank = rank_over(checkpoint("llama"))
    assert rank.model.patches.rewrites[MLP].endswith("CountingMLP")


def test_one_module_is_patched_alone_and_given_extra_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    class Scaled(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.origin_mod(x) * self.context.factor

    module = nn.Linear(3, 2)
    monkeypatch.setitem(MODULE_MAP, "torch.nn.modules.linear.Linear", Scaled)
    x = torch.ones(1, 3)
    want = module(x) * 3
    patched = patch(module, extra_args=["factor"])
    assert patched is module
    assert torch.equal(patched.patched_forward(x, factor=3), want)
    with pytest.raises(AttributeError, match="factor"):
        patched(x)
    with pytest.raises(ConfigError, match="nothing for"):
        patch(nn.Tanh())
