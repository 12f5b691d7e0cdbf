"""A mixture of experts: which experts a token goes to, and the experts, cut over the ranks by their inner channels.

Shapes: T tokens, C channels, E experts, K experts a token, I inner channels of this rank.
Sources: Jiang et al., Mixtral of Experts, 2024; Dai et al., DeepSeekMoE, 2024; DeepSeek-V2 and V3, 2024.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from kernels.linear import linear, linear_wide
from kernels.moe import launches_of, mixture
from kernels.routing import choose
from workers.api.errors import ConfigError
from workers.layers.activation import GateAndMul
from workers.layers.build import Build, divide
from workers.quant.method import Part, Span


@dataclass(frozen=True, slots=True)
class Choice:
    """How a token's experts are chosen and what they count.

    Scores are the softmax or the sigmoid of the logits. With `groups`, only experts of the best `top_groups` groups are
    chosen from; a group counts as much as its best `group_top` experts together. `normalize`: the shares of a token add
    up to one. In the end shares are multiplied by `scale`.
    """

    experts: int
    top_k: int
    scores: Literal["softmax", "sigmoid"] = "softmax"
    normalize: bool = True
    scale: float = 1.0
    groups: int = 1
    top_groups: int = 1
    group_top: int = 1
    wide: bool = False  # logits are computed in fp32

    def __post_init__(self) -> None:
        if not 0 < self.top_k <= self.experts:
            raise ConfigError(f"{self.top_k} experts a token of {self.experts} cannot be")
        if self.experts % self.groups:
            raise ConfigError(f"{self.experts} experts cannot be cut into {self.groups} groups")

    def choose(self, logits: torch.Tensor, correction: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """logits [T, E] -> experts [T, K] int64 and shares [T, K] fp32; `correction` [E] changes who is chosen only."""
        return choose(
            logits,
            correction,
            self.top_k,
            sigmoid=self.scores == "sigmoid",
            normalize=self.normalize,
            scale=self.scale,
            groups=(self.groups, self.top_groups, self.group_top),
        )


class Router(nn.Module):
    """weight [E, C] and what else the choice needs, whole on every rank."""

    def __init__(
        self, channels: int, choice: Choice, *, build: Build, bias: bool = False, correction: bool = False
    ) -> None:
        super().__init__()
        self.choice = choice

        def parameter(*shape: int, dtype: torch.dtype = build.dtype) -> nn.Parameter:
            return nn.Parameter(torch.zeros(shape, dtype=dtype, device=build.device), requires_grad=False)

        self.weight = parameter(choice.experts, channels)
        self.bias = parameter(choice.experts) if bias else None
        self.e_score_correction_bias = parameter(choice.experts, dtype=torch.float32) if correction else None

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x [T, C] -> experts [T, K] int64, shares [T, K] fp32."""
        product = linear_wide if self.choice.wide else linear
        logits = product(x, self.weight, self.bias)
        return self.choice.choose(logits, self.e_score_correction_bias)


class Experts(nn.Module):
    """The experts' matrices: gate_up [E, 2 * I, C] and down [E, C, I], and with `bias` their offsets.

    Checkpoints have a tensor for each; parts are called "3.gate", "3.up" and "3". `choices`: experts a token.
    """

    def __init__(
        self,
        count: int,
        channels: int,
        inner: int,
        choices: int,
        *,
        build: Build,
        bias: bool = False,
        gate: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.group = build.groups.tp
        self.gate = gate or GateAndMul()
        self.count, self.channels, self.inner, self.choices = count, channels, inner, choices
        self.local = divide(inner, self.group.size, "inner size of the experts")

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.zeros(shape, dtype=build.dtype, device=build.device), requires_grad=False)

        self.gate_up = parameter(count, 2 * self.local, channels)
        self.down = parameter(count, channels, self.local)
        self._parts: dict[str, Mapping[str, Part]] = {}
        self.gate_up_bias = parameter(count, 2 * self.local) if bias else None
        self.down_bias = parameter(count, channels) if bias else None

    def parts(self, name: str) -> Mapping[str, Part]:
        """See `Loadable`."""
        shard = Span(self.inner, self.group.rank * self.local, self.local)
        channels = Span(self.channels, 0, self.channels)
        found: dict[str, Part] = {}
        for expert in range(self.count):
            if name == "down":
                found[f"{expert}"] = _of_expert(expert, channels, shard)
                continue
            for i, key in enumerate(("gate", "up")):
                half = Span(self.inner, shard.start, self.local, i * self.local)
                found[f"{expert}.{key}"] = _of_expert(expert, half, channels)
        return found

    def load(self, name: str, part: str, tensor: torch.Tensor) -> None:
        """See `Loadable`."""
        self.get_parameter(name)[self.parts_of(name)[part].target].copy_(tensor)

    def parts_of(self, name: str) -> Mapping[str, Part]:
        """`parts`, made once a parameter: each of many tensors asks for its own."""
        if name not in self._parts:
            self._parts[name] = self.parts(name)
        return self._parts[name]

    def finish(self) -> None:
        """See `Loadable`."""
        self._parts.clear()

    def forward(self, x: torch.Tensor, experts: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
        """x [T, C], experts and shares [T, K] -> [T, C]."""
        out = mixture(x, self.gate_up, self.down, experts, shares, self.gate, self.gate_up_bias, self.down_bias)
        return self.group.all_reduce(out)

    @property
    def kernel_key(self) -> tuple[int, ...]:
        """Equal for layers that launch the same kernels."""
        return (*self.gate_up.shape, self.choices)

    def launches(self, tokens: int) -> list[Callable[[], None]]:
        """All kernels that steps of up to `tokens` tokens may launch: to be called once each, in any thread."""
        return [
            *launches_of(self.gate_up, self.gate_up_bias, tokens, self.choices, shared=False),
            *launches_of(self.down, self.down_bias, tokens, self.choices, shared=True),
        ]


def _of_expert(expert: int, *axes: Span) -> Part:
    """A whole tensor of the checkpoint that fills a matrix of one expert."""
    whole = Part.of(*axes)
    return Part(whole.shape, whole.source, (slice(expert, expert + 1), *whole.target))
