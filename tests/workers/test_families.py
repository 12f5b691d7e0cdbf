"""Every family against its reference in fp32: prefill, chunks, decodes and a ragged batch, on one rank and on two; some
on four, where each key and value head is on two of them.
"""

from __future__ import annotations

import pytest
import torch
from family_cases import CASES, WAYS, got, wanted

ON_FOUR = ("llama", "gemma2", "falcon-7b", "qwen2-moe", "deepseek-v3", "gpt-oss", "chatglm2", "baichuan-13b")


@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_of_the_reference(name: str) -> None:
    want = wanted(name)
    for tensor_parallel in (1, 2, 4) if name in ON_FOUR else (1, 2):
        found = got(name, tensor_parallel)
        for way in WAYS:
            torch.testing.assert_close(
                found[way],
                want[way],
                atol=1e-4,
                rtol=1e-4,
                msg=lambda m: f"{way}, tp={tensor_parallel}: {m}",  # noqa: B023
            )
