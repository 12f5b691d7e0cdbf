"""What each workload is measured by, its floor on a machine, and how vLLM did on one of the same kind.

Floors count what cannot be left out: weights and KV cache read once a decode step at the copy rate, the operations of
prompts at the matrix rate. vLLM's figures are those of vLLM 0.24 on one H100 80GB HBM3 (torch 2.11, FlashAttention 3,
CUDA graphs) with the ceilings `THEN`; they scale with what a workload is bound by.
"""

from __future__ import annotations

from dataclasses import dataclass

import workloads

COPY, PRODUCT = "copy_GB_per_s", "bf16_TFLOP_per_s"
THEN = {COPY: 2996.0, PRODUCT: 733.0}  # means of two machines; a busy card's products ran at 630


@dataclass(frozen=True, slots=True)
class Goal:
    """One figure of a workload: its name in a summary, what is asked of it, and what vLLM reached."""

    workload: str
    figure: str
    unit: str
    asked: float
    vllm: float
    bound_by: str
    least: bool = False  # the smaller, the better

    def scaled(self, ceilings: dict[str, float]) -> float:
        """vLLM's figure on a machine of these ceilings."""
        ratio = ceilings[self.bound_by] / THEN[self.bound_by]
        return self.vllm / ratio if self.least else self.vllm * ratio

    def times_as_good(self, ours: float, other: float) -> float:
        """Above 1 where ours is better."""
        return other / ours if self.least else ours / other

    def reached(self, ours: float) -> bool:
        """Whether the figure is what was asked for."""
        return ours <= self.asked if self.least else ours >= self.asked

    def floor(self, ceilings: dict[str, float]) -> float:
        """The figure of an engine that does nothing but what it must."""
        lengths = [(len(r["prompt"]), r["out"]) for r in workloads.ALL[self.workload]()]
        shared = 1024 if self.workload == "W5" else 0
        prompt, answers = least_seconds(lengths, ceilings, shared=shared)
        if self.figure.startswith("tpot"):
            return 1e3 * answers / (lengths[0][1] - 1)
        if self.figure.startswith("ftl"):
            return 1e3 * prompt
        counts = {"requests": len(lengths), "input": sum(i for i, _ in lengths), "output": sum(o for _, o in lengths)}
        return counts[self.figure.split("_", maxsplit=1)[0]] / (prompt + answers)


GOALS = (
    Goal("W1", "tpot_ms_mean", "ms a token", 5.6, 6.5, COPY, least=True),
    Goal("W1", "ftl_ms_mean", "ms to the first token", 12.0, 12.3, COPY, least=True),
    Goal("W2a", "output_tok_per_s", "tok/s out", 7_900.0, 7_550.0, COPY),
    Goal("W2b", "output_tok_per_s", "tok/s out", 17_500.0, 16_665.0, COPY),
    Goal("W3", "requests_per_s", "requests/s", 55.0, 53.1, COPY),
    Goal("W4a", "input_tok_per_s", "tok/s in", 42_000.0, 42_000.0, PRODUCT),
    Goal("W4b", "ftl_ms_mean", "ms to the first token", 215.0, 217.0, PRODUCT, least=True),
    Goal("W5", "output_tok_per_s", "tok/s out", 10_700.0, 10_254.0, COPY),
)


def least_seconds(
    lengths: list[tuple[int, int]], ceilings: dict[str, float], *, shared: int = 0
) -> tuple[float, float]:
    """Seconds of all prompts, which give the first tokens, and of the decode steps after that.

    `lengths` are (tokens in, tokens out), all there from the start; `shared`: tokens that all prompts begin with,
    computed once, and read once a step.
    """
    counts, config = workloads.weight_counts(), workloads.CONFIG
    copy, rate = 1e9 * ceilings[COPY], 1e12 * ceilings[PRODUCT]
    weights, kv = 2 * counts["read_per_step"], counts["kv_bytes_per_token_bf16"]
    channels = config["num_hidden_layers"] * config["num_attention_heads"] * config["head_dim"]
    own = [(i - shared, i) for i, _ in lengths] + ([(shared, shared)] if shared else [])
    operations = sum(2 * counts["matmul_per_token"] * n + 4 * channels * n * (end - n / 2) for n, end in own)
    prompt = max(operations / rate, weights / copy)
    steps = max(o for _, o in lengths) - 1
    read = kv * (sum((o - 1) * (i - shared) + o * (o - 1) / 2 for i, o in lengths) + shared * steps)
    return prompt, (weights * steps + read) / copy
