"""Training texts as padded tensors, sorted into a few row lengths.

Shapes: N rows, L tokens a row. A row is one conversation; shorter ones are padded at the right, which causal attention
never looks at, so that no mask is needed. Few fixed lengths keep `torch.compile` to a few graphs.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import corpus
import numpy as np
import torch
from tokenizers import Tokenizer

LENGTHS = (64, 160, 512, 2048)
IGNORED = -100


def token_ids(tokenizer: Tokenizer) -> dict[str, int]:
    """Ids of the special tokens by their text."""
    return {text: tokenizer.token_to_id(text) for text in corpus.SPECIAL}


def cut(ids: np.ndarray, end: int, longest: int) -> np.ndarray:
    """`ids`, shortened to whole messages of at most `longest` tokens in all."""
    if len(ids) <= longest:
        return ids
    ends = np.flatnonzero(ids[:longest] == end)
    return ids[: ends[-1] + 1] if len(ends) else ids[:0]


def labels_of(ids: np.ndarray, special: dict[str, int]) -> np.ndarray:
    """What is to be predicted at every position: the next token where the assistant speaks, else IGNORED.

    Text without roles is learned whole. The end token of an assistant's turn is learned as well.
    """
    marks = np.isin(ids, [special[corpus.SYSTEM], special[corpus.USER], special[corpus.ASSISTANT]])
    last = np.maximum.accumulate(np.where(marks, np.arange(len(ids)), -1))
    speaks = (last < 0) | ((ids[np.maximum(last, 0)] == special[corpus.ASSISTANT]) & ~marks)
    if marks.any():
        speaks &= last >= 0
    return np.where(speaks, ids, IGNORED)


def _encode_shard(job: tuple[str, int, int, int, float, int]) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """Ids and labels of one shard, rows end to end, and the length of each row: three objects, cheap to send back."""
    text, seed, index, count, drills, longest = job
    tokenizer = Tokenizer.from_str(text)
    special = token_ids(tokenizer)
    encoded = tokenizer.encode_batch_fast(corpus.shard(seed, index, count, drills))
    rows = [cut(np.array(row.ids, dtype=np.int16), special[corpus.END], longest) for row in encoded]
    labels = [np.append(labels_of(row, special)[1:], IGNORED).astype(np.int16) for row in rows if len(row)]
    return np.concatenate(rows), np.concatenate(labels), [len(row) for row in rows if len(row)]


class Batches:
    """Row groups on `device`, drawn at random in batches of about `tokens` tokens."""

    def __init__(
        self, rows: list[tuple[np.ndarray, np.ndarray]], special: dict[str, int], tokens: int, device: str
    ) -> None:
        self.tokens = tokens
        self.groups: list[tuple[torch.Tensor, torch.Tensor]] = []
        lengths = np.array([len(row) for row, _ in rows])
        for low, high in zip((0, *LENGTHS), LENGTHS, strict=False):
            chosen = np.flatnonzero((lengths > low) & (lengths <= high))
            if not len(chosen):
                continue
            ids = np.full((len(chosen), high), special[corpus.PAD], dtype=np.int16)
            labels = np.full((len(chosen), high), IGNORED, dtype=np.int16)
            for at, n in enumerate(chosen):
                row, target = rows[n]
                ids[at, : len(row)] = row
                labels[at, : len(row)] = target
            self.groups.append((torch.from_numpy(ids).to(device), torch.from_numpy(labels).to(device)))

    def describe(self) -> str:
        """How many rows there are of each length."""
        return ", ".join(f"{len(ids)} rows of <= {ids.shape[1]}" for ids, _ in self.groups)

    def draw(self, seed: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Endless (ids [N, L], labels [N, L]) int64 batches; each group is shuffled anew when it has been through."""
        chance = np.random.default_rng(seed)
        weights = np.array([ids.numel() for ids, _ in self.groups], dtype=np.float64)
        weights /= weights.sum()
        orders: list[torch.Tensor] = [torch.empty(0, dtype=torch.int64) for _ in self.groups]
        mixer = torch.Generator().manual_seed(seed)
        while True:
            which = int(chance.choice(len(self.groups), p=weights))
            ids, labels = self.groups[which]
            size = max(self.tokens // ids.shape[1], 1)
            while len(orders[which]) < size:  # few rows may be needed more than once in a batch
                again = torch.randperm(len(ids), generator=mixer)
                orders[which] = torch.cat([orders[which], again])
            take, orders[which] = orders[which][:size].to(ids.device), orders[which][size:]
            yield ids[take].long(), labels[take].long()


def build(
    tokenizer: Tokenizer,
    seed: int,
    conversations: int,
    tokens: int,
    device: str,
    tick: Callable[[int], None],
    drills: float = 0.0,
    longest: int = LENGTHS[-1],
) -> Batches:
    """Generate and encode `conversations` texts on all cores, cut to `longest` tokens each.

    `tick(n)` is called for every n texts that are done; `drills` as in `corpus.shard`.
    """
    shard = 2000
    text = tokenizer.to_str()
    sizes = [min(shard, conversations - at) for at in range(0, conversations, shard)]
    jobs = [(text, seed, index, size, drills, longest) for index, size in enumerate(sizes)]
    rows: list[tuple[np.ndarray, np.ndarray]] = []
    # Fresh processes: forking a process that holds CUDA or tokenizer threads may hang.
    with ProcessPoolExecutor(min(os.cpu_count() or 1, len(jobs)), mp_context=get_context("spawn")) as pool:
        for ids, labels, lengths in pool.map(_encode_shard, jobs):
            at = 0
            for length in lengths:
                rows.append((ids[at : at + length], labels[at : at + length]))
                at += length
            tick(len(lengths))
    return Batches(rows, token_ids(tokenizer), tokens, device)
