"""Two ranks over gloo against one, and process groups."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import checkpoint, prompt
from tp_rank import LENGTHS, STEPS, config, main, run_plans

from workers.api.errors import ConfigError
from workers.parallel.group import Group, Groups, connect
from workers.rank import Rank

NAMES = ("llama", "llama-tied", "llama-one-kv-head", "llama-biases", "qwen3", "llama")  # the last: dummy weights
PROMPTS = [prompt(n) for n in LENGTHS]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, torch.Tensor]]:
    """What each of two ranks computed."""
    folder = tmp_path_factory.mktemp("tp")
    paths = [str(checkpoint(name)) for name in NAMES]
    paths[-1] += "/"  # a folder of its own among the arguments
    spawn = multiprocessing.get_context("spawn")
    arguments = (2, f"file://{folder}/meet", paths, str(folder / "out"), PROMPTS)
    processes = [spawn.Process(target=main, args=(rank, *arguments)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=120)
    assert [p.exitcode for p in processes] == [0, 0]
    return [load_file(Path(f"{folder}/out.{rank}")) for rank in range(2)]


@pytest.mark.parametrize("index", range(len(NAMES)), ids=lambda i: f"{NAMES[i]}-{i}")
def test_two_ranks_compute_what_one_does_and_draw_the_same_tokens(
    ranks: list[dict[str, torch.Tensor]], index: int
) -> None:
    load_format = "dummy" if index == len(NAMES) - 1 else "safetensors"
    alone = run_plans(Rank(config(str(checkpoint(NAMES[index])), 1, load_format)), PROMPTS)
    key = f"{NAMES[index]}.{load_format}"
    first, second = ranks
    torch.testing.assert_close(first[f"{key}.logits"], alone["logits"], atol=1e-4, rtol=1e-4)
    assert torch.equal(first[f"{key}.logits"], second[f"{key}.logits"]), "the ranks' bits differ"
    for one in ranks:
        for slot, ids in enumerate(PROMPTS):
            end = len(ids) + STEPS
            assert one[f"{key}.tokens"][slot, :end].tolist() == alone["tokens"][slot, :end].tolist()


def test_a_rank_without_memory_comes_to_all_collectives(ranks: list[dict[str, torch.Tensor]]) -> None:
    """Over gloo, with votes in shared memory."""
    for one in ranks:
        assert bool(one["without.votes"])
        assert one["without.cut"].tolist() == [STEPS, STEPS], "three sequences decode in each"
        for slot, ids in enumerate(PROMPTS):
            end = len(ids) + STEPS
            expected = one["llama.safetensors.tokens"][slot, :end]
            assert one["without.tokens"][slot, :end].tolist() == expected.tolist()


def test_collectives_keep_the_order_of_ranks(ranks: list[dict[str, torch.Tensor]]) -> None:
    for one in ranks:
        assert one["gathered"].tolist() == [[0.0, 1.0], [0.0, 1.0]]
        assert one["reduced"].tolist() == [2.0, 1.0]


def test_a_rank_that_does_not_come_is_noticed_at_the_deadline(ranks: list[dict[str, torch.Tensor]]) -> None:
    assert "imed out" in bytes(ranks[0]["late"].tolist()).decode()


def test_a_group_of_one_is_free_and_gives_back_what_it_got() -> None:
    groups = connect(rank=0, tensor_parallel=1)
    assert groups == Groups()
    assert not torch.distributed.is_initialized()
    x = torch.ones(2, 3)
    assert groups.tp.all_reduce(x) is x
    assert groups.pp.all_gather(x) is x
    groups.ep.barrier()
    groups.set_timeout(0.1)


def test_groups_that_cannot_be_are_refused() -> None:
    with pytest.raises(ConfigError, match="outside of a world of 2"):
        connect(rank=2, tensor_parallel=2, init_method="file:///nowhere")
    with pytest.raises(ConfigError, match="init_method"):
        connect(rank=0, tensor_parallel=2)
    with pytest.raises(ConfigError, match="needs a process group"):
        Group("tp", 0, 2)
    with pytest.raises(ConfigError, match="rank 3"):
        Group("tp", 3, 2)
