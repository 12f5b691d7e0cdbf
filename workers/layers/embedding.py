"""Token embedding and output head, cut over the ranks by vocabulary.

Shapes: T tokens, C channels, V vocabulary, P padded vocabulary of one rank.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import nn

from kernels.invariant_linear import invariant_linear
from kernels.linear import linear
from kernels.sampling import greedy, greedy_with_score
from workers.context import embedding_override
from workers.layers.build import Build
from workers.quant.method import Part, Span

_PAD = 64  # tokens: a rank's share of the vocabulary is a multiple, so that matrix products have even edges


class VocabShard(nn.Module):
    """weight [P, C]: this rank's rows of a [V, C] matrix, zeros after them."""

    def __init__(self, vocab_size: int, channels: int, *, build: Build, weight: nn.Parameter | None = None) -> None:
        super().__init__()
        self.group = build.groups.tp
        self.vocab_size, self.channels = vocab_size, channels
        self.rows = -(-vocab_size // (_PAD * self.group.size)) * _PAD
        self.start = self.group.rank * self.rows
        if weight is None:
            zeros = torch.zeros(self.rows, channels, dtype=build.dtype, device=build.device)
            weight = nn.Parameter(zeros, requires_grad=False)
        self.weight = weight

    def parts(self, name: str) -> Mapping[str, Part]:
        """See `Loadable`."""
        start = min(self.start, self.vocab_size)
        rows = Span(self.vocab_size, start, min(self.rows, self.vocab_size - start))
        return {"": Part.of(rows) if name == "bias" else Part.of(rows, Span(self.channels, 0, self.channels))}

    def load(self, name: str, part: str, tensor: torch.Tensor) -> None:
        """See `Loadable`."""
        self.get_parameter(name)[self.parts(name)[part].target].copy_(tensor)

    def finish(self) -> None:
        """See `Loadable`."""


class VocabParallelEmbedding(VocabShard):
    """The embedding of tokens, or what the forward context has in their place."""

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """input_ids [T] int32 or int64 -> [T, C]; ids of overridden rows need not be in the vocabulary."""
        override = embedding_override()
        if self.group.size > 1:
            local = input_ids - self.start
            elsewhere = (local < 0) | (local >= self.rows)
            out = F.embedding(local.masked_fill_(elsewhere, 0), self.weight)
            out = self.group.all_reduce(out.masked_fill_(elsewhere.unsqueeze(1), 0))
        else:
            out = F.embedding(input_ids if override is None else input_ids.clamp(0, self.rows - 1), self.weight)
        return out if override is None else out.index_copy_(0, override.index, override.values.to(out.dtype))


class ParallelLMHead(VocabShard):
    """The output projection; `tied` shares the weight of the embedding."""

    def __init__(
        self,
        vocab_size: int,
        channels: int,
        *,
        build: Build,
        tied: VocabParallelEmbedding | None = None,
        bias: bool = False,
    ) -> None:
        super().__init__(vocab_size, channels, build=build, weight=None if tied is None else tied.weight)
        zeros = torch.zeros(self.rows, dtype=build.dtype, device=build.device) if bias else None
        self.bias = None if zeros is None else nn.Parameter(zeros, requires_grad=False)
        self._product = invariant_linear if build.batch_invariant else linear

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [T, C] -> logits [T, P] of this rank's rows, in the model's dtype, with the padding."""
        return self._product(hidden, self.weight, self.bias)

    def gather(self, logits: torch.Tensor) -> torch.Tensor:
        """What each rank has [T, P] -> logits [T, V] on every rank, without the padding."""
        return self.group.all_gather(logits)[:, : self.vocab_size]

    def greedy(self, logits: torch.Tensor) -> torch.Tensor:
        """`kernels.sampling.greedy` of what `gather` would make of `logits` [T, P] -> [T] int64, on every rank.

        Each rank looks at its own rows and tells the others the best one: no vocabulary travels.
        """
        group = self.group
        if group.size == 1 or self.rows * (group.size - 1) >= self.vocab_size:  # the last rank may have nothing
            return greedy(self.gather(logits))
        token, score = greedy_with_score(logits[:, : self.vocab_size - self.start])
        # A column for each rank, in which the others have zeros. Ids are whole numbers of fp32.
        said = torch.zeros(len(logits), 2 * group.size, dtype=torch.float32, device=logits.device)
        said[:, group.rank] = score
        said[:, group.size + group.rank] = token + self.start
        scores, tokens = group.all_reduce(said).chunk(2, dim=1)
        best, whose = scores.max(dim=1, keepdim=True)  # of equals the first: the lowest id
        return torch.where(best.isfinite(), tokens.gather(1, whose), -1.0).squeeze(1).long()


class NormalizedLMHead(ParallelLMHead):
    """An output projection whose rows have length one (Baichuan2); they are made so once, after loading."""

    def finish(self) -> None:
        """See `Loadable`."""
        self.weight.copy_(F.normalize(self.weight.float()))
