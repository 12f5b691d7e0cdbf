"""Which way sums go, and why; sums left to norms; greedy draws over shards of the vocabulary. No GPU is needed."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from thread_ranks import ThreadGroup, on_ranks
from tiny import checkpoint, replica

import workers.parallel.peer_memory as peer_memory
from kernels.all_reduce import Inboxes, Layout
from kernels.sampling import greedy
from workers.execution.graphs import kept_by_any
from workers.layers.build import Build
from workers.layers.embedding import ParallelLMHead
from workers.layers.linear import RowParallelLinear
from workers.layers.norm import RMSNorm
from workers.parallel.group import Group, Groups
from workers.parallel.peer_memory import MOST_SENT, MOST_WIDTHS, PeerMemory, share_memory
from workers.rank import Rank

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def handle(tmp_path: Any) -> Iterator[dist.ProcessGroup]:
    """A real process group, of this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def scripted(monkeypatch: pytest.MonkeyPatch, *answers: list[list[int]], reach: bool = True, seen: int = 2) -> None:
    """What all ranks say each time they are asked, and what torch says of the GPUs."""
    said = iter(answers)
    monkeypatch.setattr(Group, "agree", lambda self, values, device: next(said))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: seen)
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda one, other: reach)


def refuse(self: PeerMemory, channels: int, dtype: torch.dtype) -> None:
    raise RuntimeError("no handles here")


@pytest.mark.parametrize(
    ("device", "answers", "changes", "why"),
    [
        (CPU, [], {}, "through gloo: they are on CPUs"),
        (GPU, [[[7, 0], [8, 1]]], {}, "through gloo: they are on several hosts"),
        (GPU, [[[7, 0], [7, 0]]], {}, "through gloo: each sees its own GPU only"),
        (GPU, [[[7, 0], [7, 1]], [[1], [0]]], {}, "through gloo: their GPUs do not reach each other's memory"),
        (GPU, [[[7, 0], [7, 1]], [[1], [1]], [[1], [0]]], {}, "through gloo: torch's symmetric memory failed"),
        (GPU, [[[7, 0], [7, 1]], [[1], [1]], [[0], [0]]], {}, "through each other's memory"),
    ],
    ids=["cpu", "hosts", "own-gpu", "no-reach", "one-failed", "works"],
)
def test_the_way_of_sums_and_the_reason_are_logged(
    device: torch.device,
    answers: list[list[list[int]]],
    changes: dict[str, Any],
    why: str,
    handle: dist.ProcessGroup,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    scripted(monkeypatch, *answers, **changes)
    monkeypatch.setattr(PeerMemory, "prepare", lambda self, channels, dtype: None)
    group = Group("tp", 0, 2, handle)
    with caplog.at_level(logging.INFO, "echelon.parallel"):
        found = share_memory(group, device)
    assert why in caplog.text
    assert found.fuses == ("each other" in why and "process" not in why and "their GPUs" not in why)
    assert (found is group) == (not found.fuses)


def test_a_rank_that_cannot_make_an_inbox_says_why(
    handle: dist.ProcessGroup, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    told: list[list[int]] = []
    answers = iter([[[7, 0], [7, 1]], [[1], [1]]])

    def agree(self: Group, values: list[int], device: torch.device) -> list[list[int]]:
        told.append(values)
        return next(answers, [values, [0]])

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda one, other: True)
    monkeypatch.setattr(Group, "agree", agree)
    monkeypatch.setattr(PeerMemory, "prepare", refuse)
    assert not share_memory(Group("tp", 0, 2, handle), GPU).fuses
    assert told[-1] == [1]
    assert "no handles here" in caplog.text


def test_hosts_of_one_kernel_are_told_apart(handle: dist.ProcessGroup, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks in two containers of a machine, as one of them sees it: each has the other's GPU for its neighbour's."""
    told: dict[str, list[int]] = {}

    def agree(self: Group, values: list[int], device: torch.device) -> list[list[int]]:
        told.setdefault(host, values)
        return [values, values]

    monkeypatch.setattr(Group, "agree", agree)
    for host in ("node a", "node b"):
        share_memory(Group("tp", 0, 2, handle), GPU, host)
    assert told["node a"][0] != told["node b"][0]
    assert told["node a"][1] == told["node b"][1]


def test_a_group_of_one_or_of_threads_stays_as_it_is() -> None:
    alone = Group("tp")
    assert share_memory(alone, GPU) is alone
    assert on_ranks(2, lambda rank, groups: share_memory(groups.tp, GPU) is groups.tp) == [True, True]


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> PeerMemory:
    """Of two ranks; inboxes are noted and not made."""
    made = PeerMemory(SimpleNamespace(handle="", rank=0, size=2), GPU)  # type: ignore[arg-type]
    monkeypatch.setattr(made, "prepare", lambda *width: made._inboxes.setdefault(width, None))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return made


def test_what_peer_memory_takes(memory: PeerMemory, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.zeros(4, 64, dtype=torch.bfloat16)
    assert memory.takes(x)
    assert memory.takes(x[None])
    assert not memory.takes(x.long()), "whole numbers"
    assert not memory.takes(x[:, :32]), "not adjacent"
    assert not memory.takes(x[:0])
    assert not memory.takes(torch.zeros(1, 2 * peer_memory.MOST_CHANNELS))
    rows = MOST_SENT[2] // (64 * 2)
    assert memory.takes(torch.empty(rows, 64, dtype=torch.bfloat16))
    assert not memory.takes(torch.empty(rows + 1, 64, dtype=torch.bfloat16))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert memory.takes(x), "its inboxes are there"
    assert not memory.takes(x.float()), "inboxes cannot be made while a graph is captured"


def test_inboxes_are_made_for_some_widths_only(memory: PeerMemory) -> None:
    taken = [memory.takes(torch.zeros(1, 8 * n)) for n in range(1, MOST_WIDTHS + 3)]
    assert taken == [True] * MOST_WIDTHS + [False] * 2


def test_a_timeout_is_for_all_inboxes_also_those_made_later(monkeypatch: pytest.MonkeyPatch) -> None:
    made = PeerMemory(SimpleNamespace(handle="", rank=0, size=2), CPU)  # type: ignore[arg-type]
    buffers = SimpleNamespace(get_buffer=lambda rank, shape, dtype: torch.empty(shape, dtype=dtype))
    monkeypatch.setattr(peer_memory.symmetric_memory, "empty", torch.empty)
    monkeypatch.setattr(peer_memory.symmetric_memory, "rendezvous", lambda inbox, handle: buffers)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    made.prepare(8, torch.float32)
    endless = made._inboxes[8, torch.float32].patience.item()
    group = Group("tp", 0, 2, "", exchange=made)  # type: ignore[arg-type]
    monkeypatch.setattr(dist.distributed_c10d, "_set_pg_timeout", lambda timeout, handle: None)
    Groups(tp=group).set_timeout(2.5)
    made.prepare(16, torch.float32)
    assert [inboxes.patience.item() for inboxes in made._inboxes.values()] == [2.5e9, 2.5e9]
    assert endless > 365 * 86400e9


def test_a_ranks_timeout_is_told_to_the_exchange_that_it_made(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[float] = []
    exchange: Any = SimpleNamespace(set_timeout=told.append, takes=lambda x: False)
    monkeypatch.setattr("workers.rank.share_memory", lambda group, device, host: replace(group, exchange=exchange))
    rank = Rank(replica(checkpoint("llama")), groups=Groups())
    rank.set_timeout(2.5)
    rank.close()
    assert told == [2.5]


def test_sums_are_left_to_the_norms_behind_them() -> None:
    config = replica(checkpoint("llama"), tensor_parallel=2)

    def deferred(rank: int, groups: Groups) -> tuple[int, int, list[str]]:
        modules = dict(Rank(config, rank=rank, groups=groups).model.named_modules())
        rows = [one for one in modules.values() if isinstance(one, RowParallelLinear)]
        norms = [name for name, one in modules.items() if isinstance(one, RMSNorm) and one._group is not None]
        return len(rows), sum(one.deferred for one in rows), norms

    for rows, left, norms in on_ranks(2, deferred):
        assert rows == left == len(norms) == 6
        assert "model.norm" in norms
        assert "model.layers.0.input_layernorm" not in norms, "nothing stands before it but the embedding"


@pytest.mark.parametrize("vocab", [301, 640, 130, 60], ids=lambda vocab: f"of{vocab}")
@pytest.mark.parametrize("size", [2, 3])
def test_greedy_over_shards_is_greedy_over_all(vocab: int, size: int) -> None:
    generator = torch.Generator().manual_seed(vocab)
    logits = torch.randn(40, vocab, generator=generator).bfloat16()  # of 16 bits: there are equals
    logits[3, vocab - 1] = torch.nan
    logits[4, 0] = torch.inf
    logits[5] = -torch.inf
    logits[6, : vocab - 1] = -torch.inf
    logits[7] = 1.0
    expected = greedy(logits)
    assert expected[3] == expected[4] == expected[5] == -1

    def draw(rank: int, groups: Groups) -> tuple[torch.Tensor, torch.Tensor]:
        head = ParallelLMHead(vocab, 8, build=Build(groups=groups))
        own = torch.full((40, head.rows), 99.0, dtype=torch.bfloat16)  # padding, which nobody may draw
        part = logits[:, head.start : head.start + head.rows]
        own[:, : part.shape[1]] = part
        return head.greedy(own), head.gather(own)

    for tokens, whole in on_ranks(size, draw):
        assert torch.equal(tokens, expected)
        assert torch.equal(whole.nan_to_num(7.0), logits.nan_to_num(7.0))


def test_ranks_capture_what_any_of_them_would() -> None:
    ladder, kept = [1, 2, 4, 8, 16], [[1, 4, 16], [2, 4, 16]]
    found = on_ranks(2, lambda rank, groups: kept_by_any(ladder, kept[rank], groups.tp, CPU))
    assert found == [[1, 2, 4, 16]] * 2


def test_what_ranks_say_comes_in_their_order() -> None:
    def agree(rank: int, groups: Groups) -> list[list[int]]:
        assert isinstance(groups.tp, ThreadGroup)
        return groups.tp.agree([rank, 10 * rank, 5], CPU)

    assert on_ranks(3, agree) == [[[0, 0, 5], [1, 10, 5], [2, 20, 5]]] * 3


@pytest.mark.parametrize("made_in_inference_mode", [True, False])
def test_the_limit_of_a_sum_is_set_in_any_mode(made_in_inference_mode: bool) -> None:
    with torch.inference_mode(made_in_inference_mode):
        inboxes = Inboxes.at([0, 0], 0, Layout(2, 8, 4), CPU)
    inboxes.wait_at_most(1.5)
    assert inboxes.patience.tolist() == [1_500_000_000]
