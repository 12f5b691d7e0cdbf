"""Our engine in this process as a target, without Ray and HTTP."""

from __future__ import annotations

import gc
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import workloads

from load.records import Record, Run
from load.work import Pacing, Work
from workers.api.config import EngineConfig, ModelConfig, ReplicaConfig
from workers.api.errors import InvalidRequest
from workers.api.request import EngineRequest, FinishReason, SamplingParams
from workers.engine.core import Engine
from workers.engine.plan import Executor
from workers.rank import Rank

DEMO = Path(__file__).resolve().parents[2] / "configs" / "demo-model"
RANDOM_8B = "llama-8b"


def folder_of(model: str, *, layers: int = 0) -> Path:
    """A checkpoint's folder; of `llama-8b` one with nothing but the configuration of Llama-3.1-8B's shape."""
    if model != RANDOM_8B:
        return DEMO if model == "demo" else Path(model)
    folder = Path(tempfile.mkdtemp(prefix="llama-8b-"))
    config = {**workloads.CONFIG, "num_hidden_layers": layers or workloads.CONFIG["num_hidden_layers"]}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def tokenizer_of(model: str) -> Any:
    """As transformers reads it."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder_of(model))


def load_rank(
    model: str,
    engine: EngineConfig,
    *,
    dtype: str = "auto",
    layers: int = 0,
    threads: int | None = None,
    threaded: bool = False,
    random: bool = False,
) -> Rank:
    """The one rank of `model`: `demo`, a folder, or `llama-8b`, which has random weights; `random`: so has a folder, of
    which only the config is read.
    """
    load_format = "dummy" if random or model == RANDOM_8B else "safetensors"
    folder = str(folder_of(model, layers=layers))
    config = ReplicaConfig(ModelConfig(folder, model, load_format=load_format, dtype=dtype), engine)
    rank = Rank(config, threads=threads, threaded=threaded)
    gc.freeze()  # as a rank's process does: else a collection in the middle of a run looks at all of torch
    return rank


class EngineTarget:
    """A fresh engine for every run, so that no run finds another one's prefixes."""

    def __init__(self, rank: Rank, executor: Executor | None = None) -> None:
        """`executor`: what runs the steps of all ranks; without it `rank` is alone."""
        self.rank, self._executor = rank, executor

    def engine(self) -> Engine:
        """A fresh one."""
        return self.rank.make_engine(self._executor)

    def run(self, work: Sequence[Work], pacing: Pacing, done: Callable[[], None]) -> Run:
        """One repeat in this thread; ledgers are checked at the end."""
        engine = self.engine()
        records = [Record(len(w.prompt)) for w in work]
        waiting = list(zip(range(len(work)), pacing.arrivals(len(work)), strict=True))[::-1]
        limit = pacing.concurrency or len(work)
        running = 0
        begin = time.perf_counter()
        while waiting or engine.has_work:
            now = time.perf_counter()
            while waiting and running < limit and begin + waiting[-1][1] <= now:
                at, _ = waiting.pop()
                records[at].began = now
                params = SamplingParams(work[at].out, temperature=0.0)
                try:
                    engine.submit(EngineRequest(str(at), work[at].prompt, params))
                except InvalidRequest as error:
                    records[at].error = str(error)
                    done()
                else:
                    running += 1
            if waiting and not engine.has_work:
                time.sleep(max(0.0, begin + waiting[-1][1] - time.perf_counter()))
                continue
            deltas = engine.step()
            now = time.perf_counter()
            for delta in deltas:
                record = records[int(delta.request_id)]
                if delta.token_ids:
                    record.times.append(now)
                    record.tokens += len(delta.token_ids)
                if delta.finish is not None:
                    running -= 1
                    record.cached_tokens = delta.cached_tokens
                    if delta.finish is FinishReason.ERROR:
                        record.error = delta.error or "the engine gave no reason"
                    done()
        seconds = time.perf_counter() - begin
        engine.check_ledgers()
        return Run(records, seconds)

    def machine(self) -> dict[str, Any]:
        """Device, its ceilings (CUDA only), and how the model was loaded."""
        return machine(self.rank)


def machine(rank: Rank) -> dict[str, Any]:
    """Device, its ceilings (CUDA only), and how the model was loaded."""
    facts: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if rank.device.type == "cuda" else "CPU",
        "threads": torch.get_num_threads(),
        "dtype": str(next(rank.model.parameters()).dtype).removeprefix("torch."),
        "load_seconds_by_phase": rank.phases,
        "kv_blocks": rank.num_blocks,
    }
    if rank.device.type == "cuda":
        from ceilings import measure

        facts["ceilings"] = measure()
    return facts
