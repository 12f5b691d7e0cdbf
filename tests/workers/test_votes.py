"""Votes through shared memory."""

from __future__ import annotations

import mmap
import random
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from thread_ranks import on_ranks

from workers.parallel.group import Group, Groups
from workers.parallel.votes import Board, share_board

CPU = torch.device("cpu")


@pytest.mark.parametrize("size", [2, 3])
def test_all_ranks_hear_the_same_in_each_vote(size: int) -> None:
    """Whatever their haste: none reads what another says in the next vote, or said in the one before."""
    memory = mmap.mmap(-1, Board.bytes_needed(size))
    dice = random.Random(size)
    said = [[dice.random() < 0.3 for _ in range(size)] for _ in range(600)]

    def vote(rank: int) -> list[list[int]]:
        board, pauses = Board(memory, rank, size), random.Random(rank)
        board.set_timeout(30.0)
        heard = []
        for vote in said:
            if pauses.random() < 0.05:
                time.sleep(0.0005)
            outcome = board.vote(says=vote[rank])
            if pauses.random() < 0.05:
                time.sleep(0.0005)
            heard.append(outcome())
        return heard

    with ThreadPoolExecutor(size) as pool:
        heard = list(pool.map(vote, range(size)))
    assert heard == [[[rank for rank, says in enumerate(vote) if says] for vote in said]] * size


def test_a_rank_that_does_not_vote_is_named() -> None:
    board = Board(mmap.mmap(-1, Board.bytes_needed(3)), 0, 3)
    board.set_timeout(0.05)
    outcome = board.vote(says=False)
    with pytest.raises(TimeoutError, match=r"rank 1 .* has not voted for 0\.05 s"):
        outcome()


def test_votes_without_a_board() -> None:
    def work(rank: int, groups: Groups) -> tuple[list[int], list[int], bool]:
        tp = groups.tp
        return tp.vote(says=rank == 1)(), tp.vote(says=False)(), share_board(tp, CPU) is tp

    assert on_ranks(3, work) == [([1], [], True)] * 3
    alone = Group("tp")
    assert (alone.vote(says=True)(), alone.vote(says=False)()) == ([0], [])
    assert share_board(alone, CPU) is alone
