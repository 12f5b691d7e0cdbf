"""Running an engine over the fake executor, and checking what its receivers see."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from fake_executor import VOCAB, FakeExecutor, Fault

from workers.api.config import EngineConfig
from workers.api.ordering import Ordering
from workers.api.request import Delta, EngineRequest, FinishReason, SamplingParams
from workers.engine.core import Engine


class Clock:
    """Virtual seconds: each look takes a millisecond."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 0.001
        return self.now


def request(name: str, prompt: Iterable[int], max_tokens: int = 8, **fields: object) -> EngineRequest:
    """A request whose fields may be those of SamplingParams too."""
    own = {k: v for k, v in fields.items() if k in EngineRequest.__dataclass_fields__}
    sampling = {k: v for k, v in fields.items() if k not in own}
    return EngineRequest(name, tuple(prompt), SamplingParams(max_tokens=max_tokens, **sampling), **own)  # type: ignore


@dataclass
class Receiver:
    """The client's side: positions without gap or repetition, one terminal delta a request."""

    tokens: dict[str, list[int]] = field(default_factory=dict)
    last: dict[str, Delta] = field(default_factory=dict)
    start: dict[str, int] = field(default_factory=dict)

    def expect(self, asked: EngineRequest) -> None:
        for name in asked.answer_ids:
            self.tokens[name] = []
            self.start[name] = len(asked.resumed_ids)

    def take(self, deltas: Iterable[Delta]) -> None:
        for delta in deltas:
            name = delta.request_id
            assert name not in self.last, f"{name}: a delta after the last"
            assert delta.position == self.start[name] + len(self.tokens[name]), f"{name}: {delta}"
            assert delta.finish or delta.token_ids, f"{name}: an empty delta"
            self.tokens[name].extend(delta.token_ids)
            if delta.finish is not None:
                self.last[name] = delta

    def finish(self, name: str) -> FinishReason:
        reason = self.last[name].finish
        assert reason is not None
        return reason


@dataclass
class Harness:
    """An engine, its executor and its receiver. `drain` runs to the end and checks the ledgers on the way."""

    block_size: int = 4
    max_num_seqs: int = 8
    max_num_batched_tokens: int = 16
    num_blocks: int = 64
    max_model_len: int = 128
    prefix_caching: bool = True
    step_ahead: bool = True
    watermark: int = 8
    ordering: Ordering | None = None
    fault: Fault = lambda seed, position: False
    fail_submit_at: int | None = None
    fail_result_at: int | None = None
    num_host_blocks: int = 0
    prompts_apart_from: int | None = None

    def __post_init__(self) -> None:
        self.executor = FakeExecutor(
            self.num_blocks,
            self.block_size,
            self.max_num_seqs,
            self.max_num_batched_tokens,
            min(self.max_model_len, self.num_blocks * self.block_size),
            depth=2 if self.step_ahead else 1,
            fault=self.fault,
            fail_submit_at=self.fail_submit_at,
            fail_result_at=self.fail_result_at,
            num_host_blocks=self.num_host_blocks,
        )
        config = EngineConfig(
            block_size=self.block_size,
            max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=self.max_num_batched_tokens,
            prefix_caching=self.prefix_caching,
            step_ahead=self.step_ahead,
        )
        self.engine = Engine(
            config,
            self.executor,
            num_blocks=self.num_blocks,
            max_model_len=self.max_model_len,
            vocab_size=VOCAB,
            ordering=self.ordering,
            clock=Clock(),
            watermark=self.watermark,
            num_host_blocks=self.num_host_blocks,
            prompts_apart_from=self.prompts_apart_from,
        )
        self.receiver = Receiver()

    def submit(self, *requests: EngineRequest) -> None:
        for asked in requests:
            self.engine.submit(asked)
            self.receiver.expect(asked)

    def step(self) -> list[Delta]:
        deltas = self.engine.step()
        self.receiver.take(deltas)
        return deltas

    def drain(self, limit: int = 5000) -> None:
        for _ in range(limit):
            if not self.engine.has_work:
                break
            self.step()
            self.engine.check_ledgers()
        assert not self.engine.has_work, f"not done after {limit} steps: {self.engine.load()}"
        self.check_idle()

    def check_idle(self) -> None:
        """Nothing is held by anybody, and every accepted request has had its last delta."""
        self.engine.check_ledgers()
        load = self.engine.load()
        assert (load.running, load.waiting, load.kv_tokens, load.prefill_backlog) == (0, 0, 0, 0)
        assert load.free_blocks == load.total_blocks == self.num_blocks
        assert load.requests.running == 0
        assert self.receiver.last.keys() == self.receiver.tokens.keys()
