"""Checkpoints whose modelling code lies beside the weights: trusted or not, patched by abbreviation, refused."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign import VOCAB, checkpoint, rank_over, step_logits, steps_of
from tiny import prompt
from torch import nn

from workers.align.align import align
from workers.api.config import EngineConfig, ModelConfig, ReplicaConfig
from workers.api.errors import ConfigError
from workers.models.base import read_config
from workers.models.llama import LlamaForCausalLM
from workers.models.paged import paged_attention
from workers.models.patch_map import MODULE_MAP
from workers.models.registry import find
from workers.models.remote_code import remote_model

FILES = Path(__file__).with_name("remote_code")
LONG, SHORT = prompt(24, vocab=VOCAB), prompt(6, vocab=VOCAB)
AUTO_MAP = {
    "AutoConfig": "configuration_remote_muse.RemoteMuseConfig",
    "AutoModelForCausalLM": "modeling_remote_muse.RemoteMuseForCausalLM",
}
KEY = "modeling_remote_muse.RemoteMuseAttention"


class PagedAttention(nn.Module):
    """The rewrite: the inner part of the checkpoint's attention."""

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return paged_attention(self, q, k, v, scale=q.shape[-1] ** -0.5).transpose(1, 2)


def muse(folder: Path, **changes: Any) -> Path:
    """A checkpoint with its code and random weights."""
    shutil.copytree(FILES, folder, ignore=shutil.ignore_patterns("__pycache__"))
    config = {"architectures": ["RemoteMuseForCausalLM"], "model_type": "remote_muse", "auto_map": AUTO_MAP}
    causal = remote_model(config, str(folder)).causal_class
    torch.manual_seed(3)
    causal(causal.config_class(initializer_range=0.2)).save_pretrained(folder)
    saved = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**saved, **config, **changes}))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return muse(tmp_path_factory.mktemp("remote") / "muse-1b")


@pytest.mark.parametrize("size", [1, 2])
def test_code_of_a_checkpoint_runs_patched_by_its_abbreviation(
    folder: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    monkeypatch.setitem(MODULE_MAP, KEY, PagedAttention)
    model = remote_model(read_config(folder), str(folder)).causal_class.from_pretrained(folder).eval()
    with torch.inference_mode():
        a, b = (model(torch.tensor([ids])).logits[0] for ids in (LONG, SHORT))
    assert a.std() > 0.1
    got = step_logits(folder, steps_of(LONG, SHORT), size=size, implementation="auto", trust_remote_code=True)
    for one, want in zip(got, (a[:14], torch.cat([a[14:23], b[:5]]), torch.stack([b[5], a[23]])), strict=True):
        torch.testing.assert_close(one, want, atol=1e-4, rtol=1e-4)


def test_align_compares_with_the_code_of_the_checkpoint(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MODULE_MAP, KEY, PagedAttention)
    config = ReplicaConfig(ModelConfig(str(folder), "muse", trust_remote_code=True), EngineConfig(), device="cpu")
    report = align(config)
    assert report.difference is None
    assert any(line.startswith(f"{KEY} -> ") for line in report.patched)


def test_code_that_nobody_trusts_is_not_run(tmp_path: Path) -> None:
    folder = muse(tmp_path / "muse-2b")
    (folder / "modeling_remote_muse.py").write_text("raise SystemExit('it was run')\n")
    before = set(sys.modules)
    with pytest.raises(ConfigError, match=r"modeling_remote_muse\.py.*--trust-remote-code"):
        rank_over(folder, implementation="auto")
    assert not [name for name in set(sys.modules) - before if "muse" in name]


def test_an_attention_without_a_rewrite_is_named(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"layers \[0, 1\] of RemoteMuseForCausalLM .* patch map"):
        rank_over(folder, implementation="auto", trust_remote_code=True)


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ("somebody/else--modeling_remote_muse.RemoteMuseForCausalLM", "another repository"),
        ("modeling_nowhere.RemoteMuseForCausalLM", r"modeling_nowhere\.py, which is not in"),
        ("modeling_remote_muse.Nobody", "cannot be imported: AttributeError"),
        ("../modeling_remote_muse.RemoteMuseForCausalLM", "not FILE.CLASS"),
    ],
)
def test_what_auto_map_must_not_say(folder: Path, named: str, message: str) -> None:
    config = {**read_config(folder), "auto_map": {**AUTO_MAP, "AutoModelForCausalLM": named}}
    with pytest.raises(ConfigError, match=message):
        find(config, trusted_folder=str(folder))


def test_a_class_that_is_no_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "helper.py").write_text("class Helper:\n    pass\n")
    with pytest.raises(ConfigError, match="no model of transformers"):
        remote_model({"auto_map": {"AutoModelForCausalLM": "helper.Helper"}}, str(tmp_path))


def test_a_native_model_needs_no_code_of_a_checkpoint() -> None:
    llama = {**read_config(checkpoint("llama")), "auto_map": AUTO_MAP}
    assert find(llama, trusted_folder="/nowhere") is LlamaForCausalLM
