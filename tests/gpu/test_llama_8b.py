"""The 8B Llama shape in bf16: logits as near to those of fp32 as transformers' own in bf16."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import workloads

from workers.api.config import EngineConfig, ModelConfig, ReplicaConfig
from workers.api.request import EngineRequest, SamplingParams
from workers.engine.plan import StepPlan
from workers.models.loader import targets
from workers.rank import Rank, run_to_completion

LENGTHS = (1, 2, 15, 16, 17, 63, 128, 300, 511, 777, 1024, 1500)
OUT = 4  # tokens of each: one out of a prompt, the others out of decodes
STEP = 512  # tokens: the longest prompts come in pieces, beside decodes
MORE, MOST = 1.25, 1.5  # of transformers' own error: in the mean of a request's rows, and the greatest

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.mem_get_info()[1] < 70 << 30, reason="needs a GPU of 70 GiB"
    ),
]


@pytest.fixture(scope="module")
def reference() -> Any:
    """Transformers' model in fp32, its weights those of bf16."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(**workloads.CONFIG)
    with torch.device("cuda"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return model.float().eval()


@pytest.fixture(scope="module")
def rank(reference: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rank]:
    """Ours with the same weights."""
    folder: Path = tmp_path_factory.mktemp("llama-8b")
    (folder / "config.json").write_text(json.dumps(workloads.CONFIG))
    limits = EngineConfig(num_blocks=1024, max_num_seqs=16, max_num_batched_tokens=STEP, cuda_graphs=False)
    rank = Rank(ReplicaConfig(ModelConfig(str(folder), "llama-8b", load_format="dummy"), limits, device="cuda"))
    wanted = targets(rank.model)
    with torch.inference_mode():
        for name, tensor in reference.state_dict().items():
            wanted.pop(name).put(tensor.to(torch.bfloat16))
    assert not wanted
    yield rank
    rank.close()


def drawn(rank: Rank, asked: list[EngineRequest], monkeypatch: pytest.MonkeyPatch) -> dict[str, list[torch.Tensor]]:
    """The logits that each request's tokens were drawn from, fp32 on the host."""
    by_prompt = {one.prompt_ids: one.id for one in asked}
    names: dict[int, str] = {}
    rows: dict[str, list[torch.Tensor]] = {one.id: [] for one in asked}
    emits: list[int] = []
    flatten, compute = rank.runner.state.flatten, rank.model.own_logits

    def flattened(plan: StepPlan) -> Any:
        names.update({new.slot: by_prompt[tuple(new.token_ids)] for new in plan.added})
        flat = flatten(plan)
        emits[:] = flat.emit_slots.tolist()
        return flat

    def computed(hidden: torch.Tensor) -> torch.Tensor:
        logits = compute(hidden)
        for slot, row in zip(emits, logits.float().cpu(), strict=True):
            rows[names[slot]].append(row)
        return logits

    monkeypatch.setattr(rank.runner.state, "flatten", flattened)
    monkeypatch.setattr(rank.model, "own_logits", computed)
    engine = rank.make_engine()
    tokens = run_to_completion(engine, asked)
    engine.check_ledgers()
    assert all(len(tokens[one.id]) == len(rows[one.id]) == OUT for one in asked)
    return rows


def error(got: torch.Tensor, exact: torch.Tensor) -> float:
    return ((got - exact).norm() / exact.norm()).item()


def test_logits_are_as_near_to_fp32_as_those_of_transformers(
    reference: Any, rank: Rank, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(4)
    asked = [
        EngineRequest(str(n), tuple(rng.randrange(10, 127_990) for _ in range(n)), SamplingParams(OUT, temperature=0.0))
        for n in LENGTHS
    ]
    rows = drawn(rank, asked, monkeypatch)

    def of_reference() -> dict[str, torch.Tensor]:
        found = {}
        for one in asked:
            fed = [*one.prompt_ids, *(int(row.argmax()) for row in rows[one.id][:-1])]
            with torch.inference_mode():
                logits = reference(torch.tensor([fed], device="cuda"), logits_to_keep=OUT).logits[0]
            found[one.id] = logits.float().cpu()
        return found

    exact = of_reference()
    rotary = copy.deepcopy(reference.model.rotary_emb)
    reference.to(torch.bfloat16)
    reference.model.rotary_emb = rotary  # its frequencies stay in fp32, as where transformers loads in bf16
    theirs = of_reference()
    for name, wanted in exact.items():
        ours = [error(row, exact_row) for row, exact_row in zip(rows[name], wanted, strict=True)]
        those = [error(row, exact_row) for row, exact_row in zip(theirs[name], wanted, strict=True)]
        print(f"{name} tokens: ours {max(ours):.4f}, transformers {max(those):.4f}")
        assert sum(ours) <= MORE * sum(those), name
        assert max(ours) <= MOST * max(those), name
