"""A replica of two ranks on two GPUs, over Ray and NCCL, says over HTTP what transformers says in fp32 on the CPU."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "configs" / "demo-model"

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]


@pytest.fixture(scope="module")
def base_url() -> Iterator[str]:
    pytest.importorskip("ray")
    from cluster.environment import free_port, prepare_ray

    prepare_ray()
    from cluster.app import bring_down, bring_up
    from cluster.config import ClusterConfig, HttpSection, ModelSection

    model = ModelSection(path="demo", tensor_parallel=2, device="cuda", dtype="float32")
    try:
        config = ClusterConfig(model=model, http=HttpSection(port=free_port()))
        yield bring_up(config, address=None, progress=lambda text: None).base_url
    finally:
        bring_down(own_ray=True)


def test_two_ranks_answer_as_transformers(base_url: str) -> None:
    reference = json.loads((ROOT / "tests" / "workers" / "demo_reference.json").read_text())
    tokenizer = tokenizers.Tokenizer.from_file(str(FOLDER / "tokenizer.json"))

    def ask(prompt: list[int]) -> tuple[str, int]:
        body: dict[str, Any] = {"model": "demo", "prompt": prompt, "max_tokens": reference["max_new"], "temperature": 0}
        request = urllib.request.Request(
            f"{base_url}/completions", json.dumps(body).encode(), {"content-type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=120) as answer:
            found = json.load(answer)
        return found["choices"][0]["text"], found["usage"]["completion_tokens"]

    with ThreadPoolExecutor(32) as pool:
        answers = list(pool.map(ask, reference["prompts"]))
    expected = [(tokenizer.decode(ids, skip_special_tokens=True), len(ids)) for ids in reference["answers"]]
    wrong = {i: pair for i, pair in enumerate(zip(answers, expected, strict=True)) if pair[0] != pair[1]}
    assert not wrong
