"""Linear layers cut over the tensor-parallel ranks.

Column-parallel layers split the outputs and need no communication; row-parallel ones split the inputs and sum.
Source: Shoeybi et al., Megatron-LM, 2019.

Shapes: T tokens, H query heads, K KV heads, D head size.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, TypeAlias

import torch
from torch import nn

from workers.api.errors import ConfigError
from workers.layers.build import Build, divide
from workers.quant.method import LinearShape, Part, Span


class ParallelLinear(nn.Module):
    """The part of a linear layer that one rank holds; `shape` says which. The base of the others."""

    def __init__(self, name: str, shape: LinearShape, *, bias: bool, build: Build) -> None:
        super().__init__()
        self.name, self.shape = name, shape
        self.method = build.linear_method(name)
        self.method.create_weights(self, shape, bias=bias, dtype=build.dtype, device=build.device)

    def parts(self, name: str) -> Mapping[str, Part]:
        """See `Loadable`."""
        return self.method.parts(self, self.shape, name)

    def load(self, name: str, part: str, tensor: torch.Tensor) -> None:
        """See `Loadable`."""
        self.method.load(self.get_parameter(name), self.parts(name)[part], tensor)

    def finish(self) -> None:
        """See `Loadable`."""
        self.method.finish(self)
        weight = getattr(self, "weight", None)
        if isinstance(weight, nn.Parameter) and weight.is_cpu and weight.dtype == torch.float32 and weight.dim() == 2:
            # Input channels outermost, in memory only: the CPU's matrix product is faster so at small batches.
            weight.data = weight.data.t().contiguous().t()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, inputs] -> [T, outputs], both of this rank."""
        return self.method.apply(self, x)


class MergedColumnParallelLinear(ParallelLinear):
    """Several linears of one input as one product; every output is split over the ranks.

    `outputs` maps part ids to whole sizes. forward: x [T, inputs] -> [T, sum of this rank's outputs], in their order.
    `fused`: the checkpoint has them in one tensor, one behind the other.
    """

    def __init__(
        self, name: str, inputs: int, outputs: Mapping[str, int], *, bias: bool, build: Build, fused: bool = False
    ) -> None:
        tp, offset, before = build.groups.tp, 0, 0
        spans: dict[str, Span] = {}
        for key, total in outputs.items():
            size = divide(total, tp.size, f"output size of {name} {key}".rstrip())
            full = sum(outputs.values()) if fused else total
            spans[key] = Span(full, before + tp.rank * size, size, offset)
            offset += size
            before += total if fused else 0
        super().__init__(name, LinearShape(Span(inputs, 0, inputs), spans), bias=bias, build=build)


class ColumnParallelLinear(MergedColumnParallelLinear):
    """A linear whose outputs are split over the ranks."""

    def __init__(self, name: str, inputs: int, outputs: int, *, bias: bool, build: Build) -> None:
        super().__init__(name, inputs, {"": outputs}, bias=bias, build=build)


QKVLayout: TypeAlias = Literal["separate", "fused", "grouped"]


class QKVParallelLinear(ParallelLinear):
    """The projections q, k and v as one product; heads are split, KV heads replicated where there are fewer than ranks.

    forward: x [T, inputs] -> [T, (num_heads + 2 * num_kv_heads) * D], counts of this rank. `layout` is that of the
    checkpoint: three tensors, one tensor of all q, all k and all v, or one in which the query heads of each KV head are
    followed by their k and v.
    """

    def __init__(
        self,
        name: str,
        inputs: int,
        heads: int,
        kv_heads: int,
        head_size: int,
        *,
        bias: bool,
        build: Build,
        layout: QKVLayout = "separate",
    ) -> None:
        tp = build.groups.tp
        self_heads = divide(heads, tp.size, f"number of query heads of {name}")
        if heads % kv_heads:
            raise ConfigError(f"{name}: {heads} query heads are not a multiple of {kv_heads} KV heads")
        if kv_heads >= tp.size:
            self_kv = divide(kv_heads, tp.size, f"number of KV heads of {name}")
            first_kv = tp.rank * self_kv
        else:
            self_kv, first_kv = 1, tp.rank // divide(tp.size, kv_heads, f"tensor_parallel of {name}, by KV heads,")
        q, kv = self_heads * head_size, self_kv * head_size
        all_q, all_kv, at = heads * head_size, kv_heads * head_size, first_kv * head_size
        if layout == "separate":
            outputs = {
                "q": Span(all_q, tp.rank * q, q, 0),
                "k": Span(all_kv, at, kv, q),
                "v": Span(all_kv, at, kv, q + kv),
            }
        elif layout == "fused":
            full = all_q + 2 * all_kv
            outputs = {
                "q": Span(full, tp.rank * q, q, 0),
                "k": Span(full, all_q + at, kv, q),
                "v": Span(full, all_q + all_kv + at, kv, q + kv),
            }
        else:
            outputs = _grouped(heads // kv_heads, kv_heads, head_size, tp.rank * self_heads, self_heads, self_kv)
        super().__init__(name, LinearShape(Span(inputs, 0, inputs), outputs), bias=bias, build=build)
        self.num_heads, self.num_kv_heads, self.head_size = self_heads, self_kv, head_size
        self.sizes = (q, kv, kv)


def _grouped(group: int, kv_heads: int, size: int, first: int, heads: int, own_kv: int) -> dict[str, Span]:
    """Spans of a tensor that has, for each KV head, its `group` query heads, k and v; `heads` from `first` on."""
    full, stride = kv_heads * (group + 2) * size, (group + 2) * size
    outputs: dict[str, Span] = {}
    each = heads // own_kv  # query heads of a KV head on this rank: fewer than `group` where KV heads are replicated
    for n in range(own_kv):
        kv_head, lead = divmod(first + n * each, group)
        start = kv_head * stride
        outputs[f"q{n}"] = Span(full, start + lead * size, each * size, n * each * size)
        outputs[f"k{n}"] = Span(full, start + group * size, size, (heads + n) * size)
        outputs[f"v{n}"] = Span(full, start + (group + 1) * size, size, (heads + own_kv + n) * size)
    return outputs


class ReplicatedLinear(ParallelLinear):
    """A linear that every rank holds whole. forward: x [T, inputs] -> [T, outputs]."""

    def __init__(self, name: str, inputs: int, outputs: int, *, bias: bool, build: Build) -> None:
        shape = LinearShape(Span(inputs, 0, inputs), {"": Span(outputs, 0, outputs)})
        super().__init__(name, shape, bias=bias, build=build)


class RowParallelLinear(ParallelLinear):
    """A linear whose inputs are split over the ranks; the outputs are summed, so every rank has all of them.

    `deferred`: the sum is left to what comes behind (`RMSNorm.sum_first`).
    """

    deferred = False

    def __init__(self, name: str, inputs: int, outputs: int, *, bias: bool, build: Build) -> None:
        self.group = build.groups.tp
        size = divide(inputs, self.group.size, f"input size of {name}")
        shape = LinearShape(Span(inputs, self.group.rank * size, size), {"": Span(outputs, 0, outputs)})
        super().__init__(name, shape, bias=bias, build=build)

    def parts(self, name: str) -> Mapping[str, Part]:
        """As the method says; but the bias goes to rank 0 alone, or the sum would hold it many times."""
        parts = super().parts(name)
        if name == "bias" and self.group.rank > 0:
            return {key: Part(part.shape, (slice(0, 0),), (slice(0, 0),)) for key, part in parts.items()}
        return parts

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, inputs of this rank] -> [T, outputs]."""
        out = self.method.apply(self, x)
        return out if self.deferred else self.group.all_reduce(out)
