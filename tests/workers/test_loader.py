"""Weights into shards: what fits, and errors that name file and tensor."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import VOCAB, checkpoint, prompt, rank_of, reference, replica, request

from workers.api.errors import ConfigError, WeightError
from workers.layers.build import Build
from workers.layers.linear import QKVParallelLinear
from workers.models.base import WeightRule, read_config
from workers.models.llama import LlamaForCausalLM
from workers.models.loader import load_model
from workers.parallel.group import Group, Groups
from workers.quant.method import Span
from workers.rank import Rank, run_to_completion

Tensors = dict[str, torch.Tensor]
GATE = "model.layers.1.mlp.gate_proj.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    shutil.copytree(checkpoint("llama"), tmp_path / "model")
    return tmp_path / "model"


def tensors_of(folder: Path) -> Tensors:
    return load_file(folder / "model.safetensors")


def new_model(folder: Path, groups: Groups | None = None) -> LlamaForCausalLM:
    return LlamaForCausalLM(read_config(folder), max_model_len=64, build=Build(groups=groups or Groups()))


class Shard(Group):
    """One rank of several whose collectives are not used."""

    def __new__(cls, rank: int, size: int) -> Group:
        return Group("tp", rank, size, handle=object())  # type: ignore[arg-type]


def test_missing_tensors_are_named(folder: Path) -> None:
    tensors = tensors_of(folder)
    del tensors[GATE], tensors["lm_head.weight"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(WeightError, match=r"missing.*model\.layers\.1\.mlp\.gate_proj\.weight, lm_head\.weight"):
        load_model(new_model(folder), str(folder))


def test_unused_tensors_are_named_with_their_file(folder: Path) -> None:
    tensors = tensors_of(folder) | {"model.layers.7.mlp.gate_proj.weight": torch.zeros(2)}
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(WeightError, match=r"model\.layers\.7\.mlp\.gate_proj\.weight in model\.safetensors"):
        load_model(new_model(folder), str(folder))


def test_wrong_shapes_are_named_with_both_shapes(folder: Path) -> None:
    save_file(tensors_of(folder) | {GATE: torch.zeros(112, 60)}, folder / "model.safetensors")
    with pytest.raises(
        WeightError, match=r"gate_proj\.weight in model\.safetensors has shape \[112, 60\].*\[112, 64\]"
    ):
        load_model(new_model(folder), str(folder))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_numbers_that_are_not_finite_are_named(folder: Path, bad: float) -> None:
    tensors = tensors_of(folder)
    tensors[GATE][3, 5] = bad
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(
        WeightError, match=r"not all numbers are finite in: model\.layers\.1\.mlp\.gate_proj\.weight in"
    ):
        load_model(new_model(folder), str(folder))


def test_files_that_are_not_safetensors_or_not_there(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(WeightError, match=r"model\.safetensors cannot be read"):
        load_model(new_model(folder), str(folder))
    (folder / "model.safetensors").unlink()
    with pytest.raises(WeightError, match="no safetensors files"):
        load_model(new_model(folder), str(folder))


def test_known_needless_tensors_are_passed_over(folder: Path) -> None:
    tensors = tensors_of(folder) | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8)}
    save_file(tensors, folder / "model.safetensors")
    load_model(new_model(folder), str(folder))


def test_a_tied_head_in_the_checkpoint_is_passed_over(tmp_path: Path) -> None:
    shutil.copytree(checkpoint("llama-tied"), tmp_path / "model")
    folder = tmp_path / "model"
    tensors = tensors_of(folder)
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, folder / "model.safetensors")
    model = new_model(folder)
    load_model(model, str(folder))
    assert model.lm_head.weight is model.model.embed_tokens.weight


def split_in_two(folder: Path) -> dict[str, str]:
    tensors = tensors_of(folder)
    names = sorted(tensors)
    where = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(names)}
    for file in set(where.values()):
        save_file({n: tensors[n] for n in names if where[n] == file}, folder / file)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return where


def test_an_index_names_the_files_and_strangers_are_not_read(folder: Path) -> None:
    whole = new_model(folder)
    size = load_model(whole, str(folder))
    split_in_two(folder)
    save_file({"stranger": torch.zeros(1)}, folder / "another.safetensors")
    parts, seen = new_model(folder), []
    load_model(parts, str(folder), progress=lambda done, total: seen.append((done, total)))
    for (name, a), b in zip(whole.named_parameters(), parts.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})
    assert (seen[-1], {total for _, total in seen}) == ((size, size), {size})


def test_an_index_that_names_a_missing_or_foreign_file_is_refused(folder: Path) -> None:
    where = split_in_two(folder)
    (folder / where["lm_head.weight"]).unlink()
    with pytest.raises(WeightError, match=r"index\.json names .*which is not in the folder"):
        load_model(new_model(folder), str(folder))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../x.safetensors"}}))
    with pytest.raises(WeightError, match=r"which is not in the folder"):
        load_model(new_model(folder), str(folder))


def test_shards_of_all_ranks_make_the_whole_and_read_it_once(folder: Path) -> None:
    whole = new_model(folder)
    total = load_model(whole, str(folder))
    shards = [new_model(folder, Groups(tp=Shard(rank, 2))) for rank in range(2)]
    reads = [load_model(shard, str(folder)) for shard in shards]
    norms = sum(p.nbytes for n, p in whole.named_parameters() if "norm" in n)
    assert sum(reads) == total + norms
    want = reference("llama").state_dict()
    first = [shard.model.layers[0] for shard in shards]
    q = torch.cat([layer.self_attn.qkv_proj.weight[:32] for layer in first])
    assert torch.equal(q, want["model.layers.0.self_attn.q_proj.weight"])
    up = torch.cat([layer.mlp.gate_up_proj.weight[56:] for layer in first])
    assert torch.equal(up, want["model.layers.0.mlp.up_proj.weight"])
    down = torch.cat([layer.mlp.down_proj.weight for layer in first], dim=1)
    assert torch.equal(down, want["model.layers.0.mlp.down_proj.weight"])
    head = torch.cat([shard.lm_head.weight for shard in shards])
    assert torch.equal(head[:VOCAB], want["lm_head.weight"])
    assert not head[VOCAB:].any()


def test_kv_heads_are_replicated_where_ranks_outnumber_them() -> None:
    starts = []
    for rank in range(4):
        layer = QKVParallelLinear("qkv", 8, 8, 2, 4, bias=False, build=Build(groups=Groups(tp=Shard(rank, 4))))
        assert (layer.num_heads, layer.num_kv_heads) == (2, 1)
        starts.append([layer.shape.outputs[key].start for key in "qkv"])
    assert starts == [[0, 0, 0], [8, 0, 0], [16, 4, 4], [24, 4, 4]]


@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(6, 2, 4), (12, 3, 2), (6, 4, 1)])
def test_heads_that_cannot_be_split_are_refused(heads: int, kv_heads: int, size: int) -> None:
    with pytest.raises(ConfigError, match="qkv"):
        QKVParallelLinear("qkv", 8, heads, kv_heads, 4, bias=False, build=Build(groups=Groups(tp=Shard(0, size))))


def test_a_span_keeps_to_the_granularity_of_packed_weights() -> None:
    assert Span(64, 32, 32, 8).scaled(8, "qweight") == Span(8, 4, 4, 1)
    with pytest.raises(ConfigError, match="qweight"):
        Span(64, 32, 16, 4).scaled(8, "qweight")


def test_dummy_weights_are_seeded_and_the_same_model_on_any_number_of_ranks(folder: Path) -> None:
    def dummy(seed: int, groups: Groups | None = None) -> LlamaForCausalLM:
        model = new_model(folder, groups)
        load_model(model, str(folder), load_format="dummy", seed=seed)
        return model

    one, again, other, shard = dummy(1), dummy(1), dummy(2), dummy(1, Groups(tp=Shard(1, 2)))
    assert torch.equal(one.lm_head.weight, again.lm_head.weight)
    assert not torch.equal(one.lm_head.weight, other.lm_head.weight)
    down = one.model.layers[2].mlp.down_proj.weight
    assert torch.equal(shard.model.layers[2].mlp.down_proj.weight, down[:, 56:])
    assert down.std() > 0.01


def test_a_rank_generates_from_dummy_weights_without_any_file(tmp_path: Path) -> None:
    shutil.copy(checkpoint("llama") / "config.json", tmp_path / "config.json")
    outs = [
        run_to_completion(Rank(replica(tmp_path, load_format="dummy")).make_engine(), [request("a", prompt(9))])["a"]
        for _ in range(2)
    ]
    assert outs[0] == outs[1]
    assert len(outs[0]) == 8


def test_rules_match_segments_both_ways() -> None:
    rule = WeightRule("a.*.q.*", "b.*.qkv.*", "q")
    assert rule.target("a.3.q.weight") == ("b.3.qkv.weight", "q")
    assert rule.target("a.3.x.q.weight") is None
    assert rule.source("b.12.qkv.bias", "q") == "a.12.q.bias"
    assert rule.source("b.12.qkv.bias", "k") is None


def test_on_the_cpu_weights_of_linears_lie_by_input_and_can_be_loaded_again(folder: Path) -> None:
    model, stored = new_model(folder), tensors_of(folder)["model.layers.1.mlp.down_proj.weight"]
    weight = model.get_parameter("model.layers.1.mlp.down_proj.weight")
    for _ in range(2):
        load_model(model, folder)
        assert torch.equal(weight, stored)
        assert weight.stride() == (1, stored.shape[0])
        with torch.inference_mode():
            weight.zero_()


def test_weights_in_bf16_are_converted(tmp_path: Path) -> None:
    shutil.copytree(checkpoint("llama"), tmp_path / "model")
    tensors = {k: v.bfloat16() for k, v in tensors_of(tmp_path / "model").items()}
    save_file(tensors, tmp_path / "model" / "model.safetensors")
    model = new_model(tmp_path / "model")
    load_model(model, str(tmp_path / "model"))
    assert torch.equal(model.lm_head.weight[:VOCAB], tensors["lm_head.weight"].float())
    assert rank_of("llama").model.lm_head.weight.dtype == torch.float32
