"""One rank as a Ray actor: a thin shell around `workers.rank.Rank`; on rank 0 also around `workers.replica`.

The gang meets in `start`: torch.distributed for collectives, then the plan channel. After that Ray only watches.
"""

from __future__ import annotations

import gc
import logging
import os
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import ray

from cluster.config import resolve_model
from cluster.environment import free_port, gpu_index, prepare_collectives, prepare_torch
from cluster.logs import set_up_logs
from cluster.starved import StepWatch
from cluster.step_qos import StepQos
from workers.api.config import ReplicaConfig
from workers.api.replica import UP, ReplicaInfo, Stage

if TYPE_CHECKING:
    from workers.engine.plan import Executor
    from workers.parallel.channel import PlanReceiver, PlanSender
    from workers.replica import EngineServer

START_SECONDS = 600.0  # ranks meet before they load, and one may read its weights long after the other

log = logging.getLogger("echelon.rank")


@dataclass(frozen=True, slots=True)
class Meeting:
    """Where the ranks of a gang meet: the address of torch.distributed, and of rank 0's plan channel."""

    host: str
    port: int
    plans: tuple[str, int]
    plan_secret: str


@dataclass(frozen=True, slots=True)
class Started:
    """What a rank says once it is up. `info` comes from rank 0 alone; `phases` are the seconds of its start; `node` is
    Ray's name of the node that it runs on.
    """

    info: ReplicaInfo | None
    pid: int
    phases: dict[str, float]
    node: str = ""


class RankActor:
    """Loads its shard in `start`, then steps in `run`, which never returns while the replica is well."""

    def __init__(
        self,
        config: ReplicaConfig,
        revision: str | None,
        replica_id: str,
        rank: int,
        secret: str,
        threads: int,
        qos: StepQos | None = None,
    ) -> None:
        set_up_logs(config.log_level, config.log_format)
        gc.disable()  # until `start` is done: what it imports and loads stays, and looking at it again is for nothing
        self._config, self._revision = config, revision
        self._stage = Stage("not started")
        self._replica_id, self._rank, self._secret, self._threads = replica_id, rank, secret, threads
        self._host = ray.util.get_node_ip_address()
        self._qos = qos
        self._server: EngineServer | None = None
        self._step_watch = StepWatch()
        self._sender: PlanSender | None = None
        self._receiver: PlanReceiver | None = None
        self._runner: Executor | None = None

    def call_meeting(self) -> Meeting:
        """Rank 0 opens the plan channel and picks a port for torch.distributed."""
        from workers.parallel.channel import PlanSender

        rows = self._config.engine.max_num_seqs
        self._sender = PlanSender(self._host, receivers=self._config.tensor_parallel - 1, masked_rows=rows)
        return Meeting(self._host, free_port(self._host), self._sender.address, self._sender.secret)

    def start(self, meeting: Meeting | None) -> Started:
        """Meet the gang if there is one, load, warm up; rank 0 then listens. Raises what the start raises."""
        try:
            return self._start(meeting)
        finally:
            self._stage = UP
            gc.freeze()  # no collection during a step looks at torch's modules again
            gc.enable()

    def stage(self) -> Stage:
        """What `start` is at; it changes as long as the start goes on."""
        return self._stage

    def _enter(self, stage: Stage) -> None:
        self._stage = stage

    def _start(self, meeting: Meeting | None) -> Started:
        self._enter(Stage("looking for the checkpoint"))
        model = self._config.model
        folder = resolve_model(model.path, self._revision, code=model.trust_remote_code)
        self._config = replace(self._config, model=replace(self._config.model, path=str(folder)))
        self._enter(Stage("imports"))
        prepare_torch()
        from workers.execution.gang import GangExecutor  # torch: the driver and the supervisor never import it
        from workers.parallel.channel import PlanReceiver
        from workers.parallel.group import connect
        from workers.rank import Rank
        from workers.replica import EngineServer

        node = ray.get_runtime_context().get_node_id()
        groups = gpu = None
        if self._config.device == "cuda":
            (assigned,) = ray.get_runtime_context().get_accelerator_ids()["GPU"]
            gpu = gpu_index(assigned)
        if meeting is not None:
            self._enter(Stage("meeting the other ranks"))
            prepare_collectives(self._host, node)
            groups = connect(
                rank=self._rank,
                tensor_parallel=self._config.tensor_parallel,
                init_method=f"tcp://{meeting.host}:{meeting.port}",
                backend="nccl" if self._config.device == "cuda" else "gloo",
                timeout_seconds=START_SECONDS,
            )
        rank = Rank(
            self._config,
            rank=self._rank,
            groups=groups,
            gpu=gpu,
            host=node,
            threads=self._threads,
            at=self._enter,
        )
        self._enter(Stage("opening the plan channel"))
        rank.set_timeout(self._config.step_timeout)  # from here on all run the same step, and a late one is a dead one
        executor: Executor = rank.runner
        self._runner = executor
        if self._rank > 0:
            assert meeting is not None
            self._receiver = PlanReceiver(meeting.plans, meeting.plan_secret, f"rank {self._rank}")
            return Started(None, os.getpid(), rank.phases, node)
        if self._sender is not None:
            self._sender.accept()
            executor = GangExecutor(rank.runner, self._sender)
        info = ReplicaInfo(
            id=self._replica_id,
            model=self._config.model.name,
            host=self._host,
            port=0,
            max_model_len=rank.max_model_len,
            max_num_seqs=self._config.engine.max_num_seqs,
            num_blocks=rank.num_blocks,
            block_size=self._config.engine.block_size,
            node=node,
            pid=os.getpid(),
            max_num_batched_tokens=self._config.engine.max_num_batched_tokens,
            num_host_blocks=rank.num_host_blocks,
            prompts_apart_from=rank.model.prompts_apart_from,
        )
        qos = self._qos
        if qos is None:
            self._server = EngineServer(rank.make_engine(executor), info, self._secret)
        else:
            ordering = qos.ordering(info)
            self._server = EngineServer(rank.make_engine(executor, ordering), info, self._secret)
            qos.follow(ordering, self._server)
        return Started(self._server.start(self._host), os.getpid(), rank.phases, node)

    def run(self) -> None:
        """Step until told to stop. Raises what a step raised. The other ranks end with rank 0."""
        from workers.execution.gang import follow

        try:
            if self._server is not None:
                self._server.run()
            else:
                assert self._runner is not None, "start() comes first"
                assert self._receiver is not None, "start() comes first"
                follow(self._runner, self._receiver)
        except Exception:
            log.exception("rank %d of replica %s failed", self._rank, self._replica_id)
            raise
        finally:
            if self._sender is not None:
                self._sender.close()

    def ping(self) -> float:
        """The process is alive, and the step that rank 0 is in has taken so many seconds, in which it could run."""
        return 0.0 if self._server is None else self._step_watch.age(self._server.step_age())

    def sequences(self) -> int:
        """How many sequences rank 0 has that have not ended."""
        return 0 if self._server is None else self._server.sequences

    def stop(self) -> None:
        """Make rank 0's `run` return."""
        if self._server is not None:
            self._server.stop()
