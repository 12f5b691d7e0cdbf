"""The runner: results in order, faults that stay where they belong, memory that fits or says what would."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from tiny import VOCAB, added, checkpoint, generate, prompt, rank_of, reference, replica, request, run

from workers import context
from workers.api.config import EngineConfig, KVCacheSpec
from workers.api.errors import ConfigError, EngineFault, OutOfMemory
from workers.context import EmbeddingOverride, ForwardContext, forward_context
from workers.engine.plan import StepPlan
from workers.execution.cache import allocate, count_blocks
from workers.execution.memory import readable
from workers.execution.pinned import HostBuffers
from workers.execution.upload import Uploader
from workers.rank import Rank, run_to_completion


@pytest.mark.parametrize("threaded", [False, True])
def test_a_decode_reads_the_token_that_the_step_before_it_drew(threaded: bool) -> None:
    rank, ids = rank_of("llama", threaded=threaded), prompt(14)
    want = generate(reference("llama"), ids, 6)
    plans = [StepPlan(0, (), (added(4, ids),), (run(4, 0, 14, blocks=(3,)),))]
    plans += [StepPlan(n, (), (), (run(4, 13 + n, 1, blocks=(8,) if 13 + n == 16 else ()),)) for n in range(1, 6)]
    handles = [rank.runner.submit(plan) for plan in plans]  # all before the first result is seen
    results = [handle.result() for handle in handles]
    assert [r.slots[0].token_ids[0] for r in results] == want
    assert [r.step for r in results] == list(range(6))
    assert all(r.seconds > 0 for r in results)
    assert handles[0].result() is results[0]
    rank.close()


def test_threads_and_inline_generate_the_same() -> None:
    requests = [request(str(i), prompt(10 + i), temperature=0.8, seed=i, max_tokens=12) for i in range(6)]
    outs = []
    for threaded in (False, True):
        rank = rank_of("llama", threaded=threaded)
        outs.append(run_to_completion(rank.make_engine(), requests))
        rank.close()
    assert outs[0] == outs[1]


@pytest.mark.parametrize("threaded", [False, True])
def test_a_step_that_fails_names_the_rank_and_the_runner_lives_on(threaded: bool, monkeypatch: Any) -> None:
    rank, ids = rank_of("llama", rank=3, threaded=threaded), prompt(5)
    rank.runner.passes.collect = True
    plan = StepPlan(7, (), (added(0, ids),), (run(0, 0, 5, blocks=(0,)),))
    good = rank.runner.submit(plan).result().slots
    with monkeypatch.context() as patch:
        patch.setattr(rank.model.model.norm, "forward", lambda *_: 1 / 0)
        patch.setattr(rank.model.model.norm, "add", lambda *_: 1 / 0)
        handle = rank.runner.submit(plan)
        for _ in range(2):
            with pytest.raises(EngineFault, match=r"rank 3, step 7 \(1 sequences, 5 tokens\): ZeroDivisionError"):
                handle.result()
    again = StepPlan(8, (0,), (added(0, ids),), (run(0, 0, 5, blocks=(0,)),))
    assert rank.runner.submit(again).result().slots == good
    rank.close()


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (StepPlan(1, (), (), ()), "schedules nothing"),
        (StepPlan(1, (), (added(0, prompt(9)),), (run(0, 0, 4), run(0, 4, 1))), "out of order"),
        (StepPlan(1, (), (added(0, prompt(300)),), (run(0, 0, 4),)), "256"),
        (StepPlan(1, (), (added(0, prompt(9)),), (run(0, 0, 9, blocks=tuple(range(40))),)), "40 blocks"),
        (StepPlan(1, (), (added(0, prompt(9)),), (run(0, 250, 9),)), "256"),
        (StepPlan(1, (), (added(0, prompt(9)),), (run(0, 0, 9, emit=2),)), "several"),
    ],
)
def test_plans_that_cannot_be_run_are_refused(plan: StepPlan, message: str) -> None:
    with pytest.raises(EngineFault, match=message):
        rank_of("llama").runner.submit(plan).result()


def test_one_sequence_with_nan_logits_ends_alone() -> None:
    rank = rank_of("llama")
    good = run_to_completion(rank.make_engine(), [request("good", prompt(6))])["good"]
    with torch.inference_mode():
        rank.model.model.embed_tokens.weight[300] = torch.nan  # only the prompt below holds it
    bad_ids = (300, 5, 6)
    plan = StepPlan(
        1, (), (added(0, prompt(6)), added(1, bad_ids)), (run(0, 0, 6, blocks=(0,)), run(1, 0, 3, blocks=(1,)))
    )
    assert 300 not in prompt(6)
    fine, faulty = rank.runner.submit(plan).result().slots
    assert (fine.token_ids, fine.fault) == ((good[0],), None)
    assert faulty.token_ids == ()
    assert faulty.fault is not None
    assert "finite" in faulty.fault


def test_a_rank_that_does_not_collect_runs_the_same_and_returns_nothing() -> None:
    rank, ids = rank_of("llama", rank=1), prompt(9)
    result = rank.runner.submit(StepPlan(1, (), (added(2, ids),), (run(2, 0, 9, blocks=(0,)),))).result()
    assert result.slots == ()
    assert int(rank.runner.state.token_table[2, 9]) == generate(reference("llama"), ids, 1)[0]


def test_blocks_are_counted_from_bytes_and_too_few_say_what_would_fit() -> None:
    spec = KVCacheSpec((0, 1), num_kv_heads=2, head_size=8, dtype="float32")
    size = spec.block_bytes(16)
    engine = EngineConfig()
    assert count_blocks([spec], engine, 64, 5 * size + size // 2) == 5
    with pytest.raises(OutOfMemory, match=r"room for 48 tokens.*max_model_len = 64.*at most 48"):
        count_blocks([spec], engine, 64, 3 * size)
    with pytest.raises(OutOfMemory, match="room for 0 tokens"):
        count_blocks([spec], engine, 64, -1)
    caches = allocate([spec], 5, 16, torch.device("cpu"))
    assert [c.key.shape for c in caches] == [(5, 16, 2, 8)] * 2
    assert sum(c.key.nbytes + c.value.nbytes for c in caches) == 5 * size


def test_layers_of_several_specs_are_put_in_order_and_gaps_refused() -> None:
    full = KVCacheSpec((1,), 2, 8, "float32")
    window = KVCacheSpec((0, 2), 1, 4, "bfloat16", window=32)
    caches = allocate([full, window], 3, 16, torch.device("cpu"))
    assert [(c.key.shape[2:], c.key.dtype) for c in caches] == [
        ((1, 4), torch.bfloat16),
        ((2, 8), torch.float32),
        ((1, 4), torch.bfloat16),
    ]
    with pytest.raises(ConfigError, match="layers"):
        allocate([window], 3, 16, torch.device("cpu"))


def test_a_rank_says_when_its_cache_is_too_small_and_a_fixed_pool_bounds_the_context() -> None:
    with pytest.raises(OutOfMemory, match="max_model_len = 256"):
        rank_of("llama", cache_bytes_cpu=20_000)
    assert rank_of("llama", num_blocks=3).max_model_len == 48
    assert rank_of("llama", num_blocks=1).max_model_len == 16


def test_a_rank_refuses_a_group_that_is_not_the_configs() -> None:
    with pytest.raises(ConfigError, match="tensor_parallel = 2"):
        Rank(replica(checkpoint("llama"), tensor_parallel=2))


def test_readable_bytes() -> None:
    assert [readable(n) for n in (0, 1023, 1536, 3 << 20, 5 << 30)] == [
        "0 B",
        "1023 B",
        "1.5 KiB",
        "3.0 MiB",
        "5.00 GiB",
    ]


def test_uploads_on_the_cpu_share_memory() -> None:
    import numpy as np

    array = np.arange(6, dtype=np.int64).reshape(2, 3)
    (tensor,) = Uploader(torch.device("cpu"), HostBuffers(pinned=False)).upload([array])
    assert tensor.data_ptr() == array.ctypes.data
    assert tensor.tolist() == array.tolist()


def forward(
    rank: Rank, ids: tuple[int, ...], override: EmbeddingOverride | None = None, model: Any = None
) -> torch.Tensor:
    plan = StepPlan(1, (), (added(0, ids),), (run(0, 0, len(ids), blocks=tuple(range(4))),))
    with torch.inference_mode():
        inputs = rank.runner.state.prepare(plan)
        shared = ForwardContext((inputs.attention,) * 3, rank.runner.caches, override)
        with forward_context(shared):
            return (rank.model if model is None else model)(inputs.input_ids, inputs.positions).clone()


def test_embeddings_can_be_overridden_even_where_the_ids_mean_nothing() -> None:
    rank, ids = rank_of("llama"), prompt(20)
    index = torch.tensor([2, 3, 11])
    values = rank.model.model.embed_tokens.weight[[ids[2], ids[3], ids[11]]]
    strange = list(ids)
    for i in index.tolist():
        strange[i] = VOCAB + 10**6
    got = forward(rank, tuple(strange), EmbeddingOverride(index, values))
    torch.testing.assert_close(got, forward(rank, ids))
    other = forward(rank, ids, EmbeddingOverride(index, values + 1))
    assert not torch.allclose(other, got)


def test_the_model_compiles_into_one_graph_with_attention_opaque() -> None:
    torch._dynamo.reset()
    graphs = []

    def backend(graph: torch.fx.GraphModule, _inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    rank, ids = rank_of("llama"), prompt(20)
    compiled = torch.compile(rank.model, backend=backend, fullgraph=True)
    torch.testing.assert_close(forward(rank, ids, model=compiled), forward(rank, ids))
    assert len(graphs) == 1
    calls = [n for n in graphs[0].graph.nodes if "echelon" in str(n.target)]
    assert len(calls) == 3


def test_outside_of_a_context_attention_says_so() -> None:
    rank = rank_of("llama")
    with pytest.raises(RuntimeError, match="forward context"):
        rank.model(torch.zeros(2, dtype=torch.int32), torch.arange(2))


def test_contexts_nest_and_each_thread_has_its_own() -> None:
    outer, inner = ForwardContext((), ()), ForwardContext((), (), None)
    seen: list[object] = []

    def elsewhere() -> None:
        try:
            context.current()
        except RuntimeError as e:
            seen.append(e)

    with forward_context(outer):
        with forward_context(inner):
            assert context.current() is inner
        assert context.current() is outer
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
    assert len(seen) == 1
