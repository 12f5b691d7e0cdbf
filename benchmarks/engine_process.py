"""An engine in a process of its own, as a rank has it, without HTTP, Ray and connections: the other side of a ratio.

`EngineProcess` starts one and hands it work; `python benchmarks/engine_process.py THREADS` is that process: it reads a
line of JSON (`prompts`, `tokens`) and writes one (`seconds`, `cpu`, `first`), until its input ends.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

Prompts = Sequence[tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Ran:
    """One piece of work: seconds to its end, CPU seconds of all threads, seconds to the first token."""

    seconds: float
    cpu: float
    first: float


class EngineProcess:
    """The demo model in fp32 with `threads` threads; `environment` is added to this process's."""

    def __init__(self, threads: int, environment: dict[str, str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__, str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, **environment},
            text=True,
        )
        assert self._process.stdout is not None
        self._process.stdout.readline()  # it has loaded

    def begin(self, prompts: Prompts, tokens: int) -> None:
        """Start on `tokens` tokens for each prompt, all at once."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"prompts": prompts, "tokens": tokens}) + "\n")
        self._process.stdin.flush()

    def end(self) -> Ran:
        """Wait for what was begun."""
        assert self._process.stdout is not None
        return Ran(**json.loads(self._process.stdout.readline()))

    def close(self) -> None:
        """The process ends."""
        self._process.communicate()


def main(threads: int) -> None:
    gc.disable()  # as in cluster/rank_actor.py
    from cluster.config import ClusterConfig, ModelSection, resolve_model
    from workers.api.request import EngineRequest, SamplingParams
    from workers.rank import Rank

    served = ClusterConfig(model=ModelSection(path="demo")).replica_config("cpu")
    served = replace(served, model=replace(served.model, path=str(resolve_model("demo"))))
    engine = Rank(served, threads=threads).make_engine()
    gc.freeze()
    gc.enable()
    print("loaded", flush=True)
    for number, line in enumerate(sys.stdin):
        work = json.loads(line)
        params = SamplingParams(work["tokens"], temperature=0.0)
        first, made = 0.0, 0
        began, cpu = time.perf_counter(), time.process_time()
        for i, prompt in enumerate(work["prompts"]):
            engine.submit(EngineRequest(f"{number}/{i}", tuple(prompt), params))
        while engine.has_work:
            deltas = engine.step()
            first = first or (time.perf_counter() - began if deltas else 0.0)
            made += sum(len(d.token_ids) for d in deltas)
        ran = {"seconds": time.perf_counter() - began, "cpu": time.process_time() - cpu, "first": first}
        assert made == work["tokens"] * len(work["prompts"]), "tokens are missing"
        print(json.dumps(ran), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]))
